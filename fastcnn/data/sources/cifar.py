"""CIFAR-10 (Krizhevsky 2009) from its python or binary archive, or from either one unpacked.

An archive is checked by MD5 before a byte of it is used, its known members are read by name and
nothing is extracted. The python batches are pickles: they go through an unpickler that can make
arrays and plain values and nothing else.
"""

import io
import pickle
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcnn.cache import cache_dir
from fastcnn.config import DataConfig
from fastcnn.data.sources.base import Block, Contents, Packed, stamp_of
from fastcnn.data.sources.download import check_md5, download
from fastcnn.data.sources.paths import given_path, kind_of
from fastcnn.errors import DataError
from fastcnn.files import check_regular
from fastcnn.text import first_line

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
PYTHON_ARCHIVE, BINARY_ARCHIVE = "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"
MD5 = {
    PYTHON_ARCHIVE: "c58f30108f718f92721af3b95e74349a",
    BINARY_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530",
}
PYTHON_FOLDER, BINARY_FOLDER = "cifar-10-batches-py", "cifar-10-batches-bin"
PYTHON_BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
BINARY_BATCHES = [f"{name}.bin" for name in PYTHON_BATCHES]
CLASSES = tuple("airplane automobile bird cat deer dog frog horse ship truck".split())  # noqa: SIM905
PIXELS = 3 * 32 * 32  # bytes of an image: planes of red, green and blue

