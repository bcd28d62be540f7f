"""Tars, plain or compressed: no member is written to disk."""

import bz2
import contextlib
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from fastcnn.data.sources import base
from fastcnn.data.sources.archive import Archive, Members, Read, refusal
from fastcnn.data.sources.base import Contents
from fastcnn.data.sources.layout import find_layout, normal_name
from fastcnn.errors import DataError, UsageError
from fastcnn.text import first_line

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".txz")
# A long name is all that these hold here; tarfile takes them into memory whole
MAX_HEADER_BYTES = 1 << 20
HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)

# a name, a link's name and tables of pax stand before a member; tarfile recurses into each
MAX_HEADERS = 16

# what tarfile and the decompressors raise for it
DAMAGE = (
    *(tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError),
    *(MemoryError, OverflowError),
)


class Tar(Archive):
    """Raises UsageError for a name that is no tar's."""

    form = "tar"

    def listed(self) -> tuple[Contents, float]:
        path = self.where
        if not path.name.lower().endswith(SUFFIXES):
            raise UsageError(
                f"--data {path}: expected a folder or a file ending in {', '.join(SUFFIXES)} or "
                ".zip"
            )
        found = _list(path)
        contents = find_layout(str(path), found.files, found.folders, self.test_fraction)
        return contents, sum(found.files.values()) / len(found.files)

    def members(self, wanted: Container[str]) -> Iterator[tuple[str, Read]]:
        with _opened(self.where) as (archive, _):
            for member in archive:
                _forget(archive)
                name = normal_name(member.name)
                if name in wanted and member.isfile():
                    yield name, _reader(archive, member)


def _list(path: Path) -> Members:
    found = Members(path)
    with _opened(path) as (archive, finish):
        for member in archive:
            _forget(archive)
            found.check(member.name, member.size, member.isfile() or member.isdir())
            if member.size < 0:  # by which tarfile would go back, and round and round
                raise DataError(f"{path}: member '{member.name}' has {member.size} bytes; refused")
            found.put(member.name, member.isdir(), member.size)
        finish()
    return found


class Refused(Exception):
    """A header that would make tarfile take up memory at will."""


class CountedTar(tarfile.TarFile):
    """A tar that counts the headers which tarfile is reading, each inside the one before it."""

    headers = 0


class Member(tarfile.TarInfo):
    """A member with few headers, which hold no more than a name needs, and as long as its data."""

    @classmethod
    def fromtarfile(cls, archive: Any) -> "Member":
        archive.headers += 1
        try:
            if archive.headers > MAX_HEADERS:
                raise Refused(f"a member with over {MAX_HEADERS} headers")
            return super().fromtarfile(archive)
        finally:
            archive.headers -= 1

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "Member":
        member = super().frombuf(buf, encoding, errors)
        if member.type in HEADERS and not 0 <= member.size <= MAX_HEADER_BYTES:
            raise Refused(f"a header of {member.size:,} bytes, over {MAX_HEADER_BYTES:,}")
        if member.type == tarfile.GNUTYPE_SPARSE:
            member._refuse()
        return member

    def _refuse(self, *_: Any) -> None:
        raise Refused("a sparse file, whose length is not that of its data")

    # tarfile would read their tables, of any length
    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse


def _forget(archive: tarfile.TarFile) -> None:
    """Drop the members that tarfile keeps, one for every name."""
    archive.members.clear()  # type: ignore[attr-defined]


def _reader(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Read:
    if member.size > base.MAX_FILE_BYTES:
        return refusal(f"{member.size} bytes, over {base.MAX_FILE_BYTES}")
    file = archive.extractfile(member)
    data = file.read() if file else b""
    return lambda: data


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[tarfile.TarFile, Callable[[], None]]]:
    """Yield the archive and a function that, after its last member, checks that the tar's end is
    there. Raises DataError for whatever is wrong with the file."""
    try:
        with (
            _stream(path) as stream,
            CountedTar.open(fileobj=stream, mode="r:", tarinfo=Member) as archive,
        ):
            yield archive, partial(_check_end, path, stream)
    except Refused as error:
        raise DataError(f"{path}: {error}; refused") from error
    except DAMAGE as error:
        reason = first_line(error)
        raise DataError(f"{path}: cut, damaged or not a tar ({reason}); get it again") from error


def _stream(path: Path) -> IO[bytes]:
    """Open by the first bytes, whatever the name says."""
    with open(path, "rb") as file:
        magic = file.read(6)
    openers: dict[bytes, Any] = {
        b"\x1f\x8b": gzip.open,
        b"BZh": bz2.open,
        b"\xfd7zXZ\x00": lzma.open,
    }
    opener = next((opener for start, opener in openers.items() if magic.startswith(start)), open)
    return cast("IO[bytes]", opener(path, "rb"))


def _check_end(path: Path, stream: IO[bytes]) -> None:
    # tarfile takes a cut between two members, or a broken header, for the end of the archive
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise DataError(f"{path}: cut or damaged: the end of the archive is missing; get it again")
