"""Loaders: batches of labelled images on the device. `make_loader` chooses among them."""

from typing import Any

import torch

from fastcnn.config import AugmentConfig, DataConfig
from fastcnn.data import augment as augmentation
from fastcnn.data.draws import Shuffle
from fastcnn.data.images import Files
from fastcnn.data.loaders.base import Batch, Loader
from fastcnn.data.normalize import Normalization
from fastcnn.data.store import Images
from fastcnn.errors import UsageError

__all__ = ["Batch", "Loader", "make_loader"]


def make_loader(
    images: Images | Files,
    data: DataConfig,
    augment: AugmentConfig | None,
    normalization: Normalization,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    seed: int,
    shuffle: Shuffle,
    drop_last: bool,
    epoch_images: int | None = None,
    backend: str = "auto",
    rank: int = 0,
    world: int = 1,
) -> Loader:
    """Return the loader that `data.loader` names ("auto": the resident one for packed images, of
    files DALI's); `augment` None is for evaluation.

    backend: what makes batches on the device: "fused" (fastcnn.ops.augment), "torch" (plain
    torch), "auto" (fused where a library is loaded that has kernels for `dtype`). All give the same
    bits. rank, world: this process's part of the images, every world-th of the epoch's order.

    The order is a permutation by (seed, epoch), each sample once an epoch, or with `epoch_images`
    so many of them; what becomes of a sample depends on (seed, epoch, sample) alone. Raises
    DataError for no images, in all or for this process, ValueError for a rank outside the world,
    UsageError for a batch larger than the set with `drop_last`, for more images an epoch than there
    are, for padding that cannot be reflected, for --loader resident of files, and for a loader
    whose package is missing.
    """
    if augment is not None:
        augmentation.check(augment, *images.sides)
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "device": device,
        "dtype": dtype,
        "seed": seed,
        "shuffle": shuffle,
        "drop_last": drop_last,
        "epoch_images": epoch_images,
        "rank": rank,
        "world": world,
    }
    if data.loader == "torch":
        from fastcnn.data.loaders.torch_loader import TorchLoader

        return TorchLoader(images, augment, normalization, workers=data.workers, **options)
    if data.loader == "dali" or (data.loader == "auto" and isinstance(images, Files)):
        from fastcnn.data.loaders.dali import DaliLoader

        return DaliLoader(images, augment, normalization, backend=backend, **options)
    if isinstance(images, Files):
        raise UsageError("--loader resident: needs packed images; leave --store files out")
    from fastcnn.data.loaders.resident import ResidentLoader

    return ResidentLoader(images, augment, normalization, backend=backend, **options)
