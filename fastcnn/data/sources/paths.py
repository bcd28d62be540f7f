"""Paths that options give, and names of files, checked before anything is read."""

import stat
from pathlib import Path
from typing import Literal

from fastcnn.errors import DataError, UsageError

SHOWN = 80  # characters of a path in an error: one may be longer than the system's limit


def given_path(option: str, text: str) -> Path:
    """Return the path that `option` names, ~ expanded.

    Raises UsageError for an empty one, which pathlib takes for the current folder, and DataError
    for a name that is not UTF-8 and for a ~user without a home.
    """
    if not text:
        raise UsageError(f"{option} is empty; give a path, or leave the option out")
    check_utf8(option, text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise DataError(f"{option} {text}: {error}") from error


def kind_of(option: str, path: Path) -> Literal["folder", "file", "other"] | None:
    """Return what is at `path`, None if nothing is.

    Raises DataError where the system cannot tell: a name that is too long, no permission, a loop.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        text = str(path)
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{option} {shown!r}: {reason}") from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def check_utf8(where: str, name: str) -> None:
    """Raise DataError for a name that no report, table or saved config could hold."""
    try:
        name.encode()
    except UnicodeEncodeError as error:
        shown = name.encode("utf-8", "backslashreplace").decode()
        raise DataError(f"{where}: the name '{shown}' is not UTF-8; rename it") from error
