"""Files that are written whole or not at all, and read only where that comes to an end."""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, TextIO

from fastcnn.errors import DiskError

# levels of lists and mappings in one another; what is written here has fewer than ten
DEEPEST = 32
# a text, though its end may be missing, or a bracket outside one; it never goes back
JSON_MARKS = re.compile(r'"(?:[^"\\]+|\\.)*"?|[\[\]{}]', re.DOTALL)


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


def check_depth(steps: Iterable[int]) -> None:
    """Raise ValueError where lists and mappings lie more than DEEPEST deep in one another.

    steps: 1 where one begins, -1 where it ends. Parsers recurse, as does what handles their values:
    how deep they come depends on the interpreter's limit and on the stack that is left, and beyond
    it the process may crash.
    """
    if any(depth > DEEPEST for depth in accumulate(steps)):
        raise ValueError(f"lists or mappings lie more than {DEEPEST} deep in one another")


def check_depth_of(value: Any) -> None:
    """The same of a value that was read without recursion, and may hold itself."""
    check_depth(1 for _ in _levels(value))


def _levels(value: Any) -> Iterator[list[Any]]:
    """The lists and mappings of each depth; those at several places of one stand there once."""
    level = [value]
    while level := [one for one in level if isinstance(one, (dict, list, tuple, set))]:
        yield level
        inner = (one for outer in level for one in outer)
        values = (one for outer in level if isinstance(outer, dict) for one in outer.values())
        level = list({id(one): one for one in (*inner, *values)}.values())


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError for what is none or too deep (`check_depth`)."""
    marks = (mark[0] for mark in JSON_MARKS.finditer(text))
    check_depth((mark in "[{") - (mark in "]}") for mark in marks)
    return json.loads(text)


def load_json(path: Path) -> Any:
    """The same of a file in UTF-8; raises OSError as well."""
    check_regular(path)
    return parse_json(path.read_text(encoding="utf-8"))


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
