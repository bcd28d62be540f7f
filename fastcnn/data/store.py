"""The store: every reader's images as uint8 NHWC arrays, packed once into the cache folder.

An entry of the cache is a folder `<key>/` with `<split>.pixels.npy`, `<split>.labels.npy` and
`meta.json`. It is written under a temporary name and renamed, so that a reader sees a whole entry
or none, and two processes that pack the same data at once both end with a good one. Later starts
map the pixels into memory and decode nothing.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastcnn.cache import cache_dir
from fastcnn.data.files import Files
from fastcnn.data.progress import progress_bar
from fastcnn.errors import DataError
from fastcnn.files import load_json
from fastcnn.text import first_line

log = logging.getLogger(__name__)

FORMAT = 3  # of a cache entry; part of every fingerprint
SPLITS = ("train", "test", "val")
Block = tuple[str, Sequence[int], np.ndarray]  # split, positions, pixels of a few images
SLOW_IMAGES = 5000  # more are announced in a log: reading them may take a minute
COPIED_BYTES = 1 << 24  # at a time, where images move together
STALE_SECONDS = 86_400  # an unfinished entry older than this was left by a killed process


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


@dataclass
class Account:
    """What a reader of encoded images knows of them, once its blocks are at their end.

    hashes: uint8 (N, 32) per split, sha256 of each image's bytes. kept: bool (N,) per split; the
    others are left out, and no block holds them. view: what was made of the images, beside their
    sides, for the digest.
    """

    hashes: dict[str, np.ndarray]
    kept: dict[str, np.ndarray]
    view: str
    left_out: LeftOut = LeftOut()


@dataclass(frozen=True)
class Contents:
    """What a reader hands over for packing.

    `labels` holds int64 (N,) per split. `blocks` yields (split, positions, pixels), pixels uint8
    (n, H, W, 3), in any order, every position once but for those that `account` then leaves out.
    `slow` contents are announced in a log.
    """

    classes: tuple[str, ...]
    labels: dict[str, np.ndarray]
    blocks: Iterator[Block]
    slow: bool = False
    account: Account | None = None


def fingerprint(*parts: Any) -> str:
    """Return the sha256 (hex) of plain values, for the key of a cache entry."""
    text = json.dumps([FORMAT, *parts], separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def load_packed(name: str, key: str) -> Dataset | None:
    """Return the dataset of the cache entry `key`, or None if there is none or it is damaged."""
    entry = cache_dir() / key
    return _load(name, entry) if entry.exists() else None


def pack(
    name: str,
    key: str,
    read: Callable[[], Contents],
    stale: Callable[[LeftOut], bool] = lambda left_out: False,
) -> Dataset:
    """Return the dataset of the cache entry `key`; `read` is called only to build the entry, and
    again where `stale` says of what it left out that this has changed.

    Raises DataError for labels out of range, fewer than two classes, an empty split, blocks that
    miss a position, and a full disk.
    """
    cache = cache_dir()
    entry = cache / key
    if (dataset := load_packed(name, key)) is not None:
        if not stale(dataset.left_out):
            return dataset
        _discard(entry)
    remove_stale(cache)
    temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{key[:16]}-", dir=cache))
    try:
        _write(temporary, read())
        return _publish(name, temporary, entry)
    except OSError as error:
        raise DataError(f"cannot pack {name} into {cache}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _publish(name: str, temporary: Path, entry: Path) -> Dataset:
    """Rename a finished entry to its name, unless another process was first with a good one."""
    for _ in range(10):
        with contextlib.suppress(OSError):
            temporary.rename(entry)
        if (dataset := _load(name, entry)) is not None:
            return dataset
        _discard(entry)
    raise DataError(f"cannot write the cache entry {entry}; remove it and start again")


def _discard(entry: Path) -> None:
    """Remove an entry, at once for every other process; those that have it mapped keep it."""
    aside = Path(tempfile.mkdtemp(prefix=".tmp-damaged-", dir=entry.parent))
    with contextlib.suppress(OSError):
        entry.rename(aside / "entry")
    shutil.rmtree(aside, ignore_errors=True)


def remove_stale(cache: Path) -> None:
    """Remove what a killed process left unfinished in the cache folder long ago."""
    for path in cache.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _load(name: str, entry: Path) -> Dataset | None:
    """Map an entry into memory; None, with a warning, if a file is missing, cut or altered."""
    try:
        meta = load_json(entry / "meta.json")
        found = {
            split: Images(
                _map(entry / f"{split}.pixels.npy", np.uint8, shape),
                np.array(_map(entry / f"{split}.labels.npy", np.int64, shape[:1])),
            )
            for split, shape in meta["shapes"].items()
        }
        classes = tuple(meta["classes"])
        for images in found.values():
            if images.labels.min() < 0 or images.labels.max() >= len(classes):
                raise ValueError("labels out of range")
        bad = tuple((str(path), str(reason)) for path, reason in meta["bad"])
        return Dataset(
            name,
            classes,
            found["train"],
            found["test"],
            found.get("val"),
            str(meta["digest"]),
            LeftOut(bad, int(meta["grey"]), tuple(map(str, meta["unread"]))),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        _warn_damaged(entry, first_line(error))
        return None


@functools.cache
def _warn_damaged(entry: Path, reason: str) -> None:
    """Warn once in a process: one start may look for an entry several times."""
    log.warning("cache entry %s is damaged (%s); it is built again", entry, reason)


def _map(path: Path, dtype: Any, shape: Sequence[int]) -> np.ndarray:
    # copy-on-write: torch takes the array without a copy, and no write reaches the file
    array = np.load(path, mmap_mode="c", allow_pickle=False)
    if array.dtype != dtype or list(array.shape) != list(shape):
        raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, expected {shape}")
    if path.stat().st_size != array.offset + array.nbytes:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes")
    return array


def _write(folder: Path, contents: Contents) -> None:
    check_labels(contents.classes, contents.labels)
    sides = _write_pixels(folder, contents)
    labels, left_out = contents.labels, LeftOut()
    if contents.account is not None:
        left_out = contents.account.left_out
        labels = _close_gaps(folder, contents.labels, contents.account.kept, sides)
    for split, numbers in labels.items():
        _save(folder / f"{split}.labels.npy", numbers)
    meta = {
        "shapes": {split: [len(numbers), *sides, 3] for split, numbers in labels.items()},
        "classes": contents.classes,
        "digest": _digest(folder, contents, labels, sides),
        "bad": left_out.bad,
        "grey": left_out.grey,
        "unread": left_out.unread,
    }
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())


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


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _write_pixels(folder: Path, contents: Contents) -> tuple[int, int]:
    """Write every block at its place with file writes: a full disk is an error, where a write
    through a memory map would kill the process. Return height and width."""
    counts = {split: len(labels) for split, labels in contents.labels.items()}
    missing = {split: np.ones(count, dtype=bool) for split, count in counts.items()}
    sides: tuple[int, int] | None = None
    with contextlib.ExitStack() as stack:
        files: dict[str, tuple[Any, int]] = {}
        bar = progress_bar("packing images", sum(counts.values()), announce=contents.slow)
        advance = stack.enter_context(bar)
        for split, positions, pixels in contents.blocks:
            if sides is None:
                sides = (pixels.shape[1], pixels.shape[2])
                _check_space(folder, sum(counts.values()), sides, contents.account is not None)
                for name, count in counts.items():
                    file = stack.enter_context(open(folder / f"{name}.pixels.npy", "wb"))
                    files[name] = (file, _header(file, (count, *sides, 3)))
            file, start = files[split]
            _put(file, start, positions, pixels)
            missing[split][positions] = False
            advance(len(positions))
        for file, _ in files.values():
            file.flush()
            os.fsync(file.fileno())
    for split, left in missing.items():
        if contents.account is not None:
            left &= contents.account.kept[split]
        if left.any():
            raise DataError(f"{int(left.sum())} of {counts[split]} {split} images are missing")
    if sides is None:
        raise DataError("no images")
    return sides


def _check_space(folder: Path, images: int, sides: tuple[int, int], sized: bool) -> None:
    """Raise DataError for a disk without room. sized: whether --image-size makes a difference."""
    (height, width), free = sides, shutil.disk_usage(folder).free
    needed = images * height * width * 3
    if free < needed:
        smaller = "give a smaller --image-size, " if sized else ""
        raise DataError(
            f"cache folder {folder.parent}: {needed} bytes needed for {images} images of {width} x "
            f"{height} pixels, {free} free; {smaller}free some or set FASTCNN_CACHE to a folder on "
            "another disk"
        )


def _header(file: Any, shape: tuple[int, ...]) -> int:
    """Write a .npy header of uint8 `shape`; return its length in bytes."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return int(file.tell())


