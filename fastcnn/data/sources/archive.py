"""An archive of an image folder (layouts: layout.py), read by member name and never extracted."""

import abc
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from fastcnn.data.decode import BadImageError
from fastcnn.data.sources.base import Contents, Encoded, stamp_of
from fastcnn.data.sources.layout import normal_name
from fastcnn.errors import DataError

# Images hardly compress: an archive that grows by more than this is a bomb, not a data set
MAX_GROWTH = 100
GROWTH_GRACE = 1 << 30  # bytes
# Nor do their headers shrink to nothing: more members than this are names without images
MEMBER_BYTES = 8  # of the archive, at least, for a member
MEMBERS_GRACE = 100_000

Read = Callable[[], bytes]


@dataclass(frozen=True)
class Archive(abc.ABC):
    """An archive as a source; a subclass reads the members of its format.

    Raises DataError for an archive that is cut or damaged, holds a member that is absolute, climbs
    with '..', is a link or a device, or grows beyond MAX_GROWTH; and for a layout that is refused.
    """

    where: Path
    test_fraction: float
    kind: str = "archive"
    in_files: bool = False
    form: ClassVar[str]

    @property
    def name(self) -> str:
        return self.where.name

    def identity(self, seen: list[Any]) -> list[Any]:
        stamp = stamp_of(self.where.stat())
        return [self.form, [str(self.where.resolve()), *stamp], [*seen, self.test_fraction]]

    def contents(self) -> Contents:
        found, mean_bytes = self.listed()
        encoded = partial(self._encoded, found.paths)
        return replace(found, where=self.where, encoded=encoded, mean_bytes=mean_bytes)

    def _encoded(self, paths: dict[str, list[str]]) -> Iterator[Encoded]:
        wanted = {name: (split, i) for split in paths for i, name in enumerate(paths[split])}
        for name, read in self.members(wanted):
            yield Encoded(*wanted[name], name, read)

    @abc.abstractmethod
    def listed(self) -> tuple[Contents, float]:
        """Return what is in the archive, not readable yet, and the mean bytes of a file."""

    @abc.abstractmethod
    def members(self, wanted: Container[str]) -> Iterator[tuple[str, Read]]:
        """Yield normalised name and bytes of those wanted in the archive's order, so that it is
        read once, front to back."""


class Members:
    """The files of an archive, by normalised name, and the names of its folders, all checked."""

    def __init__(self, path: Path):
        self._path, packed = path, path.stat().st_size
        self._limits = packed // MEMBER_BYTES + MEMBERS_GRACE, MAX_GROWTH * packed + GROWTH_GRACE
        self._count = self._bytes = 0
        self.files: dict[str, Any] = {}
        self.folders: list[str] = []

    def check(self, name: str, size: int, regular: bool) -> None:
        """Count a member. Raises DataError for one that points elsewhere, for one too many and for
        bytes too many: a bomb."""
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError(f"{self._path}: member '{name}' points outside the archive; refused")
        if not regular:
            raise DataError(f"{self._path}: member '{name}' is a link or a device; refused")
        self._count += 1
        self._bytes += max(size, 0)
        most, longest = self._limits
        if self._count > most:
            raise DataError(f"{self._path}: holds over {most:,} members; refused")
        if self._bytes > longest:
            raise DataError(f"{self._path}: unpacks to over {longest:,} bytes; refused")

    def put(self, name: str, folder: bool, member: Any) -> None:
        """Note a member. Raises DataError for a file that is there already."""
        name = normal_name(name)
        if folder:
            self.folders.append(name)
        elif name in self.files:
            raise DataError(f"{self._path}: holds {name} twice")
        else:
            self.files[name] = member


def refusal(reason: str) -> Read:
    """Return what raises BadImageError where an image's bytes are asked for."""

    def refuse() -> bytes:
        raise BadImageError(reason)

    return refuse
