"""Images that stay in their files and are decoded anew every epoch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastcnn.data.decode import BadImageError, decode
from fastcnn.data.geometry import resize_box, whole_boxes
from fastcnn.errors import DataError


@dataclass(frozen=True)
class Files:
    """Labelled image files, all readable when they were scanned (scan.py).

    paths: (N,) str, relative to `root`. labels: int64 (N,). lengths: int64 (N,), bytes of each
    file, which must not change. shapes: int32 (N, 2), height and width, upright. sums: float64
    (N, 6), of each channel the sum of pixels and of squared pixels (0..255), exact, of the image
    as evaluation sees it. plain: bool (N,), whether every decoder gives the same pixels; of the
    others (with transparency, GIF, …) only decode.py's count. sides: height and width of a batch's
    images. resize: as the option.
    """

    root: Path
    paths: np.ndarray
    labels: np.ndarray
    lengths: np.ndarray
    shapes: np.ndarray
    sums: np.ndarray
    plain: np.ndarray
    sides: tuple[int, int]
    resize: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, chosen: np.ndarray) -> "Files":
        """Return the images at the int64 positions `chosen`."""
        names = ("paths", "labels", "lengths", "shapes", "sums", "plain")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})

    def read(self, sample: int) -> np.ndarray:
        """Return the bytes of a file, decoded: uint8 (H, W, 3), upright, in its own size.

        Raises DataError, which names the file, if it is gone, changed or no longer an image.
        """
        path = self.root / str(self.paths[sample])
        try:
            pixels = decode(read_file(path, int(self.lengths[sample]))).pixels
            if pixels.shape[:2] != tuple(self.shapes[sample]):
                height, width = self.shapes[sample]
                was, found = f"{height} x {width}", f"{pixels.shape[0]} x {pixels.shape[1]}"
                raise BadImageError(f"changed: {was} pixels when it was listed, {found} now")
            return pixels
        except BadImageError as error:
            raise DataError(f"{path}: {error}; it was readable before") from error

    def pixels_of(self, samples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return uint8 (n, H, W, 3), `sides` large: the images as evaluation sees them."""
        boxes = whole_boxes(self.shapes[samples], self.resize)
        images = [
            resize_box(self.read(int(sample)), box, self.sides)
            for sample, box in zip(samples, boxes, strict=True)
        ]
        return np.stack(images) if images else np.empty((0, *self.sides, 3), np.uint8)


def read_file(path: Path, length: int) -> bytes:
    """Return the `length` bytes of a file, read, never mapped: a file cut meanwhile is an error.

    Raises BadImageError if it cannot be read or has another length.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error
    if len(data) != length:
        raise BadImageError(f"changed: {length} bytes when it was listed, {len(data)} now")
    return data
