"""A folder of images (layouts: layout.py): every image is a file."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from fastcnn.data.decode import EXTENSIONS
from fastcnn.data.sources.base import Contents, Encoded, Stamp, read_whole, stamp_of
from fastcnn.data.sources.layout import find_layout
from fastcnn.errors import DataError

MOST_VISITS = 16  # of one folder, by links: folders that link to each other would have no end


@dataclass(frozen=True)
class Folder:
    """A folder and what lies there. files: the stamp of every one by its path below it."""

    where: Path
    files: dict[str, Stamp]
    listed: Contents
    kind: str = "image folder"
    in_files: bool = True

    @property
    def name(self) -> str:
        return self.where.name or self.where.resolve().name

    def identity(self, seen: list[Any]) -> list[Any]:
        used = [
            [split, path, label, self.files[path]]
            for split, paths in self.listed.paths.items()
            for path, label in zip(paths, self.listed.labels[split].tolist(), strict=True)
        ]
        # unpacked archives and copies may agree in names, sizes and times: the path tells them
        # apart
        return ["folder", str(self.where.resolve()), used, self.listed.classes, seen]

    def contents(self) -> Contents:
        mean_bytes = sum(size for size, _, _ in self.files.values()) / len(self.files)
        return replace(self.listed, encoded=self._encoded, mean_bytes=mean_bytes, stamps=self.files)

    def _encoded(self) -> Iterator[Encoded]:
        for split, paths in self.listed.paths.items():
            for position, path in enumerate(paths):
                read = partial(read_whole, self.where / path, self.files[path][0])
                yield Encoded(split, position, path, read)


def open_folder(path: Path, test_fraction: float) -> Folder:
    """List an image folder. Raises DataError for whatever list_folder and find_layout refuse."""
    files, folders = list_folder(path)
    return Folder(path, files, find_layout(str(path), files, folders, test_fraction))


def list_folder(path: Path) -> tuple[dict[str, Stamp], list[str]]:
    """Return {file's relative path: stamp} and the relative paths of folders.

    Links are followed, but not back into a folder above. Raises DataError where the listing fails,
    and where links lead to one folder more than MOST_VISITS times.
    """
    files: dict[str, Stamp] = {}
    folders: list[str] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    visits: Counter[tuple[int, int]] = Counter()
    try:
        while waiting:
            inner, above = waiting.pop()
            here = os.stat(path / inner)
            identity = (here.st_dev, here.st_ino)
            if identity in above:
                continue
            visits[identity] += 1
            if visits[identity] > MOST_VISITS:
                real = os.path.realpath(path / inner)
                raise DataError(
                    f"{path}: links lead to {real} more than {MOST_VISITS} times; remove some"
                )
            for entry in os.scandir(path / inner):
                if entry.name.startswith("."):
                    continue
                relative = f"{inner}/{entry.name}" if inner else entry.name
                status = _status(entry)
                if stat.S_ISDIR(status.st_mode):
                    folders.append(relative)
                    waiting.append((relative, above | {identity}))
                elif stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                    files[relative] = stamp_of(status)
    except OSError as error:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error
    return files, folders


def _status(entry: "os.DirEntry[str]") -> os.stat_result:
    """Follow a link; of a broken link to an image return its own status, so that decoding names it
    among the unreadable files. Any other broken link may stand for a class: that is an error."""
    try:
        return entry.stat()
    except OSError as error:
        own = entry.stat(follow_symlinks=False)
        if not stat.S_ISLNK(own.st_mode):
            raise
        if PurePath(entry.name).suffix.lower() in EXTENSIONS:
            return own
        raise DataError(
            f"{entry.path}: broken link ({error.strerror}); mend or remove it"
        ) from error
