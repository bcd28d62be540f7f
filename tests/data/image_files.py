"""Small image files, folders, archives and arrays for the tests of fastcnn.data."""

import io
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from fastcnn.config import DataConfig
from fastcnn.data import load_dataset
from fastcnn.data.images import Images


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def make_images(count, height=8, width=8, classes=3, seed=0):
    return Images(
        noise((count, height, width, 3), seed), np.arange(count, dtype=np.int64) % classes
    )


def coordinates(count, side=16):
    """Images whose pixel (y, x) holds y in red, x in green and the image's number in blue."""
    y, x = np.mgrid[:side, :side]
    pixels = np.zeros((count, side, side, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = y + 1, x + 1
    pixels[..., 2] = (np.arange(count) % 256)[:, None, None]
    return Images(pixels, np.arange(count, dtype=np.int64))


def encoded(array, format="PNG", **options):  # noqa: A002 - Pillow's word
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def write_folder(root: Path, splits=("train", "test"), classes=("ant", "bee"), count=3, side=8):
    """Write PNG files root/<split>/<class>/<n>.png; an empty split name leaves that level out."""
    for number, split in enumerate(splits):
        for label, name in enumerate(classes):
            for i in range(count):
                image = noise((side, side, 3), seed=100 * number + 10 * label + i)
                write(root / split / name / f"{i}.png", encoded(image))
    return root


def write_tar(path: Path, members: dict[str, bytes], mode="w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def write_zip(path: Path, members: dict[str, bytes], compression=zipfile.ZIP_DEFLATED) -> Path:
    """Write members in this order; a name that ends in / is a folder."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


TINY_WORDS = {"n03": "crane, lifting device", "n01": "crane", "n02": "bee, honey bee"}


def tiny_members(count=3, side=8, tests=0):
    """Tiny ImageNet in small: three classes, `count` training and two validation images a class,
    and `tests` images without labels; by path below its folder."""
    members = {
        "wnids.txt": "".join(f"{wnid}\n" for wnid in TINY_WORDS).encode(),
        "words.txt": b"n00\tentity\n"
        + "".join(f"{wnid}\t{words}\n" for wnid, words in TINY_WORDS.items()).encode(),
    }
    for label, wnid in enumerate(sorted(TINY_WORDS)):
        for i in range(count):
            members[f"train/{wnid}/images/{wnid}_{i}.JPEG"] = image(10 * label + i, side)
        members[f"train/{wnid}/{wnid}_boxes.txt"] = b"x.JPEG\t0\t0\t7\t7\n"
    annotated = [f"val_{i}.JPEG\t{sorted(TINY_WORDS)[i % 3]}\t0\t32\t44\t62\n" for i in range(6)]
    members["val/val_annotations.txt"] = "".join(annotated).encode()
    members |= {f"val/images/val_{i}.JPEG": image(100 + i, side) for i in range(6)}
    return members | {f"test/images/test_{i}.JPEG": image(200 + i, side) for i in range(tests)}


def write_members(root: Path, members: dict[str, bytes]) -> Path:
    for name, data in members.items():
        write(root / name, data)
    return root


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, as in the CIFAR-10 archive."""

    def save_bytes(self, data):
        self.write(pickle.BINSTRING + len(data).to_bytes(4, "little") + data)
        self.memoize(data)

    dispatch = pickle._Pickler.dispatch | {bytes: save_bytes}


def cifar_pickle(pixels, labels) -> bytes:
    file = io.BytesIO()
    batch = {b"batch_label": b"x", b"labels": list(map(int, labels)), b"data": pixels}
    Python2Pickler(file, 2).dump(batch)
    return file.getvalue()


def cifar_batches(count=20):
    """Return {batch: (planes uint8 (count, 3072), labels)} for the six batches."""
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    return {
        name: (noise((count, 3072), seed=n), (np.arange(count) + n) % 10)
        for n, name in enumerate(names)
    }


def cifar_python(batches):
    return {f"cifar-10-batches-py/{name}": cifar_pickle(*b) for name, b in batches.items()}


def cifar_binary(batches):
    return {
        f"cifar-10-batches-bin/{name}.bin": np.hstack(
            [labels[:, None].astype(np.uint8), planes]
        ).tobytes()
        for name, (planes, labels) in batches.items()
    }


def large_png(side):
    """A whole black bilevel PNG: small as a file, side² pixels when it is decoded."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((1 + (side + 7) // 8) * side))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


IN_FILES = {"store": "files", "loader": "torch"}  # options


def load(path, **options):
    return load_dataset(DataConfig(data=str(path), **options), 32)


def members_of(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def image(number=0, side=8):
    return encoded(noise((side, side, 3), seed=number))
