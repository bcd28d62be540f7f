"""The scan of image files: each decoded once, before the first epoch, and what was seen is kept.

A file of the cache folder holds the records of a folder, one for every image file, so that only
new and changed files are examined again. It is replaced whole.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from fastcnn.cache import cache_dir
from fastcnn.data.examine import Record, Source, View, examine_all, read_whole
from fastcnn.data.files import Stamp
from fastcnn.data.progress import progress_bar
from fastcnn.data.store import SLOW_IMAGES, fingerprint, remove_stale
from fastcnn.text import first_line

log = logging.getLogger(__name__)

RULES = 2  # of what decode.py reads and calls plain; part of the file's name
ARRAYS = ("shapes", "sums", "grey", "plain", "hashes")  # of a Scan, one row a file
Check = Callable[[list[tuple[str, tuple[int, int], bool]]], None]


@dataclass(frozen=True)
class Scan:
    """What is known of N image files.

    shapes: int32 (N, 2), height and width, upright. sums: float64 (N, 6), as Record's. grey, plain:
    bool (N,). hashes: uint8 (N, 32), sha256 of the bytes; zeros where they could not be read.
    reasons: why a file cannot be read, by its position; the other arrays hold zeros there.
    """

    shapes: np.ndarray
    sums: np.ndarray
    grey: np.ndarray
    plain: np.ndarray
    hashes: np.ndarray
    reasons: dict[int, str]

    @classmethod
    def of_nothing(cls, count: int) -> "Scan":
        """Room for `count` files."""
        return cls(
            np.zeros((count, 2), np.int32),
            np.zeros((count, 6)),
            np.zeros(count, bool),
            np.zeros(count, bool),
            np.zeros((count, 32), np.uint8),
            {},
        )

    def put(self, position: int, record: Record) -> None:
        """Note what was found out about a file."""
        if record.sha256:
            self.hashes[position] = np.frombuffer(record.sha256, np.uint8)
        if record.reason:
            self.reasons[position] = record.reason
            return
        self.shapes[position], self.sums[position] = record.shape, record.sums
        self.grey[position], self.plain[position] = record.grey, record.plain


def scan(
    root: Path,
    names: Sequence[str],
    files: dict[str, Stamp],
    view: View,
    check: Check | None = None,
) -> Scan:
    """Return what is known of the files `names` below `root`, in their order; of `files`, their
    stamps count.

    check: called with path, shape and greyness of the readable files among a few that were examined
    now; it may raise. However the scan ends, what was examined is kept.
    """
    key = fingerprint("scan", RULES, str(root.resolve()), view.side, view.resize)
    cached = cache_dir() / f"{key}.scan.npz"
    stamps = np.array([files[name] for name in names], dtype=np.int64).reshape(-1, 3)
    found, missing = _recall(cached, names, stamps)
    if not missing:
        return found
    sources = (
        Source("", i, names[i], partial(read_whole, root / names[i], files[names[i]][0]))
        for i in missing
    )
    mean_bytes = float(stamps[missing, 0].mean())
    slow = len(missing) > SLOW_IMAGES
    examined = 0
    try:
        with progress_bar("examining images", len(missing), announce=slow) as advance:
            for records in examine_all(sources, view, mean_bytes, keep_pixels=False):
                for source, record in records:
                    found.put(source.position, record)
                examined += len(records)
                if check is not None:
                    check([(s.path, r.shape, r.grey) for s, r in records if not r.reason])
                advance(len(records))
    finally:
        if examined:  # rows without a hash, of files not reached, are examined next time
            _keep(cached, names, stamps, found)
    return found


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