def _put(file: Any, start: int, positions: Sequence[int], pixels: np.ndarray) -> None:
    """Write images at their positions, a run of consecutive positions in one go."""
    pixels = np.ascontiguousarray(pixels)
    breaks = np.flatnonzero(np.diff(np.asarray(positions)) != 1) + 1
    for run in np.split(np.arange(len(positions)), breaks):
        file.seek(start + int(positions[run[0]]) * pixels[0].size)
        file.write(pixels[run[0] : run[-1] + 1].data)


def _close_gaps(
    folder: Path,
    labels: dict[str, np.ndarray],
    kept: dict[str, np.ndarray],
    sides: tuple[int, int],
) -> dict[str, np.ndarray]:
    """Move the kept images of every split together, in place; return their labels."""
    for split, keep in kept.items():
        if keep.all():
            continue
        size = sides[0] * sides[1] * 3
        with open(folder / f"{split}.pixels.npy", "r+b") as file:
            # as long as the first one: NumPy leaves room for any number of images
            start = _header(file, (int(keep.sum()), *sides, 3))
            to = start
            for low, high in _runs(np.flatnonzero(keep), max(1, COPIED_BYTES // size)):
                file.seek(start + low * size)
                part = file.read((high - low) * size)
                file.seek(to)
                to += file.write(part)
            file.truncate(to)
            file.flush()
            os.fsync(file.fileno())
    return {split: numbers[kept[split]] for split, numbers in labels.items()}


def _runs(positions: np.ndarray, longest: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges [low, high) of consecutive numbers that rising `positions` are made of."""
    for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
        for at in range(0, len(run), longest):
            part = run[at : at + longest]
            yield int(part[0]), int(part[-1]) + 1


def _digest(
    folder: Path, contents: Contents, labels: dict[str, np.ndarray], sides: tuple[int, int]
) -> str:
    if contents.account is not None:
        kept, hashes = contents.account.kept, contents.account.hashes
        held = {split: hashes[split][kept[split]] for split in hashes}
        return digest_of_files(contents.classes, labels, held, sides, contents.account.view)
    digest = hashlib.sha256(json.dumps(contents.classes).encode())
    for split in SPLITS:
        if split in contents.labels:
            for part in ("pixels", "labels"):
                array = np.load(folder / f"{split}.{part}.npy", mmap_mode="r")
                digest.update(f"{split} {part} {array.shape}".encode())
                digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def digest_of_files(
    classes: Sequence[str],
    labels: dict[str, np.ndarray],
    hashes: dict[str, np.ndarray],
    sides: tuple[int, int],
    view: str,
) -> str:
    """Return a Dataset's digest (hex) from its files: packed or not, in a folder or an archive.

    labels: int64 (N,) per split; hashes: uint8 (N, 32), sha256 of each file's bytes; sides: height
    and width of the images as evaluation sees them; view: how they are brought to that (--resize).
    """
    digest = hashlib.sha256(json.dumps([list(classes), list(sides), view]).encode())
    for split in SPLITS:
        if split in labels:
            digest.update(f"{split} {len(labels[split])}".encode())
            digest.update(hashes[split].tobytes() + labels[split].astype(np.int64).tobytes())
    return digest.hexdigest()
