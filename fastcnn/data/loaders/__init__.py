"""Loaders: batches of labelled images on the device. `make_loader` chooses among them."""

from typing import Any

from fastcnn.config import AugmentConfig, DataConfig
from fastcnn.data import augment as augmentation
from fastcnn.data.images import Files, Images
from fastcnn.data.loaders.base import Batch, Loader, LoaderOptions
from fastcnn.data.normalize import Normalization
from fastcnn.errors import UsageError

__all__ = ["Batch", "Loader", "LoaderOptions", "make_loader"]


def make_loader(
    images: Images | Files,
    data: DataConfig,
    augment: AugmentConfig | None,
    normalization: Normalization,
    **options: Any,
) -> Loader:
    """Return the loader that `data.loader` names ("auto": the resident one for packed images, of
    files DALI's); `augment` None is for evaluation. options: those of LoaderOptions.

    The order is a permutation by (seed, epoch), each sample once an epoch, or with `epoch_images`
    so many of them; what becomes of a sample depends on (seed, epoch, sample) alone. Raises
    DataError for no images, in all or for this process, ValueError for a rank outside the world,
    UsageError for a batch larger than the set with `drop_last`, for more images an epoch than there
    are, for padding that cannot be reflected, for --loader resident of files, and for a loader
    whose package is missing.
    """
    told = LoaderOptions(**options)
    if augment is not None:
        augmentation.check(augment, *images.sides)
    if data.loader == "torch":
        from fastcnn.data.loaders.torch_loader import TorchLoader

        return TorchLoader(images, augment, normalization, told, data.workers)
    if data.loader == "dali" or (data.loader == "auto" and isinstance(images, Files)):
        from fastcnn.data.loaders.dali import DaliLoader

        return DaliLoader(images, augment, normalization, told)
    if isinstance(images, Files):
        raise UsageError("--loader resident: needs packed images; leave --store files out")
    from fastcnn.data.loaders.resident import ResidentLoader

    return ResidentLoader(images, augment, normalization, told)
