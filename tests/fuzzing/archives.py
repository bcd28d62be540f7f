"""Archives and folders of images, damaged and forged, and their reader, load_dataset."""

import bz2
import gzip
import io
import lzma
import os
import struct
import tarfile
import zipfile
from functools import cache
from pathlib import Path
from random import Random

import numpy as np
from image_files import (
    cifar_batches,
    cifar_binary,
    cifar_python,
    encoded,
    noise,
    tiny_members,
    write,
    write_tar,
)

from fastcnn.config import DataConfig
from fastcnn.data import load_dataset
from fuzzing.guard import Read
from fuzzing.mutations import (
    NAMES,
    NUMBERS,
    change_bytes,
    change_pickle,
    deflated_zeros,
)

FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP"}


@cache
def image_members() -> dict[str, bytes]:
    """Three images in each of two classes, in all formats."""
    endings = [*FORMATS.items()]
    found = {}
    for number in range(6):
        ending, form = endings[number]
        data = encoded(noise((8, 8, 3), seed=number), form)
        found[f"{('ant', 'bee')[number % 2]}/{number}.{ending}"] = data
    found["bee/6.pgm"] = encoded(noise((8, 8), seed=6), "PPM")
    return found


@cache
def tiny() -> dict[str, bytes]:
    return tiny_members(tests=1)


def reading(random: Random, path: Path, **options: object) -> Read:
    """What reads all images of `path`, by one way or another."""
    chosen = {
        "image_size": random.choice((None, 8)),
        "on_bad_image": random.choice(("refuse", "skip")),
        "bad_limit": 1.0,
        "grayscale": random.choice(("convert", "drop")),
        **options,
    }

    def read() -> None:
        found = load_dataset(DataConfig(**{"data": str(path), **chosen}), 8)
        for images in (found.train, found.test, *([found.val] if found.val else ())):
            images.pixels_of(np.arange(len(images)))

    return read


# Tar

# (offset, length) of a header's fields
FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "checksum": (148, 8),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "devmajor": (329, 8),
    "devminor": (337, 8),
    "prefix": (345, 155),
}
PAX = ("path", "size", "linkpath", "mtime", "hdrcharset", "GNU.sparse.map", "GNU.sparse.size")


