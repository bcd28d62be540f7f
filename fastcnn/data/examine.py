"""One encoded image after the other, decoded and measured: for the store and for the scan alike."""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch

from fastcnn.config import DataConfig
from fastcnn.data.decode import (
    BadImageError,
    decode,
    decoded_bytes,
    no_warnings,
    resize_box,
    whole_boxes,
)
from fastcnn.data.sources.base import Encoded

# What one task of a thread examines: enough to make the hand-over cheap, little enough to keep few
# decoded images in memory
CHUNK = 64  # images
CHUNK_BYTES = 1 << 20  # encoded
CHUNK_PIXELS = 1 << 26  # bytes decoded that a task may keep; a single image may have more
FLIGHT_PIXELS = 1 << 29  # bytes decoded, of all tasks together; a kilobyte may become 268 MB
# Small files cost more Python than decoding, and threads only fight for the interpreter's lock:
# 10.0 k CIFAR JPEGs/s with one thread, 6.8 k with two (60,000 files packed, 2 cores, 2026-11-21)
THREADED_BYTES = 16_384
SUMMED_PIXELS = 1 << 16  # at a time: a large image would become eight times as large as floats

Result = TypeVar("Result")


@dataclass(frozen=True)
class View:
    """What evaluation sees of an image: `side` pixels a side, None: its own size; `resize` as the
    option."""

    side: int | None
    resize: str

    @classmethod
    def of(cls, config: DataConfig) -> "View":
        """The view that the options ask for; without --image-size, --resize has no say."""
        return cls(config.image_size, config.resize if config.image_size else "stretch")

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return uint8 (h, w, 3) of an image uint8 (H, W, 3)."""
        if self.side is None or pixels.shape[:2] == (self.side, self.side):
            return pixels
        box = whole_boxes(np.array([pixels.shape[:2]]), self.resize)[0]
        return resize_box(pixels, box, (self.side, self.side))


@dataclass(frozen=True)
class Record:
    """What is known of an image.

    reason: why it cannot be read, else ""; then only `sha256` may hold. sha256: of its bytes, b""
    if even these could not be read. shape: height and width, upright. sums: float64 (6,), of each
    channel the sum of pixels and of squared pixels of what evaluation sees, exact. pixels: that,
    uint8 (h, w, 3), if it was asked for.
    """

    reason: str
    sha256: bytes = b""
    shape: tuple[int, int] = (0, 0)
    grey: bool = False
    plain: bool = False
    sums: np.ndarray | None = None
    pixels: np.ndarray | None = None


def cores() -> int:
    """Return how many cores this process may use: the threads of the scan, and DALI's."""
    return len(os.sched_getaffinity(0))


def examine(read: Callable[[], bytes], view: View, keep_pixels: bool) -> Record:
    """Read an image, decode it and keep the pixels that evaluation sees or, for a scan, their sums
    alone."""
    digest = b""
    try:
        data = read()
        digest = hashlib.sha256(data).digest()
        decoded = decode(data)
    except BadImageError as error:
        return Record(str(error) or "unreadable", digest)
    seen = view(decoded.pixels)
    height, width = decoded.pixels.shape[:2]
    sums, pixels = (None, seen) if keep_pixels else (channel_sums(seen), None)
    return Record("", digest, (height, width), decoded.grey, decoded.plain, sums, pixels)


def channel_sums(pixels: np.ndarray) -> np.ndarray:
    """Return float64 (6,) of uint8 (h, w, 3): red, green and blue summed, then their squares.

    Exact, for float64 holds whole numbers up to 2^53.
    """
    flat, sums = pixels.reshape(-1, 3), np.zeros(6)
    for start in range(0, len(flat), SUMMED_PIXELS):
        values = torch.from_numpy(flat[start : start + SUMMED_PIXELS].astype(np.float64))
        sums[:3] += values.sum(0).numpy()
        sums[3:] += values.square_().sum(0).numpy()
    return sums


