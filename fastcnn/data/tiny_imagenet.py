"""Tiny ImageNet (tiny-imagenet-200: 200 classes, 64 x 64 pixels), unpacked or in its official zip.

The zip that --data tiny-imagenet finds or downloads is checked by MD5 before a byte of it is used;
nothing is extracted.
"""

import os
from functools import partial
from pathlib import Path

import torch

from fastcnn.cache import cache_dir
from fastcnn.config import DataConfig
from fastcnn.data.download import check_md5, download
from fastcnn.data.files import Stamp
from fastcnn.data.folder import image_key, list_folder, load_layout, warn_ignored
from fastcnn.data.left_out import checked
from fastcnn.data.listing import Layout
from fastcnn.data.paths import given_path, kind_of
from fastcnn.data.store import Dataset, fingerprint, load_packed, pack
from fastcnn.data.tiny_layout import ANNOTATIONS, WNIDS, tiny_layout
from fastcnn.data.zip import zip_contents
from fastcnn.errors import DataError

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
NAME, ARCHIVE, FOLDER = "tiny-imagenet", "tiny-imagenet-200.zip", "tiny-imagenet-200"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def load_tiny_imagenet(config: DataConfig) -> Dataset:
    """Return the training images and, for testing, the validation images: those have labels.

    From the official zip, looked for in `config.data_dir` or, without one, in the cache folder's
    tiny-imagenet/, and downloaded into it if missing (unpacked_folder is asked first). Raises
    DataError for a zip with another MD5, whatever tiny_layout refuses, and a download that fails.
    """
    if config.data_dir is None and (packed := load_packed(NAME, _key(config))) is not None:
        return checked(packed, cache_dir() / NAME / ARCHIVE, config)
    archive = _place(config)[1] / ARCHIVE
    if archive.exists():
        check_md5(archive, MD5)
    else:
        otherwise = f"put {ARCHIVE} into the folder of --data-dir"
        download("Tiny ImageNet", URL, archive, MD5, otherwise)
    packed = pack(NAME, _key(config), partial(zip_contents, archive, config))
    return checked(packed, archive, config)


def unpacked_folder(config: DataConfig) -> Path | None:
    """Return the unpacked folder that --data tiny-imagenet stands for: the one of --data-dir, or
    inside it, where the zip is not. Raises DataError for a --data-dir that is no folder."""
    if config.data_dir is None and load_packed(NAME, _key(config)) is not None:
        return None
    what, folder = _place(config)
    if kind_of(what, folder) not in ("folder", None):
        raise DataError(f"{what} {folder}: not a folder; give the one that holds {ARCHIVE}")
    return None if kind_of(what, folder / ARCHIVE) == "file" else tiny_folder(folder)


def _place(config: DataConfig) -> tuple[str, Path]:
    if config.data_dir is None:
        return "cache folder", cache_dir() / NAME
    return "--data-dir", given_path("--data-dir", config.data_dir)


def _key(config: DataConfig) -> str:
    return fingerprint(NAME, MD5, image_key(config))


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


def load_tiny_folder(path: Path, config: DataConfig, device: torch.device) -> Dataset:
    """Read the unpacked folder. Raises DataError for whatever tiny_layout or load_layout refuse."""
    files, layout = list_tiny_folder(path)
    warn_ignored(path, layout)
    return load_layout(path, files, layout, config, device)


def list_tiny_folder(path: Path) -> tuple[dict[str, Stamp], Layout]:
    """Return what list_folder finds in the unpacked folder, and what it means."""
    files, _ = list_folder(path)

    def read(name: str) -> bytes:
        try:
            return (path / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path / name}: {error.strerror}") from error

    return files, tiny_layout(str(path), files, read)
