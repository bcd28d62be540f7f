"""Sources: what images there are, with their classes, labels and splits, and how to read one.

A source answers `Source.contents` (base.py) and takes no later step: a new kind is one file here
and a line in `open_source`.
"""

from pathlib import Path

from fastcnn.config import DATA_NAMES, DataConfig
from fastcnn.data.sources.archive import Archive
from fastcnn.data.sources.base import Contents, Packed, Source
from fastcnn.data.sources.cifar import open_cifar10
from fastcnn.data.sources.digits import Digits
from fastcnn.data.sources.folder import Folder, open_folder
from fastcnn.data.sources.paths import given_path, kind_of
from fastcnn.data.sources.tar import Tar
from fastcnn.data.sources.tiny_imagenet import (
    open_tiny_folder,
    open_tiny_imagenet,
    tiny_folder,
)
from fastcnn.data.sources.zip import Zip, is_zip
from fastcnn.errors import DataError, UsageError, nearest

__all__ = ["Archive", "Contents", "Folder", "Source", "open_source"]


def open_source(config: DataConfig, default_size: int, packed: Packed) -> Source:
    """Return the source that `config.data` names, where it is; downloaded if it has to be.

    The digits have `config.image_size` or `default_size` pixels a side. `packed` decides whether
    an archive has to be there. Raises UsageError for a name that is empty or neither known nor a
    path, DataError for data that is missing.
    """
    if config.data == "cifar10":
        return open_cifar10(config, packed)
    if config.data == "tiny-imagenet":
        return open_tiny_imagenet(config, packed)
    if config.data == "digits":
        return Digits(config.image_size or default_size)
    path = _path_of(config.data)
    if not path.is_dir():
        return (Zip if is_zip(path) else Tar)(path, config.test_fraction)
    tiny = tiny_folder(path)
    return open_tiny_folder(tiny) if tiny else open_folder(path, config.test_fraction)


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
