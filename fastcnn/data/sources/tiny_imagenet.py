"""Tiny ImageNet (tiny-imagenet-200: 200 classes, 64 x 64 pixels), unpacked or in its official zip.

The zip that --data tiny-imagenet finds or downloads is checked by MD5 before a byte of it is used;
nothing is extracted.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcnn.cache import cache_dir
from fastcnn.config import DataConfig
from fastcnn.data.sources.base import Contents, Packed
from fastcnn.data.sources.download import check_md5, download
from fastcnn.data.sources.folder import Folder, list_folder
from fastcnn.data.sources.paths import given_path, kind_of
from fastcnn.data.sources.tiny_layout import ANNOTATIONS, WNIDS, tiny_layout
from fastcnn.data.sources.zip import Zip
from fastcnn.errors import DataError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
NAME, ARCHIVE, FOLDER = "tiny-imagenet", "tiny-imagenet-200.zip", "tiny-imagenet-200"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@dataclass(frozen=True)
class TinyImageNet:
    """The official zip: training images and, for testing, the validation images, which have
    labels."""

    where: Path
    name: str = NAME
    in_files: bool = False

    def identity(self, seen: list[Any]) -> list[Any]:
        return [NAME, MD5, seen]

    def contents(self) -> Contents:
        return Zip(self.where, 0.0).contents()  # whose splits no option decides


def open_tiny_imagenet(config: DataConfig, packed: Packed) -> TinyImageNet | Folder:
    """Return the official zip, looked for in `config.data_dir` or, without one, in the cache
    folder's tiny-imagenet/, and downloaded into it if missing; or, where the zip is not, the
    unpacked folder that is there or inside it.

    Raises DataError for a --data-dir that is no folder, a zip with another MD5 and a download that
    fails.
    """
    what, folder = _place(config)
    official = TinyImageNet(folder / ARCHIVE)
    if config.data_dir is None and packed(official):
        return official
    if kind_of(what, folder) not in ("folder", None):
        raise DataError(f"{what} {folder}: not a folder; give the one that holds {ARCHIVE}")
    if kind_of(what, official.where) != "file" and (unpacked := tiny_folder(folder)):
        return open_tiny_folder(unpacked)
    if official.where.exists():
        check_md5(official.where, MD5)
    else:
        otherwise = f"put {ARCHIVE} into the folder of --data-dir"
        download("Tiny ImageNet", URL, official.where, MD5, otherwise)
    return official


def _place(config: DataConfig) -> tuple[str, Path]:
    if config.data_dir is None:
        return "cache folder", cache_dir() / NAME
    return "--data-dir", given_path("--data-dir", config.data_dir)


def tiny_folder(path: Path) -> Path | None:
    """Return the folder with wnids.txt and val/val_annotations.txt: `path` or the one inside it.

    Raises DataError where one of the two files lies without the other.
    """
    try:
        inner = [Path(entry.path) for entry in os.scandir(path) if not entry.name.startswith(".")]
    except OSError:
        return None  # whoever reads the folder says so
    for folder in (path, path / FOLDER, *(inner if len(inner) == 1 else ())):
        present = [(folder / name).is_file() for name in (WNIDS, ANNOTATIONS)]
        if all(present):
            return folder
        if any(present):
            lacking = ANNOTATIONS if present[0] else WNIDS
            raise DataError(f"{folder}: {lacking} is missing; unpack Tiny ImageNet again")
    return None


def open_tiny_folder(path: Path) -> Folder:
    """List the unpacked folder. Raises DataError for whatever list_folder or tiny_layout refuse."""
    files, _ = list_folder(path)

    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path / name}: {error.strerror}") from error

    return Folder(path, files, tiny_layout(str(path), files, read), "folder of Tiny ImageNet")
