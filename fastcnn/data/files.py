"""Images that stay in their files and are decoded anew every epoch."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastcnn.data.decode import BadImageError, decode
from fastcnn.data.geometry import resize_box, whole_boxes
from fastcnn.errors import DataError

# Bytes, mtime and ctime in ns; the ctime tells of contents replaced under an old mtime (cp -p)
Stamp = tuple[int, int, int]
WAS_READABLE = "it was readable when it was scanned"


@dataclass(frozen=True)
class Files:
    """Labelled image files, all readable when they were scanned (scan.py).

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


def read_file(path: str | Path, length: int) -> bytes:
    """Return the `length` bytes of a file; raises BadImageError as read_stamped, and for one that
    has another length."""
    data, (now, _, _) = read_stamped(path, length)
    if len(data) != length:
        raise BadImageError(f"changed: {length} bytes when it was listed, {now} now")
    return data


def read_stamped(path: str | Path, length: int) -> tuple[bytes, Stamp]:
    """Return the bytes of a file, at most one more than `length`, and its stamp after they were
    read; never mapped: a file cut meanwhile would kill the process.

    Raises BadImageError if it cannot be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            data = os.read(file, length + 1)
            while len(data) < length and (more := os.read(file, length - len(data))):
                data += more
            status = os.fstat(file)
        finally:
            os.close(file)
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error
    return data, (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
