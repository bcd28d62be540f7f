"""The cache folder, keys of what lies there, and a lock between processes that write the same thing
into it."""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastcnn.errors import DataError
from fastcnn.files import discard

log = logging.getLogger(__name__)

FORMAT = 3  # of packed images and scans; part of every fingerprint
STALE_SECONDS = 86_400  # an unfinished entry older than this was left by a killed process
POLL_S = 0.05  # how often a process that waits for a lock looks again
_held: set[BinaryIO] = set()
# a loader's worker may outlive the process that forked it, and would hold its locks on
os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


def cache_dir() -> Path:
    """Return a folder that can be written: FASTCNN_CACHE, else XDG_CACHE_HOME/fastcnn, else
    ~/.cache/fastcnn; where that fails, a folder of this user among the temporary files.

    Raises DataError if neither can be written.
    """
    wanted = _wanted_cache()
    reason = _unwritable(wanted)
    if reason is None:
        return wanted
    try:
        other = Path(tempfile.gettempdir()) / f"fastcnn-{os.getuid()}"
        other_reason = _unwritable(other)
        if other_reason is None and other.stat().st_uid != os.getuid():
            other_reason = "belongs to another user"
    except FileNotFoundError as error:  # no place for temporary files at all
        other, other_reason = Path("TMPDIR"), str(error)
    if other_reason is not None:
        raise DataError(
            f"no cache folder: {wanted}: {reason}; {other}: {other_reason}; "
            "set FASTCNN_CACHE to a folder that can be written"
        )
    _warn_once(f"cache folder {wanted}: {reason}; using {other}")
    return other


@functools.cache
def _warn_once(text: str) -> None:
    """Log a warning, the first time that this process has it to say."""
    log.warning(text)


def _wanted_cache() -> Path:
    if named := os.environ.get("FASTCNN_CACHE"):
        return Path(named).expanduser()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "fastcnn"
    return Path("~/.cache/fastcnn").expanduser()


def _unwritable(folder: Path) -> str | None:
    """Return why nothing can be written into `folder`, or None if it can (created if missing)."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def fingerprint(*parts: Any) -> str:
    """Return the sha256 (hex) of plain values, for the key of a cache entry."""
    text = json.dumps([FORMAT, *parts], separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def remove_stale(cache: Path) -> None:
    """Remove what a killed process left unfinished in the cache folder long ago."""
    for path in cache.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


class Lock:
    """A lock that is held; `leave` hands the processes that wait for it a reason to give up."""

    def __init__(self, file: BinaryIO):
        self._file = file

    def leave(self, reason: str) -> None:
        """Write what failed, so that those who waited report it instead of trying the same."""
        self._file.write(reason.encode("utf-8", "replace"))
        self._file.flush()


class LeftBehind(Exception):
    """What the holder of a lock left for those who waited for it."""


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[Lock]:
    """Hold the lock file `path` while the block runs; it is gone afterwards.

    The kernel releases the lock of a process that dies. `waiting` is called again and again while
    another process holds it, and may raise. Raises LeftBehind with what that process left.
    """
    while True:
        file = open(path, "a+b", opener=_no_link)  # noqa: SIM115 - closed on every way out below
        try:
            _held.add(file)
            _acquire(file, waiting)
            if not _is_current(file, path):
                # its holder has removed it: a lock on it keeps nobody out
                file.seek(0)
                if reason := file.read().decode("utf-8", "replace"):
                    raise LeftBehind(reason)
                continue
            file.truncate(0)
            try:
                yield Lock(file)
            finally:
                # before the lock is released, so that no one can lock a file about to go
                discard(path)
                # closing is not enough where a forked child has the file open too
                fcntl.flock(file, fcntl.LOCK_UN)
            return
        finally:
            _held.discard(file)
            file.close()


def _no_link(path: str, flags: int) -> int:
    # what a link points to would be emptied
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _acquire(file: BinaryIO, waiting: Callable[[], None]) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            time.sleep(POLL_S)


def _is_current(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
