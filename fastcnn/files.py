"""Files that are written whole or not at all, and read only where that comes to an end."""

import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from fastcnn.errors import DiskError


@contextmanager
def replacing(path: Path, content: bytes | memoryview) -> Iterator[Path]:
    """Write `content` beside `path`, and onto the disk; yield the file; give it its name after.

    If the block raises, the file is removed and what was at `path` stays. Raises DiskError
    where the disk refuses.
    """
    temporary = _beside(path)
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DiskError(_refused(path, len(content), error)) from error
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise DiskError(_refused(path, len(content), error)) from error
    finally:
        discard(temporary)


@contextmanager
def growing(path: Path) -> Iterator[TextIO]:
    """Write a text bit by bit beside `path`; it has its name at the end, and also when the user
    stops the block, which then leaves what was done.

    If something else ends the block, the file is removed and what was at `path` stays. A pipe or a
    device is written to as it is. Text that is not UTF-8, such as a path, keeps its bytes. Raises
    DiskError where the disk refuses.
    """
    path = Path(os.path.realpath(path))  # of a link, what it points to
    whole = path.is_file() or not path.exists()
    temporary = _beside(path) if whole else path
    try:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            try:
                yield file
            except KeyboardInterrupt:
                file.close()
                if whole:
                    os.replace(temporary, path)
                raise
        if whole:
            os.replace(temporary, path)
    except BrokenPipeError:  # whoever read the pipe has gone
        raise
    except OSError as error:
        raise DiskError(_refused(path, None, error)) from error
    finally:
        if whole:
            discard(temporary)


def discard(path: Path) -> None:
    """Remove a temporary file, if there is one and it can be removed."""
    # a read-only disk refuses even where there is none, and would hide its first refusal
    with suppress(OSError):
        path.unlink(missing_ok=True)


def check_regular(path: Path) -> None:
    """Raise OSError for a pipe or a device: opening or reading one may wait for ever."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # reading a folder is refused as such
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def replace_bytes(path: Path, content: bytes | memoryview) -> Path:
    """Write a file whole or not at all; raises DiskError where the disk refuses."""
    with replacing(path, content):
        return path


def replace_text(path: Path, text: str) -> Path:
    """The same with text, in UTF-8."""
    return replace_bytes(path, text.encode())


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that are gone left half written in `folder`."""
    for path in folder.glob(".*.part"):
        owner = re.search(r"\.(\d+)(\.former)?\.part$", path.name)
        if owner and not _runs(int(owner[1])):
            path.unlink(missing_ok=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def inside(folder: Path, name: str) -> Path:
    """The path of a file in `folder` whose name came from another file.

    Raises ValueError for a name that leads out of the folder, and for a link, which may as well.
    """
    path = folder / name
    if not name or path.parent != folder or path.name != name or path.is_symlink():
        raise ValueError(f"{name!r} is no file of {folder}")
    return path


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _refused(path: Path, needed: int | None, error: OSError) -> str:
    wanted = "" if needed is None else f"{needed:,} bytes needed, "
    try:
        free = f" ({wanted}{shutil.disk_usage(path.parent).free:,} free)"
    except OSError:  # the folder itself is gone
        free = ""
    kept = "; the former one is kept" if path.is_file() else ""
    return f"cannot write {path}: {error.strerror or error}{free}{kept}"
