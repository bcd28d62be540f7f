"""The store: uint8 NHWC arrays, packed once into the cache folder, or the images' own files.

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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcnn.cache import cache_dir, fingerprint, remove_stale
from fastcnn.config import DataConfig
from fastcnn.data.examine import View
from fastcnn.data.images import Dataset, Files, Images, LeftOut
from fastcnn.data.progress import SLOW_IMAGES, progress_bar
from fastcnn.data.scan import Scanning
from fastcnn.data.select import Selection
from fastcnn.data.sources.base import SPLITS, Source, check_labels
from fastcnn.errors import DataError
from fastcnn.files import load_json
from fastcnn.text import first_line

log = logging.getLogger(__name__)

COPIED_BYTES = 1 << 24  # at a time, where images move together


def key_of(source: Source, config: DataConfig) -> str:
    """Return the key under which the images of a source are packed.

    --on-bad-image is no part of it: of the same files the same ones are unreadable.
    """
    view = View.of(config)
    return fingerprint(*source.identity([view.side, view.resize, config.grayscale]))


def is_packed(config: DataConfig, source: Source) -> bool:
    """Return whether the images of a source are packed already."""
    return load_packed(source.name, key_of(source, config)) is not None


def leave_in_files(name: str, selection: Selection) -> Dataset:
    """Return the dataset of images that stay where they are. Raises DataError as select_images."""
    for _ in selection.blocks:
        pass  # the scan goes on as they are asked for
    scanning = selection.scanning
    assert scanning is not None
    contents, found, stamps = scanning.contents, scanning.found, scanning.contents.stamps or {}
    whole = Files(
        root=contents.where,
        paths=np.array(contents.names),
        labels=np.concatenate(list(contents.labels.values())),
        stamps=np.array([stamps[path] for path in contents.names], dtype=np.int64),
        hashes=found.hashes,
        shapes=found.shapes,
        sums=found.sums,
        plain=found.plain,
        sides=selection.sides,
        resize=scanning.view.resize,
    )
    places = contents.by_split(np.arange(len(whole)))
    parts = {split: whole.take(at[selection.kept[split]]) for split, at in places.items()}
    labels = {split: part.labels for split, part in parts.items()}
    digest = _digest_of_files(scanning, selection, labels)
    train, test, val = parts["train"], parts["test"], parts.get("val")
    return Dataset(name, contents.classes, train, test, val, digest, selection.left_out)


def load_packed(name: str, key: str) -> Dataset | None:
    """Return the dataset of the cache entry `key`, or None if there is none or it is damaged."""
    entry = cache_dir() / key
    return _load(name, entry) if entry.exists() else None


def pack(
    name: str,
    key: str,
    read: Callable[[], Selection],
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


def _write(folder: Path, selection: Selection) -> None:
    check_labels(selection.classes, selection.labels)
    sides = _write_pixels(folder, selection)
    labels, left_out = _close_gaps(folder, selection, sides), selection.left_out
    for split, numbers in labels.items():
        _save(folder / f"{split}.labels.npy", numbers)
    meta = {
        "shapes": {split: [len(numbers), *sides, 3] for split, numbers in labels.items()},
        "classes": selection.classes,
        "digest": _digest(folder, selection, labels),
        "bad": left_out.bad,
        "grey": left_out.grey,
        "unread": left_out.unread,
    }
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file)
        file.flush()
        os.fsync(file.fileno())


def _save(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


def _write_pixels(folder: Path, selection: Selection) -> tuple[int, int]:
    """Write every block at its place with file writes: a full disk is an error, where a write
    through a memory map would kill the process. Return height and width."""
    counts = {split: len(labels) for split, labels in selection.labels.items()}
    missing = {split: np.ones(count, dtype=bool) for split, count in counts.items()}
    sides: tuple[int, int] | None = None
    with contextlib.ExitStack() as stack:
        files: dict[str, tuple[Any, int]] = {}
        slow = selection.scanning is not None and sum(counts.values()) > SLOW_IMAGES
        bar = progress_bar("packing images", sum(counts.values()), announce=slow)
        advance = stack.enter_context(bar)
        for split, positions, pixels in selection.blocks:
            if sides is None:
                sides = (pixels.shape[1], pixels.shape[2])
                _check_space(folder, sum(counts.values()), sides, selection.scanning is not None)
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
        left &= selection.kept.get(split, True)
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
    folder: Path, selection: Selection, sides: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Move the kept images of every split together, in place; return their labels."""
    for split, keep in selection.kept.items():
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
    kept = {split: selection.labels[split][keep] for split, keep in selection.kept.items()}
    return selection.labels | kept


def _runs(positions: np.ndarray, longest: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges [low, high) of consecutive numbers that rising `positions` are made of."""
    for run in np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1):
        for at in range(0, len(run), longest):
            part = run[at : at + longest]
            yield int(part[0]), int(part[-1]) + 1


def _digest(folder: Path, selection: Selection, labels: dict[str, np.ndarray]) -> str:
    if selection.scanning is not None:
        return _digest_of_files(selection.scanning, selection, labels)
    digest = hashlib.sha256(json.dumps(selection.classes).encode())
    for split in SPLITS:
        if split in selection.labels:
            for part in ("pixels", "labels"):
                array = np.load(folder / f"{split}.{part}.npy", mmap_mode="r")
                digest.update(f"{split} {part} {array.shape}".encode())
                digest.update(array.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def _digest_of_files(
    scanning: Scanning, selection: Selection, labels: dict[str, np.ndarray]
) -> str:
    """Return a Dataset's digest (hex) from its files: packed or not, in a folder or an archive.

    labels: int64 (N,) per split, of the images that are kept.
    """
    parts = json.dumps([selection.classes, selection.sides, scanning.view.resize])
    digest = hashlib.sha256(parts.encode())
    hashes = scanning.contents.by_split(scanning.found.hashes)
    for split in SPLITS:
        if split in labels:
            digest.update(f"{split} {len(labels[split])}".encode())
            kept = hashes[split][selection.kept[split]]
            digest.update(kept.tobytes() + labels[split].astype(np.int64).tobytes())
    return digest.hexdigest()
