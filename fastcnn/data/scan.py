"""The scan: each image decoded once, before the first epoch, and what was seen is kept.

Of image files, a file of the cache folder holds the records of a folder, one for every image, so
that only new and changed files are examined again. It is replaced whole.
"""

import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastcnn.cache import cache_dir, fingerprint, remove_stale
from fastcnn.data.decode import BadImageError, decode, no_warnings, resize
from fastcnn.data.examine import Record, View, examine_all
from fastcnn.data.images import LeftOut
from fastcnn.data.progress import SLOW_IMAGES, progress_bar
from fastcnn.data.sources.base import Block, Contents, Encoded, Stamp, read_whole
from fastcnn.text import first_line

log = logging.getLogger(__name__)

RULES = 2  # of what decode.py reads and calls plain; part of the file's name
ARRAYS = ("shapes", "sums", "grey", "plain", "hashes")  # of a Scan, one row an image

Chunk = list[tuple[Encoded, Record]]


@dataclass(frozen=True)
class Scan:
    """What is known of N encoded images, in the order of Contents.names.

    shapes: int32 (N, 2), height and width, upright. sums: float64 (N, 6), as Record's, but for
    images whose pixels are kept. grey, plain: bool (N,). hashes: uint8 (N, 32), sha256 of the
    bytes; zeros where they could not be read. reasons: why an image cannot be read, by its
    position; the other arrays hold zeros there.
    """

    shapes: np.ndarray
    sums: np.ndarray
    grey: np.ndarray
    plain: np.ndarray
    hashes: np.ndarray
    reasons: dict[int, str]

    @classmethod
    def of_nothing(cls, count: int) -> "Scan":
        """Room for `count` images."""
        return cls(
            np.zeros((count, 2), np.int32),
            np.zeros((count, 6)),
            np.zeros(count, bool),
            np.zeros(count, bool),
            np.zeros((count, 32), np.uint8),
            {},
        )

    def put(self, position: int, record: Record) -> None:
        """Note what was found out about an image."""
        if record.sha256:
            self.hashes[position] = np.frombuffer(record.sha256, np.uint8)
        if record.reason:
            self.reasons[position] = record.reason
            return
        self.shapes[position] = record.shape
        self.grey[position], self.plain[position] = record.grey, record.plain
        if record.sums is not None:
            self.sums[position] = record.sums


@dataclass(frozen=True)
class Scanning:
    """A scan under way: `found` is whole once `chunks`, what is examined now, are at their end.
    `blocks`: the images of a source that has nothing to decode. All as `view` shows them."""

    contents: Contents
    view: View
    found: Scan
    chunks: Generator[Chunk]
    blocks: Iterator[Block]

    def finish(self) -> Scan:
        """Examine what is left, and return what is known of all images."""
        for _ in self.chunks:
            pass
        return self.found


def scan_images(contents: Contents, view: View, keep_pixels: bool) -> Scanning:
    """Begin the scan of what is in a source.

    keep_pixels: for the store; else their sums are taken, and of files only those are examined
    whose stamps are not known from before. However that ends, what was examined is kept.
    """
    if contents.stamps is not None and not keep_pixels:
        found, chunks = _scan_files(contents, contents.stamps, view)
    else:
        found = Scan.of_nothing(len(contents))
        chunks = _examined(contents, contents.images(), found, view, keep_pixels)
        if not keep_pixels:
            chunks = _with_bar(chunks, len(contents))
    return Scanning(contents, view, found, chunks, _resized(contents.blocks, view))


def _examined(
    contents: Contents, images: Iterable[Encoded], found: Scan, view: View, keep_pixels: bool
) -> Generator[Chunk]:
    """Yield a few images at a time, whose records are in `found` by then."""
    first = {split: int(at[0]) for split, at in contents.by_split(np.arange(len(contents))).items()}
    for records in examine_all(images, view, contents.mean_bytes, keep_pixels):
        for image, record in records:
            found.put(first[image.split] + image.position, record)
        yield records


def _with_bar(chunks: Iterable[Chunk], count: int) -> Generator[Chunk]:
    with progress_bar("examining images", count, announce=count > SLOW_IMAGES) as advance:
        for records in chunks:
            yield records
            advance(len(records))


def _resized(blocks: Iterable[Block], view: View) -> Iterator[Block]:
    for split, positions, pixels in blocks:
        yield split, positions, resize(pixels, view.side) if view.side else pixels


def first_sides(contents: Contents, view: View) -> tuple[int, int]:
    """Return height and width of a batch's images: those of `view`, or of the first image that can
    be read; (1, 1) if none can, which is refused later, by name."""
    if view.side:
        return view.side, view.side
    with no_warnings():
        for image in contents.images():
            with contextlib.suppress(BadImageError):
                height, width, _ = decode(image.read()).pixels.shape
                return height, width
    return 1, 1


