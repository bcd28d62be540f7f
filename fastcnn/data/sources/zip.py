"""Zips, of an image folder or of Tiny ImageNet: no member is written to disk."""

import contextlib
import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Container, Iterator
from dataclasses import replace
from pathlib import Path

from fastcnn.data.sources import base
from fastcnn.data.sources.archive import Archive, Members, Read, refusal
from fastcnn.data.sources.base import Contents
from fastcnn.data.sources.layout import find_layout, normal_name
from fastcnn.data.sources.tiny_layout import tiny_layout, tiny_prefix
from fastcnn.errors import DataError
from fastcnn.text import first_line

ENCRYPTED = 0x1  # bit of a member's flags
APPENDED = "__MACOSX"  # a folder of metadata that macOS adds to the zips it writes
BOUNDED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
PACKED_BYTES = 4096  # at a time; bzip2 and LZMA make up to 80 MB of them

# what zipfile raises for it
DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,  # a way of compressing that zipfile does not know
)


class Zip(Archive):
    """Raises DataError for an encrypted member too."""

    form = "zip"

    def listed(self) -> tuple[Contents, float]:
        with _opened(self.where) as archive:
            found = _list(self.where, archive)
            contents = _contents(self.where, archive, found, self.test_fraction)
        return contents, sum(info.file_size for info in found.files.values()) / len(found.files)

    def members(self, wanted: Container[str]) -> Iterator[tuple[str, Read]]:
        with _opened(self.where) as archive:
            for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
                name = normal_name(info.filename)
                if name in wanted:
                    yield name, _reader(self.where, archive, info)


def is_zip(path: Path) -> bool:
    """Return whether a regular file has a zip's name or begins like one.

    By name too, so that a damaged one is called that. Raises DataError if it cannot be read.
    """
    if path.name.lower().endswith(".zip"):
        return True
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _list(path: Path, archive: zipfile.ZipFile) -> Members:
    found = Members(path)
    for info in archive.infolist():
        name = info.filename
        if not name:
            raise DataError(f"{path}: a member without a name; get it again")
        # the upper half holds Unix's mode, 0 in zips from elsewhere
        kind = stat.S_IFMT(info.external_attr >> 16)
        found.check(name, info.file_size, kind in (0, stat.S_IFREG, stat.S_IFDIR))
        if info.flag_bits & ENCRYPTED:
            raise DataError(f"{path}: member '{name}' is encrypted; unpack it and give the folder")
        if normal_name(name).split("/")[0] != APPENDED:
            found.put(name, info.is_dir(), info)
    return found


def _contents(path: Path, archive: zipfile.ZipFile, found: Members, fraction: float) -> Contents:
    prefix = tiny_prefix(found.files)
    if prefix is None:
        return find_layout(str(path), found.files, found.folders, fraction)
    inner = {name.removeprefix(prefix) for name in found.files if name.startswith(prefix)}
    where = f"{path}/{prefix}".rstrip("/")
    tiny = tiny_layout(where, inner, lambda name: _read(archive, found.files[prefix + name]))
    paths = {split: [prefix + name for name in names] for split, names in tiny.paths.items()}
    return replace(tiny, paths=paths)


def _reader(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Read:
    """Return what gives the bytes of a member, or raises BadImageError for a damaged one: members
    are independent. Raises DataError where the archive's file cannot be read."""
    if info.file_size > base.MAX_FILE_BYTES:
        return refusal(f"{info.file_size} bytes, over {base.MAX_FILE_BYTES}")
    try:
        data = _read(archive, info)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # bz2's own have no number
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        return refusal(f"damaged in the zip ({first_line(error)})")
    return lambda: data


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Return the bytes of a member, no more than it says that it has, whatever its data hold.

    Not `archive.read`, which inflates all of them before it looks. What deflate gives is bounded by
    what is asked for; of the others, by what goes in.
    """
    step = info.file_size + 1 if info.compress_type in BOUNDED else PACKED_BYTES
    parts = []
    with archive.open(info) as file:
        while part := file.read(step):
            parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    with _damage(str(path)), zipfile.ZipFile(path) as archive:
        yield archive


@contextlib.contextmanager
def _damage(where: str) -> Iterator[None]:
    """Raise DataError for whatever is wrong with an archive or a member."""
    try:
        yield
    except DAMAGE as error:
        raise DataError(
            f"{where}: cut, damaged or not a zip ({first_line(error)}); get it again"
        ) from error
