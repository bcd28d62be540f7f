"""A tar of an image folder (layouts: listing.py), read by member name and never extracted."""

import bz2
import contextlib
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from fastcnn.config import DataConfig
from fastcnn.data.decode import BadImageError
from fastcnn.data.examine import MAX_FILE_BYTES, Source
from fastcnn.data.folder import decoded_contents, image_key, warn_ignored
from fastcnn.data.left_out import checked
from fastcnn.data.listing import Layout, find_layout
from fastcnn.data.store import Contents, Dataset, fingerprint, pack
from fastcnn.errors import DataError, UsageError

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".txz")
# Images hardly compress: an archive that grows by more than this is a bomb, not a data set
MAX_GROWTH = 100
GROWTH_GRACE = 1 << 30  # bytes


def load_tar(path: Path, config: DataConfig) -> Dataset:
    """Read a tar, plain or compressed, without writing any member to disk.

    Raises DataError for an archive that is cut or damaged, holds a member that is absolute, climbs
    with '..', is a link or a device, or grows beyond MAX_GROWTH; and as folder.load_layout.
    """
    if not path.name.lower().endswith(SUFFIXES):
        raise UsageError(
            f"--data {path}: expected a folder or a file ending in {', '.join(SUFFIXES)}"
        )
    status = path.stat()
    key = fingerprint(
        "tar",
        [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ctime_ns],
        [*image_key(config), config.test_fraction],
    )
    return checked(pack(path.name, key, partial(_contents, path, config)), path, config)


def _contents(path: Path, config: DataConfig) -> Contents:
    files, folders = _list(path)
    layout = find_layout(str(path), files, folders, config.test_fraction)
    warn_ignored(path, layout)
    mean_bytes = sum(files.values()) / len(files)
    sources = _sources(path, layout)
    return decoded_contents(path, layout, sources, config, mean_bytes)


def _list(path: Path) -> tuple[dict[str, int], list[str]]:
    """Return {normalised name: bytes} of the files and the names of the folders, all checked."""
    files: dict[str, int] = {}
    folders: list[str] = []
    limit = MAX_GROWTH * path.stat().st_size + GROWTH_GRACE
    total = 0
    with _opened(path) as (archive, finish):
        for member in archive:
            _check(path, member)
            total += member.size
            if total > limit:
                raise DataError(f"{path}: unpacks to over {limit} bytes; refused")
            name = str(PurePosixPath(member.name))
            if member.isdir():
                folders.append(name)
            elif name in files:
                raise DataError(f"{path}: holds {name} twice")
            else:
                files[name] = member.size
        finish()
    return files, folders


def _check(path: Path, member: tarfile.TarInfo) -> None:
    parts = PurePosixPath(member.name).parts
    if member.name.startswith("/") or ".." in parts:
        raise DataError(f"{path}: member '{member.name}' points outside the archive; refused")
    if not (member.isfile() or member.isdir()):
        raise DataError(f"{path}: member '{member.name}' is a link or a device; refused")


def _sources(path: Path, layout: Layout) -> Iterator[Source]:
    """Yield the images in the archive's order, so that it is read once, front to back."""
    wanted = {
        name: (split, position)
        for split, items in layout.splits.items()
        for position, (name, _) in enumerate(items)
    }
    with _opened(path) as (archive, _):
        for member in archive:
            name = str(PurePosixPath(member.name))
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
        with _stream(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            yield archive, partial(_check_end, path, stream)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        raise DataError(f"{path}: cut, damaged or not a tar ({error}); get it again") from error


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
