"""A tar of an image folder (layouts: listing.py), read by member name and never extracted."""

import bz2
import contextlib
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from fastcnn.config import DataConfig
from fastcnn.data.decode import BadImageError
from fastcnn.data.examine import MAX_FILE_BYTES, Source
from fastcnn.data.folder import decoded_contents, image_key, warn_ignored
from fastcnn.data.left_out import checked
from fastcnn.data.listing import Layout, find_layout, normal_name
from fastcnn.data.store import Contents, Dataset, fingerprint, pack
from fastcnn.errors import DataError, UsageError
from fastcnn.text import first_line

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".txz")
# Images hardly compress: an archive that grows by more than this is a bomb, not a data set
MAX_GROWTH = 100
GROWTH_GRACE = 1 << 30  # bytes
# Nor do their headers shrink to nothing: more members than this are names without images
MEMBER_BYTES = 8  # of the archive, at least, for a member
MEMBERS_GRACE = 100_000
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


def load_tar(path: Path, config: DataConfig) -> Dataset:
    """Read a tar, plain or compressed, without writing any member to disk.

    Raises DataError for an archive that is cut or damaged, holds a member that is absolute, climbs
    with '..', is a link or a device, or grows beyond MAX_GROWTH; and as folder.load_layout.
    """
    status = path.stat()
    key = fingerprint(
        "tar",
        [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns],
        [*image_key(config), config.test_fraction],
    )
    return checked(pack(path.name, key, partial(_contents, path, config)), path, config)


def _contents(path: Path, config: DataConfig) -> Contents:
    layout, sources, mean_bytes = list_tar(path, config)
    warn_ignored(path, layout)
    return decoded_contents(path, layout, sources, config, mean_bytes)


def list_tar(path: Path, config: DataConfig) -> tuple[Layout, Iterator[Source], float]:
    """Return the layout, the images in the archive's order, and the mean bytes of a file.

    Raises UsageError for a name that is no tar's, and DataError as load_tar.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise UsageError(
            f"--data {path}: expected a folder or a file ending in {', '.join(SUFFIXES)} or .zip"
        )
    files, folders = _list(path)
    layout = find_layout(str(path), files, folders, config.test_fraction)
    return layout, _sources(path, layout), sum(files.values()) / len(files)


def _list(path: Path) -> tuple[dict[str, int], list[str]]:
    """Return {normalised name: bytes} of the files and the names of the folders, all checked."""
    files: dict[str, int] = {}
    folders: list[str] = []
    growth = Growth(path)
    with _opened(path) as (archive, finish):
        for member in archive:
            _forget(archive)
            _check(path, member)
            growth.add(member.size)
            name = normal_name(member.name)
            if member.isdir():
                folders.append(name)
            elif name in files:
                raise DataError(f"{path}: holds {name} twice")
            else:
                files[name] = member.size
        finish()
    return files, folders


class Growth:
    """Counts members of an archive and the bytes they unpack to; refuses a bomb."""

    def __init__(self, path: Path):
        self._path, packed = path, path.stat().st_size
        self._limits = packed // MEMBER_BYTES + MEMBERS_GRACE, MAX_GROWTH * packed + GROWTH_GRACE
        self._members = self._bytes = 0

    def add(self, size: int) -> None:
        """Count a member. Raises DataError for one too many, or for bytes too many."""
        self._members += 1
        self._bytes += size
        most, longest = self._limits
        if self._members > most:
            raise DataError(f"{self._path}: holds over {most:,} members; refused")
        if self._bytes > longest:
            raise DataError(f"{self._path}: unpacks to over {longest:,} bytes; refused")


class Refused(Exception):
    """A header that would make tarfile take up memory at will."""


class Archive(tarfile.TarFile):
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


def _check(path: Path, member: tarfile.TarInfo) -> None:
    parts = member.name.split("/")
    if member.name.startswith("/") or ".." in parts:
        raise DataError(f"{path}: member '{member.name}' points outside the archive; refused")
    if not (member.isfile() or member.isdir()):
        raise DataError(f"{path}: member '{member.name}' is a link or a device; refused")
    if member.size < 0:  # by which tarfile would go back, and round and round
        raise DataError(f"{path}: member '{member.name}' has {member.size} bytes; refused")


def _sources(path: Path, layout: Layout) -> Iterator[Source]:
    """Yield the images in the archive's order, so that it is read once, front to back."""
    wanted = {
        name: (split, position)
        for split, items in layout.splits.items()
        for position, (name, _) in enumerate(items)
    }
    with _opened(path) as (archive, _):
        for member in archive:
            _forget(archive)
            name = normal_name(member.name)
            if name in wanted and member.isfile():
                yield Source(*wanted[name], name, _reader(archive, member))


def _reader(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Callable[[], bytes]:
    if member.size > MAX_FILE_BYTES:

        def refuse() -> bytes:
            raise BadImageError(f"{member.size} bytes, over {MAX_FILE_BYTES}")

        return refuse
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
            Archive.open(fileobj=stream, mode="r:", tarinfo=Member) as archive,
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
