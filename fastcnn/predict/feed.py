"""From files, PIL images and arrays to batches of pixels as the network sees them.

Files are decoded in threads, ahead of whoever takes the batches and a bounded number of them, so
that neither waits long and a million files do not fill the memory.
"""

import os
import stat
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastcnn.data.decode import BadImageError, upright_rgb
from fastcnn.data.examine import THREADED_BYTES, View, examine_all
from fastcnn.data.sources.base import Encoded, read_whole
from fastcnn.errors import UsageError

SAMPLED = 64  # files whose mean size tells how many make a task of a thread

EXPECTED = "a path, a PIL image or uint8 (H, W, 3); also lists of these and uint8 (N, H, W, 3)"


class Batch(NamedTuple):
    """names: where the images are from, None for those in memory. pixels: uint8 (n, H, W, 3)."""

    names: list[str | None]
    pixels: np.ndarray


def batches(
    images: Iterable[Any], view: View, size: int, on_bad: Callable[[str, str], None]
) -> Iterator[Batch]:
    """Yield batches of `size` images, in order, the last one smaller.

    images: paths of files, and what `pixels_of` takes. on_bad: called with name and reason of each
    image that cannot be read, which is in no batch; it may raise.
    """
    names: list[str | None] = []
    pixels: list[np.ndarray] = []
    for name, seen in decoded(images, view):
        if isinstance(seen, str):
            on_bad(name or "an image in memory", seen)
            continue
        names.append(name)
        pixels.append(seen)
        if len(pixels) == size:
            yield Batch(names, np.stack(pixels))
            names, pixels = [], []
    if pixels:
        yield Batch(names, np.stack(pixels))


def decoded(images: Iterable[Any], view: View) -> Iterator[tuple[str | None, np.ndarray | str]]:
    """Yield name, and what `view` shows of the image or why it cannot be read, in order."""
    for in_files, some in groupby(images, is_path):
        if in_files:
            yield from _from_files(map(os.fspath, some), view)
            continue
        for image in some:
            try:
                yield None, view(pixels_of(image))
            except BadImageError as error:
                yield None, str(error)


def _from_files(paths: Iterable[str], view: View) -> Iterator[tuple[str | None, np.ndarray | str]]:
    paths = iter(paths)
    first = list(islice(paths, SAMPLED))
    sources = (
        Encoded("", number, path, partial(read, path))
        for number, path in enumerate(chain(first, paths))
    )
    # in threads whatever their size: the network is to compute meanwhile
    mean_bytes = max(mean_size(first), float(THREADED_BYTES))
    for records in examine_all(sources, view, mean_bytes, keep_pixels=True):
        for source, record in records:
            yield source.path, record.reason if record.pixels is None else record.pixels


def mean_size(paths: list[str]) -> float:
    """Return the mean bytes of those files that there are; 0 for none."""
    sizes = [os.path.getsize(path) for path in paths if os.path.isfile(path)]
    return sum(sizes) / max(len(sizes), 1)


def read(path: str) -> bytes:
    """Return the bytes of a file; raises BadImageError where there is none, or a folder."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise BadImageError(getattr(error, "strerror", None) or str(error)) from error
    if stat.S_ISDIR(status.st_mode):
        raise BadImageError("no images in this folder")
    if not stat.S_ISREG(status.st_mode):
        raise BadImageError("not a regular file")
    return read_whole(Path(path), status.st_size)


def is_path(image: Any) -> bool:
    return isinstance(image, str | os.PathLike)


def pixels_of(image: Any) -> np.ndarray:
    """Return uint8 (H, W, 3) of a PIL image, upright, or of an array or tensor of that shape.

    Raises UsageError for anything else, BadImageError for a PIL image that cannot be read.
    """
    from PIL import Image

    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if not isinstance(image, np.ndarray | torch.Tensor):
        raise UsageError(f"images: expected {EXPECTED}; got {type(image).__name__}")
    shape = tuple(image.shape)
    if image.dtype not in (np.uint8, torch.uint8) or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise UsageError(f"images: expected {EXPECTED}; got {image.dtype} {shape}")
    array = image.cpu().numpy() if isinstance(image, torch.Tensor) else image
    return np.ascontiguousarray(array)  # torch takes no negative strides, as of bgr[..., ::-1]