def examine_all(
    sources: Iterable[Encoded], view: View, mean_bytes: float, keep_pixels: bool
) -> Iterator[list[tuple[Encoded, Record]]]:
    """Yield a few images at a time, in order, examined in threads where files are large enough to
    gain by it; few are in memory at once, however many pixels the files unpack to."""
    threads = cores() if mean_bytes >= THREADED_BYTES else 1
    most = max(1, min(CHUNK, int(CHUNK_BYTES / max(mean_bytes, 1))))
    with no_warnings():
        if threads == 1:
            yield from _in_turn(sources, view, keep_pixels, most)
        else:
            yield from _in_threads(_chunks(sources, most), view, keep_pixels, threads)


def _in_turn(
    sources: Iterable[Encoded], view: View, keep_pixels: bool, most: int
) -> Iterator[list[tuple[Encoded, Record]]]:
    chunk: list[tuple[Encoded, Record]] = []
    held = 0
    for source in sources:
        record = examine(source.read, view, keep_pixels)
        chunk.append((source, record))
        held += 0 if record.pixels is None else record.pixels.nbytes
        if len(chunk) == most or held >= CHUNK_PIXELS:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


class Loaded(NamedTuple):
    """A source whose bytes, or why there are none, `read` holds, and what they unpack to."""

    source: Encoded
    read: Callable[[], bytes]
    decoded_bytes: int


def _in_threads(
    chunks: Iterator[list[Encoded]], view: View, keep_pixels: bool, threads: int
) -> Iterator[list[tuple[Encoded, Record]]]:
    """Read in threads, whose files' headers tell what decoding takes; then decode in threads as
    much at once as FLIGHT_PIXELS allows."""
    with ThreadPoolExecutor(threads) as executor:
        reads = ((0, partial(_read_chunk, chunk)) for chunk in chunks)
        tasks = (
            (size, partial(_examine_chunk, part, view, keep_pixels))
            for chunk in _ahead(executor, reads, threads)
            for part, size in _parts(chunk, view, keep_pixels)
        )
        yield from _ahead(executor, tasks, 2 * threads)


def _ahead(
    executor: Executor, tasks: Iterable[tuple[int, Callable[[], Result]]], most: int
) -> Iterator[Result]:
    """Yield what tasks, each of so many bytes, return, in order: at most `most` of them and, but
    for a single one, FLIGHT_PIXELS bytes are ahead."""
    running: deque[tuple[int, Future[Result]]] = deque()
    held = 0
    for size, task in tasks:
        while running and (len(running) >= most or held + size > FLIGHT_PIXELS):
            done = running[0][0]
            yield running.popleft()[1].result()
            held -= done
        running.append((size, executor.submit(task)))
        held += size
    while running:
        yield running.popleft()[1].result()


def _read_chunk(chunk: list[Encoded]) -> list[Loaded]:
    return [_loaded(source) for source in chunk]


def _loaded(source: Encoded) -> Loaded:
    try:
        data = source.read()
    except BadImageError as error:
        return Loaded(source, partial(_raise, error), 0)
    return Loaded(source, lambda: data, decoded_bytes(data))


def _raise(error: BadImageError) -> bytes:
    raise error


def _parts(
    chunk: list[Loaded], view: View, keep_pixels: bool
) -> Iterator[tuple[list[Loaded], int]]:
    """Cut a chunk where it would keep more than CHUNK_PIXELS; yield its parts, and the bytes that
    each holds at most: what it keeps, and its largest image beside."""
    part: list[Loaded] = []
    kept = largest = 0
    for loaded in chunk:
        seen = loaded.decoded_bytes if view.side is None else view.side * view.side * 3
        size = seen if keep_pixels else 0
        if part and kept + size > CHUNK_PIXELS:
            yield part, kept + largest
            part, kept, largest = [], 0, 0
        part.append(loaded)
        kept += size
        largest = max(largest, loaded.decoded_bytes)
    if part:
        yield part, kept + largest


def _examine_chunk(
    chunk: list[Loaded], view: View, keep_pixels: bool
) -> list[tuple[Encoded, Record]]:
    return [(item.source, examine(item.read, view, keep_pixels)) for item in chunk]


def _chunks(sources: Iterable[Encoded], size: int) -> Iterator[list[Encoded]]:
    chunk: list[Encoded] = []
    for source in sources:
        chunk.append(source)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
