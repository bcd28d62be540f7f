"""What commands print beside their own results."""

import json
import os
import sys
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcnn.errors import NumbersError
from fastcnn.packages import PackageError


def as_text(content: Any) -> str:
    """JSON as every command prints it."""
    return json.dumps(content, indent=2, ensure_ascii=False)


def open_page(path: Path) -> None:
    """Open a page in the user's browser; where there is none, say so: the page is written."""
    # without a display the standard library would start a browser in the terminal, and wait for it
    shown = sys.platform != "linux" or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    try:
        opened = shown and webbrowser.open(path.resolve().as_uri())
    except (webbrowser.Error, OSError):
        opened = False
    if not opened:
        print(f"note: --open: no browser here; the page is {path}", file=sys.stderr)


def report_missing(what: str, error: PackageError) -> None:
    """Say that something was not drawn, for want of a package that can be done without."""
    print(f"note: {what}: {error}", file=sys.stderr)


def say_on(quiet: bool) -> Callable[[str], None]:
    """What prints a line of a study's progress on standard error, or nothing."""
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def show_record(record: Any) -> None:
    """Print a study's table and what it says."""
    from fastcnn.insight.html.table import show

    print(f"\n{record.lead}")
    show(record.table, record.title)
    for line in (*record.sentences, *record.notes):
        print(f"- {line}")


def report_failures(failures: Sequence[Any]) -> None:
    """Raise NumbersError if any run of a study had numbers that were not finite."""
    if failures:
        names = ", ".join(failure.planned.name for failure in failures)
        raise NumbersError(f"{len(failures)} failed ({names}); the other runs are in the table")
