"""Loaders: batches of labelled images on the device, with a position that can be saved.

for x, y in loader:     the rest of the current epoch; then the next epoch begins
    x                   (n, 3, H, W), normalised, channels-last strides
    y                   int64 (n,)

The same in parts, for whoever wants the batches made elsewhere (in a CUDA graph):

for count in loader.begin():
    loader.stage(count)
    x, y = loader.batch(count)
    loader.advance(count)
loader.finish()
"""

import abc
import itertools
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastcnn.data.draws import Shuffle, epoch_order
from fastcnn.errors import DataError, UsageError

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class LoaderOptions:
    """What every loader is told.

    An epoch has `epoch_images` images (None: all of them). rank, world: this process's part, every
    world-th of the epoch's order. backend: what makes batches on the device: "fused"
    (fastcnn.ops.augment), "torch" (plain torch), "auto" (fused where a library is loaded that has
    kernels for `dtype`); all give the same bits.
    """

    batch_size: int
    device: torch.device
    seed: int
    shuffle: Shuffle
    drop_last: bool
    dtype: torch.dtype = torch.float32
    epoch_images: int | None = None
    backend: str = "auto"
    rank: int = 0
    world: int = 1


class Loader(abc.ABC):
    """The order of samples and the position in it; a subclass delivers the batches.

    An epoch has the first `epoch_images` (None: all) of an order of `total` images, of which a
    process of several (`rank` of `world`) has every world-th, `samples` in all; so `batch_size`
    images of each are the next `step_images` of the order. `epoch` and `position` (samples that
    this process has handed out of this epoch) are where it stands. One iteration at a time.
    """

    def __init__(self, total: int, options: LoaderOptions) -> None:
        rank, world, epoch_images = options.rank, options.world, options.epoch_images
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 to {world - 1}, got {rank}")
        if total == 0:
            raise DataError("no images to load")
        if epoch_images is not None and epoch_images > total:
            raise UsageError(f"--epoch-images {epoch_images}: there are {total} training images")
        taken = total if epoch_images is None else epoch_images
        samples = len(range(rank, taken, world))
        if samples == 0:
            raise DataError(
                f"process {rank} of {world}: {taken} images leave none for it; "
                f"start {taken} processes at most"
            )
        if options.drop_last and taken < options.batch_size * world:
            raise UsageError(
                f"--drop-last: {taken} images make no whole batch of {options.batch_size * world}; "
                f"take --batch-size {taken // world * world} or less"
            )
        self.total, self.taken, self.samples = total, taken, samples
        self.rank, self.world = rank, world
        self.batch_size = options.batch_size
        self.device, self.dtype = options.device, options.dtype
        self.seed = options.seed
        self.shuffle = options.shuffle
        self.drop_last = options.drop_last
        self.epoch = 0
        self.position = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        if self.drop_last:
            return self.taken // self.step_images
        return -(-self.samples // self.batch_size)

    @property
    def step_images(self) -> int:
        """Images of a whole batch, those of all processes together."""
        return self.batch_size * self.world

    @property
    def common_batches(self) -> int:
        """Batches of an epoch that every process has; one with more images may have another."""
        return min(len(self), -(-(self.taken // self.world) // self.batch_size))

    @property
    def last_weight(self) -> float:
        """What the mean over this process's last batch counts in the mean of such means over the
        processes, so that every image counts alike: 1 but for a part of uneven parts."""
        rest = 0 if self.drop_last else self.taken % self.step_images
        return len(range(self.rank, rest, self.world)) * self.world / rest if rest else 1.0

    def __iter__(self) -> Iterator[Batch]:
        for count in self.begin():
            self.stage(count)
            batch = self.batch(count)
            self.advance(count)
            yield batch
        self.finish()

    def remaining(self) -> list[int]:
        """Return the sizes of the batches that are left of the current epoch."""
        left = self.samples - self.position
        if self.drop_last:
            everyone = self.taken - self.position * self.world
            return [self.batch_size] * min(left // self.batch_size, everyone // self.step_images)
        whole, rest = divmod(left, self.batch_size)
        return [self.batch_size] * whole + ([rest] if rest else [])

    @abc.abstractmethod
    def begin(self) -> list[int]:
        """Make ready for the rest of the current epoch; return the sizes of its batches."""

    def epoch_samples(self) -> torch.Tensor:
        """Return int64 (samples,): the numbers of this process's samples in the epoch's order."""
        order = epoch_order(self.seed, self.epoch, self.total, self.shuffle)
        return order[: self.taken][self.rank :: self.world]

    def stage(self, count: int) -> None:  # noqa: B027 - the resident loader has nothing to bring
        """Bring the data of the next `count` images to where `batch` takes them from."""

    @abc.abstractmethod
    def batch(self, count: int) -> Batch:
        """Return the next batch, of the size that `begin` told."""

    def advance(self, count: int) -> None:
        """Note that a batch of `count` images was handed out."""
        self.position += count

    def finish(self) -> None:
        """Go on to the next epoch."""
        self.epoch, self.position = self.epoch + 1, 0

    def ahead(self, batches: int) -> Generator[Batch]:
        """Yield the next `batches` batches, at most the rest of the epoch, or of the next one where
        nothing is left; once closed, the loader stands again where it stood."""
        epoch, position = self.epoch, self.position
        if not self.remaining():
            self.epoch, self.position = epoch + 1, 0
        try:
            yield from itertools.islice(self, batches)
        finally:
            self.epoch, self.position = epoch, position

    def state_dict(self) -> dict[str, int]:
        """Return {"epoch", "position"}: what all processes together have handed out, whatever was
        prefetched.

        After the last batch, and until the iteration ends, position is the end of the epoch.
        """
        return {"epoch": self.epoch, "position": min(self.position * self.world, self.taken)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position, also with another batch size or number of processes.

        Raises DataError for a position outside the epoch.
        """
        epoch, position = int(state["epoch"]), int(state["position"])
        if epoch < 0 or not 0 <= position <= self.taken:
            raise DataError(f"position {position} of epoch {epoch}: there are {self.taken} images")
        self.epoch, self.position = epoch, len(range(self.rank, position, self.world))
