"""The torch loader: DataLoader and torchvision transforms, one image at a time.

Slow, and the oracle for the resident loader: the same parameters and distribution by other code.
Each sample's random numbers come from (seed, epoch, sample); the main process's generators are
left as they were. Images in files are read and decoded by the workers, every epoch anew.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import connection
from typing import Any

import torch
from torch.utils.data import dataloader, default_collate

from fastcnn.config import AugmentConfig
from fastcnn.data.draws import alternating_flip, derive_seed
from fastcnn.data.images import Files, Images
from fastcnn.data.loaders.base import Batch, Loader, LoaderOptions
from fastcnn.data.loaders.upload import resident
from fastcnn.data.normalize import Normalization
from fastcnn.errors import DataError, UsageError
from fastcnn.ops.reference.augmentation import normalize
from fastcnn.text import first_line, last_line

POLL_S = 2  # between two looks at whether the workers are alive
TIMED_OUT, CAUGHT = "timed out", "Caught "  # in DataLoader's own words
WORKER_TIMEOUT_S = 120  # without a batch for so long, a worker is taken to hang

Transform = Callable[[torch.Tensor], torch.Tensor]
Fetched = torch.Tensor | str  # a batch, or why there is none: an error would bring a traceback


class TorchLoader(Loader):
    """See loaders.make_loader. Raises DataError when a worker dies or hangs, and for a file that is
    gone, cut or replaced."""

    def __init__(
        self,
        images: Images | Files,
        augment: AugmentConfig | None,
        normalization: Normalization,
        options: LoaderOptions,
        workers: int,
    ) -> None:
        super().__init__(len(images), options)
        self.labels = torch.from_numpy(images.labels)
        self.schedule = Schedule()
        self.batches: Iterator[torch.Tensor] = iter(())
        self.fetched: Iterator[Fetched] = iter(())
        self.loader = PatientLoader(
            Samples(images, augment, normalization, options.dtype, options.seed),
            batch_sampler=self.schedule,
            collate_fn=_collate,
            num_workers=workers,
            persistent_workers=workers > 0,
            timeout=POLL_S if workers else 0,
            # fork shares the images without a copy; workers run neither threads nor CUDA
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=_obey_parent,
            pin_memory=options.device.type == "cuda",
            # iterating draws a seed: from here, not from the main process's generator
            generator=torch.Generator(),
        )

    def begin(self) -> list[int]:
        sizes = self.remaining()
        end = self.position + sum(sizes)
        order = self.epoch_samples()
        batches = order[self.position : end].split(sizes) if sizes else ()
        self.schedule.batches = [[(self.epoch, i) for i in batch.tolist()] for batch in batches]
        self.batches, self.fetched = iter(batches), self._start()
        return sizes

    def batch(self, count: int) -> Batch:
        index = next(self.batches)
        fetched = _next(self.fetched)
        if isinstance(fetched, str):
            raise DataError(fetched)
        x = fetched.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return x, self.labels[index].to(self.device, non_blocking=True)

    def finish(self) -> None:
        # lets DataLoader see its end, so that the workers are ready for the next epoch
        next(self.fetched, None)
        super().finish()

    def _start(self) -> Iterator[Fetched]:
        """Start (the first time) or reset the workers.

        They inherit the blocked signals, which reach the whole process group: the main process
        saves a checkpoint and then ends them. Torch's own handler of a worker's death would raise
        wherever the main process happens to be, in the middle of a save too; `_next` looks for
        dead workers instead.
        """
        before = signal.getsignal(signal.SIGCHLD)
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        try:
            with _worker_errors(self.loader._iterator):
                return iter(self.loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, before)


class PatientIterator(dataloader._MultiProcessingDataLoaderIter):
    """Waits for its workers POLL_S at a time and looks whether they live, over and over: until it
    has something, or raises RuntimeError after WORKER_TIMEOUT_S."""

    def _get_data(self) -> Any:
        deadline = time.monotonic() + WORKER_TIMEOUT_S
        while True:
            try:
                return super()._get_data()
            except RuntimeError as error:
                if TIMED_OUT not in str(error) or time.monotonic() > deadline:
                    raise


class PatientLoader(dataloader.DataLoader):
    """A DataLoader that a worker may let wait."""

    def _get_iterator(self) -> Any:
        return PatientIterator(self) if self.num_workers else super()._get_iterator()


def _next(fetched: Iterator[Fetched]) -> Fetched:
    """Return the next batch; DataError when a worker is dead, or after WORKER_TIMEOUT_S."""
    with _worker_errors(fetched):
        return next(fetched)


@contextmanager
def _worker_errors(fetched: Any) -> Iterator[None]:
    """Turn what DataLoader raises for a worker that is dead or hangs into a DataError with its
    process id."""
    try:
        yield
    except RuntimeError as error:
        reason = first_line(error)
        if "DataLoader" not in reason:
            raise
        if reason.startswith(CAUGHT):  # a worker's traceback follows, and its error's words last
            reason += f" {last_line(error)}"
        if TIMED_OUT in reason:
            reason = f"worker (pid {_slow_workers(fetched)}) gave nothing for {WORKER_TIMEOUT_S} s"
        raise _worker_error(reason) from error
    except (OSError, EOFError) as error:
        # the worker died while it handed a batch over
        dead = _dead_workers(fetched)
        raise _worker_error(f"DataLoader worker (pid {dead}) is gone ({error})") from error


def _dead_workers(fetched: Any) -> str:
    """Return the process ids of the workers that have ended, or end within a second."""
    workers = fetched._workers  # torch tells of them nowhere else
    # a process lets go of its sentinel before it can be seen to have ended
    ended = connection.wait([worker.sentinel for worker in workers], timeout=1)
    return ", ".join(str(worker.pid) for worker in workers if worker.sentinel in ended)


def _slow_workers(fetched: Any) -> str:
    """Return the process id of the worker whose batch is waited for; between epochs, of all."""
    waited = fetched._task_info.get(fetched._rcvd_idx)
    workers = [fetched._workers[waited[0]]] if waited else fetched._workers
    return ", ".join(str(worker.pid) for worker in workers)


def _worker_error(reason: str) -> DataError:
    return DataError(f"--loader torch: {reason}; --workers 0 loads without workers")


def _collate(images: list[torch.Tensor] | list[str]) -> Fetched:
    """Return images (H, W, 3) as a batch (n, H, W, 3); an error's text, which comes alone, as it
    is."""
    return images[0] if isinstance(images[0], str) else default_collate(images)


class Schedule:
    """The batches that DataLoader asks for next: lists of (epoch, sample)."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Samples(torch.utils.data.Dataset):
    """Augmented, normalised images as batches (n, H, W, 3), fetched by (epoch, sample)."""

    def __init__(
        self,
        images: Images | Files,
        augment: AugmentConfig | None,
        normalization: Normalization,
        dtype: torch.dtype,
        seed: int,
    ) -> None:
        self.augment = augment
        self.box: Transform | None = None
        if isinstance(images, Images):
            # the workers share the pixels
            pixels = resident(images.pixels, torch.device("cpu"))
            images = Images(pixels.numpy(), images.labels)
        elif augment is not None and augment.resized_crop < 1:
            self.box = _random_box(augment.resized_crop, *images.sides)
            augment = replace(augment, resized_crop=1.0)
        self.images = images
        self.dtype = dtype
        self.seed = seed
        self.fill = normalization.fill
        self.scale, self.bias = normalization.scale_bias(torch.device("cpu"))
        self.transforms = [] if augment is None else transforms(augment, *images.sides)
        self.flips: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[torch.Tensor] | list[str]:
        state = torch.get_rng_state()
        try:
            return [self.sample(epoch, sample) for epoch, sample in keys]
        except DataError as error:
            return [str(error)]
        finally:
            torch.set_rng_state(state)

    def sample(self, epoch: int, sample: int) -> torch.Tensor:
        # torch.manual_seed would also reseed the main process's CUDA generators
        torch.default_generator.manual_seed(derive_seed(self.seed, "sample", epoch, sample))
        image = self.read(sample)
        if self.augment is not None and self.augment.flip == "alternating":
            image = image.flip(2) if self.alternates(epoch)[sample] else image
        for transform in self.transforms:
            image = transform(image)
        x = normalize(image.permute(1, 2, 0)[None], self.scale, self.bias).to(self.dtype)[0]
        if self.augment is not None and self.augment.cutout > 0:
            cut_out(x, self.augment.cutout, self.fill)
        return x

    def read(self, sample: int) -> torch.Tensor:
        """Return an image uint8 (3, H, W) as evaluation sees it, or, where training cuts a part out
        of a file's image, that part."""
        if self.box is not None and isinstance(self.images, Files):
            return self.box(torch.tensor(self.images.read(sample)).permute(2, 0, 1))
        return torch.from_numpy(self.images.pixels_of([sample])[0]).permute(2, 0, 1)

    def alternates(self, epoch: int) -> torch.Tensor:
        if epoch not in self.flips:
            self.flips = {epoch: alternating_flip(self.seed, epoch, len(self))}
        return self.flips[epoch]


