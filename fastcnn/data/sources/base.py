"""What a source of images is, and what it hands over."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fastcnn.data.decode import BadImageError
from fastcnn.errors import DataError

SPLITS = ("train", "test", "val")
MAX_FILE_BYTES = 1 << 30

# Bytes, mtime and ctime in ns; the ctime tells of contents replaced under an old mtime (cp -p)
Stamp = tuple[int, int, int]
Block = tuple[str, Sequence[int], np.ndarray]  # split, positions, pixels of a few images


@dataclass(frozen=True)
class Encoded:
    """An image that is still to be decoded: its split and its position there, its path for
    messages, and how to read its bytes, which raises BadImageError."""

    split: str
    position: int
    path: str
    read: Callable[[], bytes]


@dataclass(frozen=True)
class Contents:
    """What is in a source.

    `labels` holds int64 (N,) per split. Either `encoded` yields the images, whose `paths` stand by
    split in the order of `labels`, in whatever order they are best read; they have `mean_bytes`
    each. Or `blocks` yields (split, positions, pixels), pixels uint8 (n, H, W, 3), every position
    once. `where`: the path that messages name. `ignored`: how many files are no images of a class.
    `stamps`: of images that are files below `where`, by path; None where they cannot be read one by
    one.
    """

    where: Path
    classes: tuple[str, ...]
    labels: dict[str, np.ndarray]
    encoded: Callable[[], Iterator[Encoded]] | None = None
    blocks: Iterable[Block] = ()
    paths: dict[str, list[str]] = field(default_factory=dict)
    mean_bytes: float = 0.0
    ignored: int = 0
    stamps: dict[str, Stamp] | None = None

    def __len__(self) -> int:
        return sum(map(len, self.labels.values()))

    def images(self) -> Iterator[Encoded]:
        """Yield the encoded images."""
        return self.encoded() if self.encoded else iter(())

    @property
    def names(self) -> list[str]:
        """The paths of all splits, one after the other."""
        return [path for paths in self.paths.values() for path in paths]

    def by_split(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Cut an array (N, ...) with a row for each of `names`, split by split."""
        ends = np.cumsum([len(numbers) for numbers in self.labels.values()])[:-1]
        return dict(zip(self.labels, np.split(values, ends), strict=True))


class Source(Protocol):
    """Where images come from. It says what is in it, and knows nothing of what becomes of them.

    name: the data set's. where: the path that messages name. in_files: whether every image is a
    file, which may be read whenever it is needed.
    """

    @property
    def name(self) -> str: ...

    @property
    def where(self) -> Path: ...

    @property
    def in_files(self) -> bool: ...

    def identity(self, seen: list[Any]) -> list[Any]:
        """Return plain values that change when the images do: the key of what is packed of them.

        seen: side, --resize and --grayscale, for a source to which they matter.
        """

    def contents(self) -> Contents:
        """Return what is in it. Raises DataError for what cannot be used."""


Packed = Callable[[Source], bool]  # whether the images of a source are packed already


def check_labels(classes: Sequence[str], labels: dict[str, np.ndarray]) -> None:
    """Raise DataError for fewer than two classes, an empty split and labels out of range."""
    if len(classes) < 2:
        raise DataError(f"one class only ({', '.join(classes)}); two are needed")
    for split, numbers in labels.items():
        if len(numbers) == 0:
            raise DataError(f"no {split} images")
        low, high = int(numbers.min()), int(numbers.max())
        if low < 0 or high >= len(classes):
            worst = low if low < 0 else high
            raise DataError(f"{split} labels: expected 0 to {len(classes) - 1}, got {worst}")


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_whole(path: str | Path, length: int) -> bytes:
    """Return the `length` bytes of a file; raises BadImageError as read_stamped, for one that has
    another length and for one too long."""
    if length > MAX_FILE_BYTES:
        raise BadImageError(f"{length} bytes, over {MAX_FILE_BYTES}")
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
    return data, stamp_of(status)