Read = Callable[[str], bytes]  # the bytes of a batch by its file name
Parse = Callable[[str, bytes], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Cifar10:
    """The 50,000 training and 10,000 test images: `batches` in an archive with `md5`, or in the
    folder `where`."""

    where: Path
    batches: list[str]
    md5: str | None = None
    name: str = "cifar10"
    in_files: bool = False

    def identity(self, seen: list[Any]) -> list[Any]:
        size = seen[0]
        if self.md5 is not None:
            return ["cifar10", self.md5, size]
        try:
            stamps = [stamp_of((self.where / name).stat()) for name in self.batches]
        except OSError as error:
            text = f"{error.filename}: {error.strerror}; unpack the archive again"
            raise DataError(text) from error
        return ["cifar10 folder", str(self.where.resolve()), stamps, size]

    def contents(self) -> Contents:
        """Raises DataError for batches that are not CIFAR-10's."""
        read = self._read if self.md5 is None else _members(self.where, self.batches).__getitem__
        return _contents(self.where, self.batches, read)

    def _read(self, name: str) -> bytes:
        try:
            check_regular(self.where / name)
            return (self.where / name).read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {self.where / name}: {error.strerror}") from error


def open_cifar10(config: DataConfig, packed: Packed) -> Cifar10:
    """Return CIFAR-10, looked for in `config.data_dir` or, without one, in the cache folder's
    cifar10/, and downloaded into it if missing; `config.data_dir` may also be the unpacked folder.

    Raises DataError for an archive with another MD5, for a `data_dir` that is no folder and for a
    download that fails.
    """
    if config.data_dir is not None:
        return _found("--data-dir", given_path("--data-dir", config.data_dir))
    folder = cache_dir() / "cifar10"
    known = [_archive(folder / name) for name in (PYTHON_ARCHIVE, BINARY_ARCHIVE)]
    return next((source for source in known if packed(source)), None) or _found(
        "cache folder", folder
    )


def _archive(path: Path) -> Cifar10:
    batches = PYTHON_BATCHES if path.name == PYTHON_ARCHIVE else BINARY_BATCHES
    return Cifar10(path, batches, MD5[path.name])


def _found(what: str, folder: Path) -> Cifar10:
    if kind_of(what, folder) not in ("folder", None):
        raise DataError(f"{what} {folder}: not a folder; give the one that holds the archive")
    for name in (PYTHON_ARCHIVE, BINARY_ARCHIVE):
        if kind_of(what, folder / name) == "file":
            check_md5(folder / name, MD5[name])
            return _archive(folder / name)
    for name, batches in ((PYTHON_FOLDER, PYTHON_BATCHES), (BINARY_FOLDER, BINARY_BATCHES)):
        if kind_of(what, folder / name) == "folder":
            return Cifar10(folder / name, batches)
        # any one of them: a folder that lacks some is an error, not a place to download to
        if any(kind_of(what, folder / batch) == "file" for batch in batches):
            return Cifar10(folder, batches)
    otherwise = (
        f"put {PYTHON_ARCHIVE} into the folder of --data-dir, or take --data digits or --data PATH"
    )
    download("CIFAR-10", URL, folder / PYTHON_ARCHIVE, MD5[PYTHON_ARCHIVE], otherwise)
    return _archive(folder / PYTHON_ARCHIVE)


def _members(path: Path, batches: list[str]) -> dict[str, bytes]:
    """Return the batches of an archive by name."""
    folder = BINARY_FOLDER if batches is BINARY_BATCHES else PYTHON_FOLDER
    found: dict[str, bytes] = {}
    with tarfile.open(path, mode="r:gz") as archive:
        for member in archive:
            name = member.name.removeprefix(f"{folder}/")
            if member.isfile() and name in batches and (file := archive.extractfile(member)):
                found[name] = file.read()
    missing = [name for name in batches if name not in found]
    if missing:
        raise DataError(f"{path}: {folder}/{missing[0]} is missing")
    return found


def _contents(where: Path, batches: list[str], read: Read) -> Contents:
    parse: Parse = parse_binary if batches is BINARY_BATCHES else parse_python
    parsed = [parse(f"{where}: {name}", read(name)) for name in batches]
    for name, (_, found) in zip(batches, parsed, strict=True):
        if found.min() < 0 or found.max() >= len(CLASSES):
            span = f"{found.min()} to {found.max()}"
            raise DataError(f"{where}: {name}: labels {span}, expected 0 to 9")
    labels = {"train": np.concatenate([found for _, found in parsed[:-1]]), "test": parsed[-1][1]}
    return Contents(where, CLASSES, labels, blocks=_blocks([pixels for pixels, _ in parsed]))


def _blocks(batches: list[np.ndarray]) -> Iterator[Block]:
    start = 0
    for number, planes in enumerate(batches):
        split, first = ("test", 0) if number == len(batches) - 1 else ("train", start)
        start += len(planes)
        images = np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        for at in range(0, len(images), 1000):
            part = images[at : at + 1000]
            yield split, range(first + at, first + at + len(part)), part


def parse_binary(where: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels uint8 (n, 3072) and labels int64 (n,) of records of one label byte and an
    image. Raises DataError unless the length is a whole number of records."""
    if not data or len(data) % (PIXELS + 1):
        raise DataError(f"{where}: {len(data)} bytes, expected a multiple of {PIXELS + 1}")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, PIXELS + 1)
    return records[:, 1:], records[:, 0].astype(np.int64)


def parse_python(where: str, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels uint8 (n, 3072) and labels int64 (n,) of a pickled batch.

    Raises DataError for a pickle that needs anything but arrays and plain values, or is not a
    batch.
    """
    try:
        batch = BatchUnpickler(io.BytesIO(data), encoding="bytes").load()
        pixels, labels = batch[b"data"].values, np.array(batch[b"labels"], dtype=np.int64)
    except Exception as error:  # a cut or forged pickle may raise anything
        raise DataError(
            f"{where}: not a CIFAR-10 batch ({first_line(error)}); unpack the archive again"
        ) from error
    if not isinstance(pixels, np.ndarray):
        raise DataError(f"{where}: pixels are not an array of uint8")
    if len(labels) == 0 or labels.ndim != 1 or pixels.shape != (len(labels), PIXELS):
        raise DataError(f"{where}: pixels {pixels.shape}, labels {labels.shape}")
    return pixels, labels


class BatchUnpickler(pickle._Unpickler):
    """An unpickler that makes plain values and arrays of bytes, and finds no other names.

    It is the one written in Python: a few bytes make that in C ask for gigabytes. The arrays are
    made here: NumPy's own types believe what a pickle says of them.
    """

    admitted: dict[tuple[str, str], Any] = {  # noqa: RUF012
        ("numpy.core.multiarray", "_reconstruct"): lambda *given: PickledArray(),
        ("numpy._core.multiarray", "_reconstruct"): lambda *given: PickledArray(),
        ("numpy", "ndarray"): None,
        ("numpy", "dtype"): lambda name, *given: PickledType(name),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return self.admitted[module, name]


class PickledType:
    """The type of an array's values; it must be uint8."""

    def __init__(self, name: Any):
        if name not in ("u1", b"u1", "|u1", b"|u1"):
            raise pickle.UnpicklingError("pixels are not an array of uint8")

    def __setstate__(self, state: Any) -> None:
        """Byte order and the like, of which bytes have none."""


class PickledArray:
    """An array of bytes, once its state is there."""

    values: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, data = state
        if not isinstance(kind, PickledType):
            raise pickle.UnpicklingError("pixels are not an array of uint8")
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")
