"""A folder of images (layouts: listing.py), decoded once into the store."""

import os
import stat
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from fastcnn.config import DataConfig
from fastcnn.data.decode import EXTENSIONS, BadImageError, decode
from fastcnn.data.geometry import resize_box, whole_boxes
from fastcnn.data.listing import Layout, find_layout
from fastcnn.data.store import Block, Contents, Dataset, fingerprint, log, pack
from fastcnn.errors import DataError

MAX_FILE_BYTES = 1 << 30
CHUNK = 64  # images a task: enough to make the hand-over cheap
NAMED_BAD = 3  # unreadable files that an error names
# Small files cost more Python than decoding, and threads only fight for the interpreter's lock:
# 10.0 k CIFAR JPEGs/s with one thread, 6.8 k with two (60,000 files packed, 2 cores, 2026-11-21)
THREADED_BYTES = 16_384
SLOW_IMAGES = 5000  # more are announced in a log: packing them may take a minute

# Bytes, mtime and ctime in ns; the ctime tells of contents replaced under an old mtime (cp -p)
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Source:
    """One image to decode: where it goes, its path for messages, and how to read its bytes."""

    split: str
    position: int
    path: str
    read: Callable[[], bytes]


def load_folder(path: Path, config: DataConfig, device: torch.device) -> Dataset:
    """Read an image folder. Raises DataError for whatever listing.py refuses, for files that
    cannot be decoded (all are tried, the first few named) and for images of different sizes."""
    files, folders = list_folder(path)
    layout = find_layout(str(path), files, folders, config.test_fraction)
    warn_ignored(path, layout)
    return load_layout(path, files, layout, config, device)


def load_layout(
    path: Path, files: dict[str, Stamp], layout: Layout, config: DataConfig, device: torch.device
) -> Dataset:
    """Pack the images of `layout`."""
    used = [
        [split, item, files[item]] for split, items in layout.splits.items() for item, _ in items
    ]
    # unpacked archives and copies may agree in names, sizes and times: the path tells them apart
    resolved = path.resolve()
    key = fingerprint("folder", str(resolved), used, layout.classes, config.image_size)
    return pack(
        path.name or resolved.name, key, partial(_contents, path, files, layout, config.image_size)
    )


def list_folder(path: Path) -> tuple[dict[str, Stamp], list[str]]:
    """Return {file's relative path: stamp} and the relative paths of folders.

    Links are followed, but not back into a folder above. Raises DataError where the listing fails.
    """
    files: dict[str, Stamp] = {}
    folders: list[str] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    try:
        while waiting:
            inner, above = waiting.pop()
            here = os.stat(path / inner)
            identity = (here.st_dev, here.st_ino)
            if identity in above:
                continue
            for entry in os.scandir(path / inner):
                if entry.name.startswith("."):
                    continue
                relative = f"{inner}/{entry.name}" if inner else entry.name
                status = _status(entry)
                if stat.S_ISDIR(status.st_mode):
                    folders.append(relative)
                    waiting.append((relative, above | {identity}))
                elif stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                    files[relative] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except OSError as error:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error
    return files, folders


def _status(entry: "os.DirEntry[str]") -> os.stat_result:
    """Follow a link; of a broken link to an image return its own status, so that decoding names it
    among the unreadable files. Any other broken link may stand for a class: that is an error."""
    try:
        return entry.stat()
    except OSError as error:
        own = entry.stat(follow_symlinks=False)
        if not stat.S_ISLNK(own.st_mode):
            raise
        if PurePath(entry.name).suffix.lower() in EXTENSIONS:
            return own
        raise DataError(
            f"{entry.path}: broken link ({error.strerror}); mend or remove it"
        ) from error


def warn_ignored(path: Path, layout: Layout) -> None:
    if layout.ignored:
        noun = "file" if layout.ignored == 1 else "files"
        log.warning("%s: %d %s left out: not images of a class", path, layout.ignored, noun)


def _contents(
    root: Path, files: dict[str, Stamp], layout: Layout, image_size: int | None
) -> Contents:
    sources = (
        Source(split, position, path, partial(_read_file, root / path, files[path][0]))
        for split, items in layout.splits.items()
        for position, (path, _) in enumerate(items)
    )
    mean_bytes = sum(size for size, _, _ in files.values()) / len(files)
    return decoded_contents(root, layout, sources, image_size, mean_bytes)


