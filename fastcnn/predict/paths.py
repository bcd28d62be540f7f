"""Which files are meant: files, folders, or a list of both on standard input."""

import os
from collections.abc import Iterable
from pathlib import PurePath
from typing import BinaryIO

from fastcnn.data.decode import EXTENSIONS

STDIN = "-"


def image_paths(given: Iterable[str], stdin: BinaryIO | None = None) -> list[str]:
    """Return the paths of images, as given: files in the order given, of a folder those in it.

    "-" stands for the paths on `stdin`, one a line, or separated by NUL if there is a NUL. A folder
    without images stays in the list, for whoever reads it says so.
    """
    found: list[str] = []
    for path in given:
        if path == STDIN and stdin is not None:
            found += image_paths(listed(stdin.read()))
        elif os.path.isdir(path):
            found += images_below(path) or [path]
        else:
            found.append(path)
    return found


def listed(text: bytes) -> list[str]:
    """Return the paths in a list; empty lines are none."""
    if b"\0" in text:
        lines = text.split(b"\0")
    else:
        lines = [line.removesuffix(b"\r") for line in text.split(b"\n")]
    return [os.fsdecode(line) for line in lines if line]


def images_below(folder: str) -> list[str]:
    """Return the image files in a folder and the folders in it, by their extensions, sorted.

    Hidden ones are left out. Links are followed, to each folder once.
    """
    found, visited = [], set()
    for here, inner, names in os.walk(folder, followlinks=True):
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in visited:
            inner.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found += [os.path.join(here, name) for name in names if is_image(name)]
    return sorted(found)


def is_image(name: str) -> bool:
    return not name.startswith(".") and PurePath(name).suffix.lower() in EXTENSIONS
