"""A zip of an image folder (layouts: listing.py) or of Tiny ImageNet (tiny_layout.py), read by
member name and never extracted."""

import contextlib
import lzma
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from fastcnn.config import DataConfig
from fastcnn.data.decode import BadImageError
from fastcnn.data.examine import MAX_FILE_BYTES, Source
from fastcnn.data.folder import decoded_contents, image_key, warn_ignored
from fastcnn.data.left_out import checked
from fastcnn.data.listing import Layout, find_layout, normal_name
from fastcnn.data.store import Contents, Dataset, fingerprint, pack
from fastcnn.data.tar import Growth
from fastcnn.data.tiny_layout import tiny_layout, tiny_prefix
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

Members = dict[str, zipfile.ZipInfo]  # by normalised name


def load_zip(path: Path, config: DataConfig) -> Dataset:
    """Read a zip without writing any member to disk.

    Raises DataError for an archive that is cut, damaged or encrypted, holds a member that is
    absolute, climbs with '..' or is a link, or grows beyond MAX_GROWTH; for whatever
    listing.find_layout or tiny_layout refuse; and as folder.load_layout.
    """
    status = path.stat()
    stamp = [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    key = fingerprint("zip", stamp, [*image_key(config), config.test_fraction])
    return checked(pack(path.name, key, partial(zip_contents, path, config)), path, config)


def zip_contents(path: Path, config: DataConfig) -> Contents:
    """Return what a zip holds for the store; its images are decoded as they are asked for."""
    layout, sources, mean_bytes = list_zip(path, config)
    warn_ignored(path, layout)
    return decoded_contents(path, layout, sources, config, mean_bytes)


def list_zip(path: Path, config: DataConfig) -> tuple[Layout, Iterator[Source], float]:
    """Return the layout, the images in the archive's order, and the mean bytes of a file."""
    with _opened(path) as archive:
        members, folders = _list(path, archive)
        layout = _layout(path, archive, members, folders, config.test_fraction)
    mean_bytes = sum(info.file_size for info in members.values()) / len(members)
    return layout, _sources(path, layout), mean_bytes


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


def _list(path: Path, archive: zipfile.ZipFile) -> tuple[Members, list[str]]:
    """Return the files and the names of the folders, all checked."""
    files: Members = {}
    folders: list[str] = []
    growth = Growth(path)
    for info in archive.infolist():
        _check(path, info)
        growth.add(info.file_size)
        name = normal_name(info.filename)
        if name.split("/")[0] == APPENDED:
            continue
        if info.is_dir():
            folders.append(name)
        elif name in files:
            raise DataError(f"{path}: holds {name} twice")
        else:
            files[name] = info
    return files, folders


def _check(path: Path, info: zipfile.ZipInfo) -> None:
    name = info.filename
    if not name:
        raise DataError(f"{path}: a member without a name; get it again")
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{path}: member '{name}' points outside the archive; refused")
    # the upper half holds Unix's mode, 0 in zips from elsewhere
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError(f"{path}: member '{name}' is a link or a device; refused")
    if info.flag_bits & ENCRYPTED:
        raise DataError(f"{path}: member '{name}' is encrypted; unpack it and give the folder")


def _layout(
    path: Path, archive: zipfile.ZipFile, members: Members, folders: list[str], fraction: float
) -> Layout:
    prefix = tiny_prefix(members)
    if prefix is None:
        return find_layout(str(path), members, folders, fraction)
    inner = {name.removeprefix(prefix) for name in members if name.startswith(prefix)}
    where = f"{path}/{prefix}".rstrip("/")
    layout = tiny_layout(where, inner, lambda name: _read(archive, members[prefix + name]))
    splits = {
        split: [(prefix + name, label) for name, label in items]
        for split, items in layout.splits.items()
    }
    return replace(layout, splits=splits)


def _sources(path: Path, layout: Layout) -> Iterator[Source]:
    """Yield the images in the archive's order, so that it is read front to back."""
    wanted = {
        name: (split, position)
        for split, items in layout.splits.items()
        for position, (name, _) in enumerate(items)
    }
    with _opened(path) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
            name = normal_name(info.filename)
            if name in wanted:
                yield Source(*wanted[name], name, _reader(path, archive, info))


def _reader(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Callable[[], bytes]:
    """Return what gives the bytes of a member, or raises BadImageError for a damaged one: members
    are independent. Raises DataError where the archive's file cannot be read."""
    if info.file_size > MAX_FILE_BYTES:
        return _refusal(f"{info.file_size} bytes, over {MAX_FILE_BYTES}")
    try:
        data = _read(archive, info)
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno is not None:  # bz2's own have no number
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        return _refusal(f"damaged in the zip ({first_line(error)})")
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


def _refusal(reason: str) -> Callable[[], bytes]:
    def refuse() -> bytes:
        raise BadImageError(reason)

    return refuse


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