@cache
def tar_bytes(form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, data in image_members().items():
            info = tarfile.TarInfo(name if form == tarfile.USTAR_FORMAT else f"{'x' * 120}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def change_tar(random: Random, data: bytes) -> bytes:
    """Change fields of headers, mostly with a checksum that agrees, or put members between."""
    changed = bytearray(data)
    starts = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    for _ in range(random.randint(1, 3)):
        at = random.choice(starts)
        header = changed[at : at + 512]
        name = random.choice([*FIELDS])
        start, length = FIELDS[name]
        header[start : start + length] = _field(random, name, length)[:length].ljust(length, b"\0")
        if random.random() < 0.9:
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
        changed[at : at + 512] = header
    if random.random() < 0.3:
        at = random.choice(starts)
        changed[at:at] = _pax(random)
    return bytes(changed)


def _field(random: Random, name: str, length: int) -> bytes:
    if name == "type":
        return random.choice([bytes([c]) for c in b"0123456789LKxgXSVDNMA\0 \xff"])
    if name in ("name", "prefix", "link"):
        return random.choice((*(n.encode() for n in NAMES), b"\xff\xfe/0.png", b"x" * length))
    number = random.choice((*NUMBERS, random.randrange(5000)))
    return random.choice(
        (
            b"%0*o" % (length - 1, number % 8 ** (length - 1)),
            b"\x80" + number.to_bytes(length - 1, "big") if length > 8 else b"\x80\x00\x00\x01",
            b"\xff" * length,
            b"-1",
            b"9x",
            random.randbytes(length),
        )
    )


def _pax(random: Random) -> bytes:
    """A pax header, of one member or of all, with a key and a value that may be anything."""
    value = random.choice((*NAMES, "-1", "1e9", "99999999999", "\udcff", "BINARY", "0,5,1,2"))
    text = f" {random.choice(PAX)}={value}\n".encode("utf-8", "surrogateescape")
    length = random.choice((len(text) + 2, len(text) + 2, 0, 3, 10**6))
    body = str(length).encode() + text
    info = tarfile.TarInfo("pax")
    info.type, info.size = random.choice((tarfile.XHDTYPE, tarfile.XGLTYPE)), len(body)
    return info.tobuf() + body.ljust(512 * (1 + len(body) // 512), b"\0")


def tar(random: Random, folder: Path) -> Read:
    form = random.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    data = tar_bytes(form)
    data = (change_tar if random.random() < 0.8 else change_bytes)(random, data)
    packings = {"tar": bytes, "tar.gz": _gzip, "tar.bz2": bz2.compress, "tar.xz": lzma.compress}
    ending = random.choice([*packings])
    packed = packings[ending](data)
    if ending == "tar.gz" and random.random() < 0.01:
        packed = _tar_bomb(random)
    elif random.random() < 0.2:
        packed = change_bytes(random, packed)
    return reading(random, write(folder / f"images.{ending}", packed))


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def _tar_bomb(random: Random) -> bytes:
    """An image of hundreds of MiB of zeros."""
    mebibytes = random.choice((64, 600))
    info = tarfile.TarInfo("ant/0.png")
    info.size = mebibytes << 20
    return _gzip(info.tobuf()) + b"\x1f\x8b\x08" + bytes(7) + deflated_zeros(mebibytes)


# Zip

# (offset, size) of the fields behind each signature
RECORDS = {
    b"PK\x01\x02": (
        *((4, 2), (6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2)),
        *((34, 2), (36, 2), (38, 4), (42, 4)),
    ),
    b"PK\x03\x04": ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\x05\x06": ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2)),
}


@cache
def zip_bytes(kind: str, compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in (tiny() if kind == "tiny" else image_members()).items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def change_zip(random: Random, data: bytes) -> bytes:
    """Change fields of the central directory, of members' headers and of the end."""
    changed = bytearray(data)
    for _ in range(random.randint(1, 3)):
        kind = random.choice([*RECORDS])
        starts = _found(data, kind)
        if not starts:
            continue
        at = random.choice(starts)
        offset, size = random.choice(RECORDS[kind])
        value = random.choice((*NUMBERS, random.randrange(100), 0xA1FF0000, 0o60644 << 16))
        changed[at + offset : at + offset + size] = (value % 256**size).to_bytes(size, "little")
    return bytes(changed)


def _found(data: bytes, part: bytes) -> list[int]:
    starts, at = [], data.find(part)
    while at >= 0:
        starts.append(at)
        at = data.find(part, at + 1)
    return starts


def rename_in_zip(random: Random, data: bytes) -> bytes:
    """Give a member another name of the same length, or an extra field of another kind."""
    names = [*tiny(), *image_members()]
    old = random.choice([n for n in names if n.encode() in data] or names).encode()
    new = random.choice(NAMES).encode() or b"\xff\xfe"
    return data.replace(old, (new * len(old))[: len(old)])


def zipped(random: Random, folder: Path) -> Read:
    kind = random.choice(("images", "tiny"))
    compression = random.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    )
    chance = random.random()
    if chance < 0.2:
        data = _written_anew(random, compression)
    elif chance < 0.21:
        data = _zip_bomb(random)
    else:
        data = zip_bytes(kind, compression)
        data = random.choice((change_zip, change_zip, rename_in_zip, change_bytes))(random, data)
    if random.random() < 0.1:
        data = change_bytes(random, data, 1)
    return reading(random, write(folder / "images.zip", data))


def _written_anew(random: Random, compression: int) -> bytes:
    """Odd names, sound otherwise; or Tiny ImageNet with odd lists."""
    file = io.BytesIO()
    members = dict(image_members())
    if random.random() < 0.5:
        members = change_lists(random, dict(tiny()))
    else:
        for _ in range(random.randint(1, 3)):
            members[random.choice(NAMES[6:]) or "x"] = random.choice([*members.values()])
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return file.getvalue()


def _zip_bomb(random: Random) -> bytes:
    """A member that unpacks to hundreds of MiB of zeros."""
    mebibytes = random.choice((64, 600))
    data = deflated_zeros(mebibytes)
    name = b"ant/0.png"
    sizes = struct.pack("<IIIHH", 0, len(data), mebibytes << 20, len(name), 0)
    local = b"PK\x03\x04" + struct.pack("<HHHHH", 20, 0, 8, 0, 33) + sizes + name + data
    start = b"PK\x01\x02" + struct.pack("<HHHHHH", 20, 20, 0, 8, 0, 33) + sizes
    central = start + struct.pack("<HHHII", 0, 0, 0, 0, 0) + name
    end = struct.pack("<HHHHIIH", 0, 0, 1, 1, len(central), len(local), 0)
    return local + central + b"PK\x05\x06" + end


# CIFAR-10, Tiny ImageNet and folders


@cache
def cifar_members(kind: str) -> dict[str, bytes]:
    return (cifar_python if kind == "python" else cifar_binary)(cifar_batches(2))


def cifar(random: Random, folder: Path) -> Read:
    kind = random.choice(("python", "python", "python", "binary"))
    members = dict(cifar_members(kind))
    name = random.choice([*members])
    change = change_pickle if kind == "python" and random.random() < 0.7 else change_bytes
    members[name] = change(random, members[name])
    for path, data in members.items():
        write(folder / path, data)
    if random.random() < 0.05:
        write_tar(folder / "cifar-10-python.tar.gz", members, "w:gz")
    return reading(random, folder, data="cifar10", data_dir=str(folder))


LISTS = ("wnids.txt", "words.txt", "val/val_annotations.txt")
LINES = (
    b"n01\n",
    b"n09\n",
    b"\t\t\n",
    b"n01\tval_0.JPEG\n",
    b"val_0.JPEG\tn01\n",
    b"\xff\n",
    b"\0\n",
)


def change_lists(random: Random, members: dict[str, bytes]) -> dict[str, bytes]:
    """Change Tiny ImageNet's lists, by lines or bytes, or take files away."""
    name = random.choice(LISTS)
    kind = random.randrange(4)
    if kind == 0:
        members[name] = change_bytes(random, members[name], 2)
    elif kind == 1:
        lines = members[name].splitlines(keepends=True)
        lines.insert(random.randrange(len(lines)), random.choice((*LINES, *lines)))
        members[name] = b"".join(lines)
    elif kind == 2:
        members.pop(random.choice([*members]))
    else:
        lines = members[name].splitlines(keepends=True)
        random.shuffle(lines)
        members[name] = b"".join(lines[: random.randrange(len(lines) + 1)])
    return members


def tiny_folder(random: Random, folder: Path) -> Read:
    root = folder / "tiny"
    for name, data in change_lists(random, dict(tiny())).items():
        write(root / name, data)
    if random.random() < 0.3:
        add_odd_entry(random, root)
    return reading(random, root, **_store(random))


def images(random: Random, folder: Path) -> Read:
    root = folder / "images"
    members = dict(image_members())
    for _ in range(random.randint(0, 2)):
        name = random.choice([*members])
        members[name] = change_bytes(random, members[name])
    for name, data in members.items():
        write(root / name, data)
    if random.random() < 0.4:
        add_odd_entry(random, root)
    return reading(random, root, **_store(random))


def _store(random: Random) -> dict[str, object]:
    return random.choice(({"store": "packed"}, {"store": "files", "loader": "torch"}))


def add_odd_entry(random: Random, root: Path) -> None:
    """Put a link, a pipe, an empty folder or an odd name into a folder."""
    inside = random.choice((root, root / "ant", root / "train"))
    inside.mkdir(exist_ok=True)
    kind = random.randrange(6)
    names = (b"a\nb", b"\xff\xfe", b"x" * 200, b"a\x1b[2J", b".hidden", b"cow", b"3.png", b"val")
    path = os.path.join(os.fsencode(inside), random.choice(names))
    if os.path.exists(path):
        return
    if kind == 0:
        os.symlink(random.choice((b"..", b"nowhere", b"/etc/passwd", b".", b"/dev/zero")), path)
    elif kind == 1:
        os.mkfifo(path)
    elif kind == 2:
        os.mkdir(path)
    elif kind == 3:
        os.mkdir(path)
        Path(os.fsdecode(path), "0.png").write_bytes(image_members()["ant/0.png"])
    else:
        Path(os.fsdecode(path)).write_bytes(image_members()["ant/0.png"])
