"""The folders of a run that `analyze` and `ood` write: whose each is, and one writer at a time."""

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from fastcnn.cache import locked
from fastcnn.config import DATA_NAMES
from fastcnn.errors import CheckpointError
from fastcnn.insight.run_page.saved_sections import kept_of


def word_of(data: str) -> str:
    """What the images of --data are called: their name, or the last part of their path."""
    return data if data in DATA_NAMES else Path(os.path.abspath(data)).name


def origin_of(data: str | None) -> str:
    """Which images --data means, told from others that are called the same; "": the run's own."""
    return data if data in DATA_NAMES else os.path.abspath(data) if data is not None else ""


@contextlib.contextmanager
def claimed(run: Path, name: str, key: str, of: Sequence[str]) -> Iterator[Path]:
    """Hold the folder of a run for what is found of the data `of`: `name`, or name-2 and so on
    where <key>.json there is of others.

    Raises CheckpointError for a link or a file in its place, and where another process holds it.
    """
    for number in itertools.count(1):
        folder = run / (name if number == 1 else f"{name}-{number}")
        if folder.is_symlink():
            raise CheckpointError(f"{folder} is a link, which may lead out of the run; remove it")
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"{folder} is a file where a folder is needed; move it")
        if kept_of(folder, key) in (None, [*of]):
            break
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(run / f".{folder.name}.lock", partial(_refuse, folder)))
        except OSError as error:
            raise CheckpointError(f"cannot write into {run}: {error.strerror or error}") from error
        yield folder


def _refuse(folder: Path) -> None:
    raise CheckpointError(f"{folder}: another process is writing there; try again when it is done")
