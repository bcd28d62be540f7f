"""The records of images: packed or in their files, and data sets of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from fastcnn.data.decode import BadImageError, decode, resize_box, whole_boxes
from fastcnn.data.sources.base import read_stamped
from fastcnn.errors import DataError

WAS_READABLE = "it was readable when it was scanned"


@dataclass(frozen=True)
class Images:
    """Labelled images: `pixels` uint8 (N, H, W, 3), maybe memory-mapped; `labels` int64 (N,)."""

    pixels: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of an image."""
        return self.pixels.shape[1], self.pixels.shape[2]

    def take(self, chosen: np.ndarray) -> "Images":
        """Return a copy in memory of the images at the int64 positions `chosen`."""
        return Images(self.pixels_of(chosen), self.labels[chosen])

    def pixels_of(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return a copy in memory of images, uint8 (n, H, W, 3)."""
        return np.array(np.asarray(self.pixels)[samples])


@dataclass(frozen=True)
class Files:
    """Labelled image files, which are decoded anew every epoch; all were readable when they were
    scanned (scan.py).

    paths: (N,) str, relative to `root`. labels: int64 (N,). stamps: int64 (N, 3), and hashes: uint8
    (N, 32), sha256 of the contents, which must not change. shapes: int32 (N, 2), height and width,
    upright. sums: float64 (N, 6), of each channel the sum of pixels and of squared pixels (0..255),
    exact, of the image as evaluation sees it. plain: bool (N,), whether DALI gives the same pixels;
    of the others (with transparency, GIF, …) only decode.py's count. sides: height and width of a
    batch's images. resize: as the option.
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    stamps: np.ndarray
    hashes: np.ndarray
    shapes: np.ndarray
    sums: np.ndarray
    plain: np.ndarray
    sides: tuple[int, int]
    resize: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> "Files":
        """Return the images at the int64 positions `chosen`."""
        names = ("paths", "labels", "stamps", "hashes", "shapes", "sums", "plain")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def path(self, sample: int) -> str:
        """Return where a file is."""
        return f"{self.root}/{self.paths[sample]}"

    def encoded(self, sample: int) -> bytes:
        """Return the bytes of a file, which are those that the scan has decoded.

        Under the stamp of the scan they are; under another one their hash decides. Raises
        DataError, which names the file, if it is gone or changed.
        """
        path = self.path(sample)
        recorded = tuple(self.stamps[sample].tolist())
        try:
            data, stamp = read_stamped(path, recorded[0])
        except BadImageError as error:
            raise DataError(f"{path}: {error}; {WAS_READABLE}") from error
        if stamp == recorded and len(data) == recorded[0]:
            return data
        if hashlib.sha256(data).digest() == self.hashes[sample].tobytes():
            return data
        how = f": {recorded[0]} bytes then, {stamp[0]} now" if stamp[0] != recorded[0] else ""
        raise DataError(f"{path}: changed since it was scanned{how}; put it back, or start anew")

    def read(self, sample: int) -> np.ndarray:
        """Return a file's image: uint8 (H, W, 3), upright, in its own size. Raises DataError as
        `encoded`."""
        data = self.encoded(sample)
        try:
            return decode(data).pixels
        except BadImageError as error:  # by another Pillow than that of the scan
            raise DataError(f"{self.path(sample)}: {error}; {WAS_READABLE}") from error

    def pixels_of(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return uint8 (n, H, W, 3), `sides` large: the images as evaluation sees them."""
        boxes = whole_boxes(self.shapes[samples], self.resize)
        images = [
            resize_box(self.read(int(sample)), box, self.sides)
            for sample, box in zip(samples, boxes, strict=True)
        ]
        return np.stack(images) if images else np.empty((0, *self.sides, 3), np.uint8)


@dataclass(frozen=True)
class LeftOut:
    """Images that a reader left out: `bad`, path and reason of each unreadable one; `grey`, how
    many had no colours (--grayscale drop). `unread`: the bad ones whose very bytes could not be
    read, which may succeed another time though the file stays the same."""

    bad: tuple[tuple[str, str], ...] = ()
    grey: int = 0
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Images with the names of their classes; `labels` index into `classes`.

    `digest` is the sha256 (hex) of the images' contents, labels and class names, and, where `split`
    drew a part of them, of the drawn indices. Of images from files, packed or not, the contents are
    the files' bytes and what is seen of them. `loader` is --loader, or what auto comes to
    here, which `why` then says in a line.
    """

    name: str
    classes: tuple[str, ...]
    train: Images | Files
    test: Images | Files
    val: Images | Files | None
    digest: str
    left_out: LeftOut = LeftOut()
    loader: Literal["resident", "dali", "torch"] = "resident"
    why: str = ""
