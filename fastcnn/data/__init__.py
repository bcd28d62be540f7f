"""Images in memory, from wherever they are: readers, the store, splits and loaders."""

from fastcnn.config import DATA_NAMES, DataConfig
from fastcnn.data.loaders import Loader, make_loader
from fastcnn.data.normalize import Normalization
from fastcnn.data.paths import given_path, kind_of
from fastcnn.data.split import split
from fastcnn.data.store import Dataset, Images
from fastcnn.errors import DataError, UsageError, nearest

__all__ = ["Dataset", "Images", "Loader", "Normalization", "load_dataset", "make_loader", "split"]


def load_dataset(config: DataConfig, default_size: int) -> Dataset:
    """Return the dataset that `config.data` names: cifar10, digits, an image folder or a tar.

    Images keep their size unless `config.image_size` is given; the digits take that or
    `default_size`, the network's own. Raises UsageError for a name that is empty or neither known
    nor a path, DataError for data that is missing or not usable.
    """
    if config.data == "cifar10":
        from fastcnn.data.cifar import load_cifar10

        return load_cifar10(config)
    if config.data == "digits":
        from fastcnn.data.digits import load_digits

        return load_digits(config.image_size or default_size)
    path = given_path("--data", config.data)
    kind = kind_of("--data", path)
    if kind == "folder":
        from fastcnn.data.folder import load_folder

        return load_folder(path, config)
    if kind == "file":
        from fastcnn.data.tar import load_tar

        return load_tar(path, config)
    if kind == "other":
        raise DataError(f"--data {config.data}: neither a folder nor a regular file")
    if len(path.parts) > 1:
        raise DataError(f"--data {config.data}: no such file or folder")
    raise UsageError(
        f"--data {config.data}: neither {', '.join(DATA_NAMES)} nor an existing path"
        f"{nearest(config.data, DATA_NAMES)}"
    )
