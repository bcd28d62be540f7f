"""Progress of reading: a bar on standard error where that is a terminal, else a logged line."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

SLOW_IMAGES = 5000  # more are announced in a log: reading them may take a minute


@contextlib.contextmanager
def progress_bar(
    title: str, total: float, *, announce: bool, unit: str = ""
) -> Iterator[Callable[[float], None]]:
    """Show a bar while the block runs; the block calls what it is given with each step's size.

    Without a terminal a line is logged, and that only if `announce`: what takes a moment would
    add a line to every log, and a second one to an error. A total of 0 is one that nobody knows.
    """
    if not log.isEnabledFor(logging.INFO):
        yield lambda step: None
        return
    if not sys.stderr.isatty():
        if announce:
            log.info("%s: %s", title, f"{total:,.0f} {unit}".rstrip() if total else "started")
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total or None)
        yield lambda step: progress.advance(task, step)