def _read_file(path: Path, size: int) -> bytes:
    # read, never mapped: a file cut while it is read is then an error, not a SIGBUS
    if size > MAX_FILE_BYTES:
        raise BadImageError(f"{size} bytes, over {MAX_FILE_BYTES}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImageError(error.strerror or str(error)) from error
    if len(data) != size:
        raise BadImageError(f"changed while it was read: {size} bytes, then {len(data)}")
    return data


def decoded_contents(
    root: Path,
    layout: Layout,
    sources: Iterable[Source],
    image_size: int | None,
    mean_bytes: float,
) -> Contents:
    """Decode `sources` for the store, in threads where files are large enough to gain by it."""
    threads = len(os.sched_getaffinity(0)) if mean_bytes >= THREADED_BYTES else 1
    labels = {
        split: np.array([label for _, label in items], dtype=np.int64)
        for split, items in layout.splits.items()
    }
    blocks = _blocks(root, sources, image_size, threads)
    slow = sum(map(len, labels.values())) > SLOW_IMAGES
    return Contents(layout.classes, labels, _without_bomb_warnings(blocks), slow)


def _without_bomb_warnings(blocks: Iterator[Block]) -> Iterator[Block]:
    """Leave Pillow's warning of large images out: such an image is an error here."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield from blocks


def _blocks(
    root: Path, sources: Iterable[Source], image_size: int | None, threads: int
) -> Iterator[Block]:
    bad: list[tuple[str, str]] = []
    first: tuple[str, tuple[int, ...]] | None = None
    for chunk, images in _decoded(sources, image_size, threads):
        good: dict[str, list[tuple[int, np.ndarray]]] = {}
        for source, image in zip(chunk, images, strict=True):
            if isinstance(image, str):
                bad.append((source.path, image))
                continue
            first = first or (source.path, image.shape)
            if image.shape != first[1]:
                raise DataError(_odd_size(root, first, (source.path, image.shape)))
            good.setdefault(source.split, []).append((source.position, image))
        for split, pairs in good.items():
            yield (
                split,
                [position for position, _ in pairs],
                np.stack([image for _, image in pairs]),
            )
    if bad:
        named = "; ".join(f"{path}: {reason}" for path, reason in bad[:NAMED_BAD])
        more = f"; and {len(bad) - NAMED_BAD} more" if len(bad) > NAMED_BAD else ""
        noun, them = ("file", "it") if len(bad) == 1 else ("files", "them")
        raise DataError(
            f"{root}: {len(bad)} unreadable image {noun}: {named}{more}; replace or remove {them}"
        )


def _odd_size(root: Path, first: tuple[str, Any], odd: tuple[str, Any]) -> str:
    (path, (height, width, _)), (odd_path, (odd_height, odd_width, _)) = first, odd
    return (
        f"{root}: images of different sizes: {odd_path} has {odd_width} x {odd_height} pixels, "
        f"{path} {width} x {height}; give one size with --image-size, e.g. "
        f"--image-size {min(height, width)}"
    )


Decoded = tuple[list[Source], list[np.ndarray | str]]


def _decoded(sources: Iterable[Source], image_size: int | None, threads: int) -> Iterator[Decoded]:
    """Yield chunks in order, decoded; of an unreadable image, the reason as text."""
    if threads == 1:
        for chunk in _chunks(sources):
            yield chunk, _decode_chunk(chunk, image_size)
        return
    running: deque[tuple[list[Source], Future[list[np.ndarray | str]]]] = deque()
    with ThreadPoolExecutor(threads) as executor:
        for chunk in _chunks(sources):
            running.append((chunk, executor.submit(_decode_chunk, chunk, image_size)))
            if len(running) > 2 * threads:
                done, future = running.popleft()
                yield done, future.result()
        for done, future in running:
            yield done, future.result()


def _chunks(sources: Iterable[Source]) -> Iterator[list[Source]]:
    chunk: list[Source] = []
    for source in sources:
        chunk.append(source)
        if len(chunk) == CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _decode_chunk(chunk: list[Source], image_size: int | None) -> list[np.ndarray | str]:
    images: list[np.ndarray | str] = []
    for source in chunk:
        try:
            images.append(_fitted(decode(source.read()).pixels, image_size))
        except BadImageError as error:
            images.append(str(error))
    return images


def _fitted(pixels: np.ndarray, image_size: int | None) -> np.ndarray:
    if image_size is None:
        return pixels
    box = whole_boxes(np.array([pixels.shape[:2]]), "stretch")[0]
    return resize_box(pixels, box, (image_size, image_size))