def is_readable_now(contents: Contents, left_out: LeftOut) -> bool:
    """Return whether bytes can be read that could not be read when a folder was packed: under the
    same stamp, as after a fault of a network's disk. The scan tries such files again too."""
    stamps = contents.stamps or {}
    for path in left_out.unread:
        with contextlib.suppress(BadImageError):
            read_whole(contents.where / path, stamps[path][0])
            return True
    return False


def _scan_files(
    contents: Contents, stamps_by_path: dict[str, Stamp], view: View
) -> tuple[Scan, Generator[Chunk]]:
    key = fingerprint("scan", RULES, str(contents.where.resolve()), view.side, view.resize)
    cached = cache_dir() / f"{key}.scan.npz"
    names = contents.names
    stamps = np.array([stamps_by_path[name] for name in names], dtype=np.int64).reshape(-1, 3)
    found, missing = _recall(cached, names, stamps)

    def examine_missing() -> Generator[Chunk]:
        if not missing:
            return
        wanted = set(missing)
        images = (image for at, image in enumerate(contents.images()) if at in wanted)
        examined = 0
        chunks = _examined(contents, images, found, view, False)
        try:
            for records in _with_bar(chunks, len(missing)):
                examined += len(records)
                yield records
        finally:
            if examined:  # rows without a hash, of files not reached, are examined next time
                _keep(cached, names, stamps, found)
        reasons = sorted(found.reasons.items())
        found.reasons.clear()
        found.reasons.update(reasons)

    return found, examine_missing()


def _recall(cached: Path, names: Sequence[str], stamps: np.ndarray) -> tuple[Scan, list[int]]:
    """Return what is known from before of files whose stamps are the same, and the positions of
    the other files."""
    found = Scan.of_nothing(len(names))
    before = _load(cached) if cached.exists() else None
    if before is None:
        return found, list(range(len(names)))
    known, old_names, old_stamps = before
    places = {name: place for place, name in enumerate(old_names)}
    at = np.array([places.get(name, -1) for name in names], dtype=np.int64)
    # what could not be read has no hash; it may be readable now under the same stamp
    same = (at >= 0) & (old_stamps[at] == stamps).all(1) & known.hashes[at].any(1)
    here, there = np.flatnonzero(same), at[same]
    for name in ARRAYS:
        getattr(found, name)[here] = getattr(known, name)[there]
    for position, place in zip(here.tolist(), there.tolist(), strict=True):
        if place in known.reasons:
            found.reasons[position] = known.reasons[place]
    return found, np.flatnonzero(~same).tolist()


def _load(cached: Path) -> tuple[Scan, list[str], np.ndarray] | None:
    """Return records, names and stamps of a file of the cache; None, with a warning, if it is
    damaged."""
    try:
        with np.load(cached, allow_pickle=False) as held:
            names = _lines(held["names"])
            bad, reasons = held["bad"].tolist(), _lines(held["reasons"])
            count, stamps = len(names), held["stamps"]
            arrays = {name: held[name] for name in ARRAYS}
            known = Scan(**arrays, reasons=dict(zip(bad, reasons, strict=True)))
        if not names:
            raise ValueError("it holds no files")
        expected = Scan.of_nothing(count)
        for name in ARRAYS:
            array, wanted = getattr(known, name), getattr(expected, name)
            if array.shape != wanted.shape or array.dtype != wanted.dtype:
                raise ValueError(f"{name}: {array.dtype} {array.shape}, expected {wanted.shape}")
        if stamps.shape != (count, 3) or stamps.dtype != np.int64:
            raise ValueError(f"stamps: {stamps.dtype} {stamps.shape}")
        return known, names, stamps
    except Exception as error:  # a damaged archive may raise anything
        log.warning(
            "scan %s is damaged (%s); the images are examined again", cached, first_line(error)
        )
        return None


def _keep(cached: Path, names: Sequence[str], stamps: np.ndarray, found: Scan) -> None:
    """Replace the file of the cache; if that fails, the next start examines the images again."""
    remove_stale(cached.parent)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-scan-", dir=cached.parent))
    try:
        with open(temporary / "scan.npz", "wb") as file:
            np.savez(
                file,
                names=_text(names),
                stamps=stamps,
                bad=np.array(list(found.reasons), dtype=np.int64),
                reasons=_text(list(found.reasons.values())),
                **{name: getattr(found, name) for name in ARRAYS},
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary / "scan.npz", cached)
    except OSError as error:
        reason = error.strerror or error
        log.warning("cannot keep the scan in %s (%s); it is done again next time", cached, reason)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _text(lines: Sequence[str]) -> np.ndarray:
    """Return texts as one array uint8, which is far smaller than one of fixed widths."""
    joined = "".join(f"{line}\0" for line in lines)
    return np.frombuffer(joined.encode("utf-8", "surrogateescape"), np.uint8)


def _lines(text: np.ndarray) -> list[str]:
    """The inverse of _text."""
    return text.tobytes().decode("utf-8", "surrogateescape").split("\0")[:-1]