def _random_box(smallest: float, height: int, width: int) -> Transform:
    """What cuts a part, at least `smallest` of the area, out of an image (3, H, W) and stretches it
    to height x width."""
    v2 = _torchvision_v2()
    box: Transform = v2.RandomResizedCrop((height, width), scale=(smallest, 1.0), antialias=True)
    return box


def transforms(augment: AugmentConfig, height: int, width: int) -> list[Transform]:
    """Return torchvision transforms of one image (3, H, W), uint8 to uint8 or float in 0..255.

    Raises UsageError where torchvision is missing or does not fit torch.
    """
    v2 = _torchvision_v2()
    geometry: list[Transform] = []
    exact: list[Transform] = []
    if augment.crop_padding > 0:
        mode = "reflect" if augment.crop_mode == "reflect" else "constant"
        exact.append(
            v2.RandomCrop((height, width), padding=augment.crop_padding, padding_mode=mode)
        )
    if augment.flip == "random":
        exact.append(v2.RandomHorizontalFlip())
    if augment.resized_crop < 1:
        geometry.append(_random_box(augment.resized_crop, height, width))
    if augment.rotation > 0 or augment.shift > 0:
        bilinear = v2.InterpolationMode.BILINEAR
        translate = (augment.shift, augment.shift)
        # fill=0 would darken the edge twice, by the zeros outside and by a mask
        geometry.append(
            v2.RandomAffine(augment.rotation, translate, interpolation=bilinear, fill=None)
        )
    if (strength := augment.color_jitter) > 0:
        # one after the other: a single ColorJitter would shuffle the three
        geometry += [
            v2.ColorJitter(brightness=strength),
            v2.ColorJitter(contrast=strength),
            v2.ColorJitter(saturation=strength),
        ]
    if not geometry:
        return exact
    # in float, so that nothing is rounded to whole grey levels in between
    return [*exact, v2.ToDtype(torch.float32, scale=True), *geometry, lambda image: image * 255]


def _torchvision_v2() -> Any:
    try:
        from torchvision.transforms import v2
    except Exception as error:  # a broken package raises anything
        reason = first_line(error)
        raise UsageError(
            f"--loader torch: torchvision cannot be imported ({reason}); install the torchvision "
            "made for this torch, or take --loader resident"
        ) from error
    return v2


def cut_out(x: torch.Tensor, side: int, fill: tuple[float, float, float]) -> None:
    """Set a square of `side` pixels around a random pixel of x (H, W, 3) to `fill`, in place."""
    height, width, _ = x.shape
    top = int(torch.randint(height, ())) - side // 2
    left = int(torch.randint(width, ())) - side // 2
    x[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = torch.tensor(
        fill, dtype=x.dtype
    )


def _obey_parent(worker: int) -> None:
    """End when the main process sends SIGTERM, as it does to a worker that hangs.

    SIGTERM is blocked (TorchLoader._start); from anybody else it is dropped.
    """
    parent = os.getppid()

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
