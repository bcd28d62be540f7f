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
    """Return the dataset that `config.data` names: CIFAR-10, Tiny ImageNet, digits, an image folder
    or an archive of one.

    Its `loader` is that of --loader or, for `auto`, the one that suits images and `device`.

    Images keep their size unless `config.image_size` is given; the digits take that or
    `default_size`, the network's own. Raises UsageError for a name that is empty or neither known
    nor a path, DataError for data that is missing or not usable.
    """
    path = path_of(config)
    if path is not None and path.is_dir():
        from fastcnn.data.folder import load_folder
        from fastcnn.data.tiny_imagenet import load_tiny_folder, tiny_folder

        tiny = tiny_folder(path)
        return load_tiny_folder(tiny, config, device) if tiny else load_folder(path, config, device)
    dataset = _packed(config, default_size, path)
    count = len(dataset.train) + len(dataset.test) + len(dataset.val or ())
    choice = choose(config, count, dataset.train.sides, False, device)
    return replace(dataset, loader=choice.loader, why=choice.why)


def path_of(config: DataConfig) -> Path | None:
    """Return the folder or archive to read, None for a dataset that is found by its name alone.

    Raises as load_dataset.
    """
    if config.data == "tiny-imagenet":
        from fastcnn.data.tiny_imagenet import unpacked_folder

        return unpacked_folder(config)
    return None if config.data in DATA_NAMES else _path_of(config.data)


def _packed(config: DataConfig, default_size: int, archive: Path | None) -> Dataset:
    """The datasets that are always packed: those with a name, and archives."""
    if archive is not None:
        from fastcnn.data.tar import load_tar
        from fastcnn.data.zip import is_zip, load_zip

        return load_zip(archive, config) if is_zip(archive) else load_tar(archive, config)
    if config.data == "cifar10":
        from fastcnn.data.cifar import load_cifar10

        return load_cifar10(config)
    if config.data == "tiny-imagenet":
        from fastcnn.data.tiny_imagenet import load_tiny_imagenet

        return load_tiny_imagenet(config)
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
