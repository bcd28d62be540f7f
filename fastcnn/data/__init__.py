"""Images in memory, from wherever they are: readers, the store, splits and loaders."""

from dataclasses import replace
from pathlib import Path

import torch

from fastcnn.config import DATA_NAMES, DataConfig
from fastcnn.data.choose import choose
from fastcnn.data.loaders import Loader, make_loader
from fastcnn.data.normalize import Normalization
from fastcnn.data.paths import given_path, kind_of
from fastcnn.data.split import split
from fastcnn.data.store import Dataset, Images
from fastcnn.errors import DataError, UsageError, nearest

__all__ = ["Dataset", "Images", "Loader", "Normalization", "load_dataset", "make_loader", "split"]


CPU = torch.device("cpu")


def load_dataset(config: DataConfig, default_size: int, device: torch.device = CPU) -> Dataset:
    """Return the dataset that `config.data` names: cifar10, digits, an image folder or a tar.

    Its `loader` is that of --loader or, for `auto`, the one that suits images and `device`.

    Images keep their size unless `config.image_size` is given; the digits take that or
    `default_size`, the network's own. Raises UsageError for a name that is empty or neither known
    nor a path, DataError for data that is missing or not usable.
    """
    path = None if config.data in DATA_NAMES else _path_of(config.data)
    if path is not None and path.is_dir():
        from fastcnn.data.folder import load_folder

        return load_folder(path, config, device)
    dataset = _packed(config, default_size, path)
    count = len(dataset.train) + len(dataset.test) + len(dataset.val or ())
    choice = choose(config, count, dataset.train.sides, False, device)
    return replace(dataset, loader=choice.loader, why=choice.why)


def _packed(config: DataConfig, default_size: int, archive: Path | None) -> Dataset:
    """The datasets that are always packed: those with a name, and archives."""
    if archive is not None:
        from fastcnn.data.tar import load_tar

        return load_tar(archive, config)
    if config.data == "cifar10":
        from fastcnn.data.cifar import load_cifar10

        return load_cifar10(config)
    from fastcnn.data.digits import load_digits

    return load_digits(config.image_size or default_size)


def _path_of(data: str) -> Path:
    """Return the folder or regular file that --data names."""
    path = given_path("--data", data)
    kind = kind_of("--data", path)
    if kind in ("folder", "file"):
        return path
    if kind == "other":
        raise DataError(f"--data {data}: neither a folder nor a regular file")
    if len(path.parts) > 1:
        raise DataError(f"--data {data}: no such file or folder")
    raise UsageError(
        f"--data {data}: neither {', '.join(DATA_NAMES)} nor an existing path"
        f"{nearest(data, DATA_NAMES)}"
    )
