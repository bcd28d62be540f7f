"""Tars of image folders: the same images, and what is refused."""

import gzip
import os
import tarfile
import tracemalloc

import numpy as np
import pytest
from image_files import load, members_of, write, write_folder, write_tar

from fastcnn.data.sources import archive, base, tar
from fastcnn.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("own_cache")


# Tars


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("prefix", ["", "./", "top/"])
def test_tar_equals_folder(root, tmp_path, mode, prefix):
    members = members_of(write_folder(root, ("train", "test", "val")))
    shuffled = dict(sorted(members.items(), key=lambda item: hash(item[1])))
    path = write_tar(
        tmp_path / f"x.tar{mode[1:].replace(':', '.')}",
        {prefix + name: data for name, data in shuffled.items()},
        mode,
    )
    before = sorted(tmp_path.iterdir())
    from_tar, from_folder = load(path), load(root)
    assert from_tar.digest == from_folder.digest
    assert from_tar.classes == from_folder.classes
    assert np.array_equal(from_tar.val.pixels, from_folder.val.pixels)
    assert {p.name for p in tmp_path.iterdir()} - {p.name for p in before} == {"cache"}


def test_tar_is_packed_once(root, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", members_of(write_folder(root)))
    first = load(path)
    monkeypatch.setattr(tar, "_list", None)
    assert load(path).digest == first.digest


def special(name, kind, target=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        special("../evil.png", tarfile.REGTYPE),
        special("train/../../evil.png", tarfile.REGTYPE),
        special("/evil.png", tarfile.REGTYPE),
        special("train/ant/link.png", tarfile.SYMTYPE, "/etc/passwd"),
        special("train/ant/link.png", tarfile.LNKTYPE, "train/ant/0.png"),
        special("train/ant/device.png", tarfile.CHRTYPE),
        special("train/ant/fifo.png", tarfile.FIFOTYPE),
    ],
)
def test_dangerous_members_are_refused(root, tmp_path, member):
    path = write_tar(tmp_path / "x.tar", members_of(write_folder(root)))
    with tarfile.open(path, "a") as archive:
        archive.addfile(member)
    with pytest.raises(DataError, match="refused") as error:
        load(path)
    assert member.name in str(error.value)
    assert not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("part", [0.3, 0.5, 0.8])
def test_cut_tar(root, tmp_path, mode, part):
    path = write_tar(tmp_path / "x.tar", members_of(write_folder(root, count=20)), mode)
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(DataError, match="cut"):
        load(path)


def test_tar_cut_between_members(root, tmp_path):
    members = members_of(write_folder(root))
    path = write_tar(tmp_path / "x.tar", members)
    with tarfile.open(path) as archive:
        end = archive.getmembers()[-1].offset
    os.truncate(path, end)
    with pytest.raises(DataError, match="end of the archive is missing"):
        load(path)


def test_garbage_tar_and_wrong_name(tmp_path):
    with pytest.raises(DataError, match="not a tar"):
        load(write(tmp_path / "x.tar", b"garbage" * 1000))
    with pytest.raises(UsageError, match=r"ending in \.tar"):
        load(write(tmp_path / "x.rar", b"garbage"))


def test_tar_with_a_name_twice(root, tmp_path):
    path = write_tar(tmp_path / "x.tar", members_of(write_folder(root)))
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("train/ant/0.png"))
    with pytest.raises(DataError, match="twice"):
        load(path)


def test_tar_that_grows_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "GROWTH_GRACE", 1 << 16)
    members = {**members_of(write_folder(root)), "train/ant/zeros.bmp": bytes(4 << 20)}
    path = write_tar(tmp_path / "x.tar.gz", members, "w:gz")
    with pytest.raises(DataError, match="unpacks to over"):
        load(path)


def test_too_long_files_are_refused(root, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", members_of(write_folder(root)))
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 100)
    for where in (root, path):
        with pytest.raises(DataError, match="bytes, over 100"):
            load(where)


def test_corrupt_image_in_a_tar_is_named(root, tmp_path):
    members = members_of(write_folder(root)) | {"train/bee/0.png": b"text"}
    with pytest.raises(DataError, match=r"train/bee/0\.png: cannot identify"):
        load(write_tar(tmp_path / "x.tar", members))


# Bombs: what is small here and would be large in memory


def peak_of_refusal(path, match):
    """The bytes that Python took up at most until `path` was refused."""
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match):
            load(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def header(kind, size, name="train/ant/0.png"):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def packed(path, *parts):
    with gzip.open(path, "wb", 1) as file:
        for part in parts:
            file.write(part)
    return path


LONG = 32 << 20


@pytest.mark.parametrize("kind", sorted(tar.HEADERS))
@pytest.mark.parametrize("before", [b"", header(tarfile.REGTYPE, 0)])
def test_a_long_header_is_refused_before_it_is_read(tmp_path, kind, before):
    path = packed(tmp_path / "x.tar.gz", before, header(kind, LONG), bytes(LONG), bytes(1024))
    assert path.stat().st_size < LONG // 100
    refusal = rf"x\.tar\.gz: a header of {LONG:,} bytes, over 1,048,576; refused"
    assert peak_of_refusal(path, refusal) < LONG // 8


@pytest.mark.parametrize("declared", [1 << 35, -1])
def test_a_header_of_impossible_length_is_refused(tmp_path, declared):
    path = packed(tmp_path / "x.tar.gz", header(tarfile.XHDTYPE, declared), bytes(1024))
    assert peak_of_refusal(path, r"a header of .* bytes, over 1,048,576; refused") < 1 << 22


def pax(**records):
    """A pax header with these records."""
    text = b""
    for name, value in records.items():
        line = f" {name.replace('_', '.')}={value}\n".encode()
        length = next(n for n in range(len(line), 9999) if len(f"{n}") + len(line) == n)
        text += f"{length}".encode() + line
    return header(tarfile.XHDTYPE, len(text)) + text.ljust(-(-len(text) // 512) * 512, b"\0")


def sparse_table(entries):
    """Pax's sparse file 1.0: its table, of any length, stands in the data."""
    table = f"{entries}\n".encode() + b"0\n" * (2 * entries)
    return (
        pax(GNU_sparse_major=1, GNU_sparse_minor=0, GNU_sparse_realsize=1),
        header(tarfile.REGTYPE, len(table)),
        table,
    )


@pytest.mark.parametrize(
    "parts",
    [
        (header(tarfile.GNUTYPE_SPARSE, 0),),
        (pax(GNU_sparse_map="0,1", GNU_sparse_size=1 << 40), header(tarfile.REGTYPE, 512)),
        (pax(GNU_sparse_size=1 << 40), header(tarfile.REGTYPE, 512)),
        sparse_table(2_000_000),
    ],
    ids=["GNU", "pax 0.1", "pax 0.0", "pax 1.0"],
)
def test_sparse_files_are_refused(tmp_path, parts):
    path = packed(tmp_path / "x.tar.gz", *parts, bytes(1024))
    assert peak_of_refusal(path, r"x\.tar\.gz: a sparse file, .*; refused") < 1 << 22


def test_a_length_below_zero_is_refused(tmp_path):
    """By it, tarfile would come back to the same member again and again."""
    data = (pax(size=-1024), header(tarfile.REGTYPE, 0), bytes(1024))
    with pytest.raises(DataError, match=r"(has -1024 bytes; refused|cut, damaged or not a tar)"):
        load(packed(tmp_path / "x.tar.gz", *data))


@pytest.mark.parametrize("count", [tar.MAX_HEADERS, 2000])
def test_headers_upon_headers_are_refused(tmp_path, count):
    path = packed(
        tmp_path / "x.tar.gz",
        *[pax(comment="x")] * count,
        header(tarfile.REGTYPE, 0),
        bytes(1024),
    )
    with pytest.raises(DataError, match=r"x\.tar\.gz: a member with over 16 headers; refused"):
        load(path)


def test_a_member_may_have_some_headers(root, tmp_path):
    path = write_tar(tmp_path / "x.tar", members_of(write_folder(root)))
    path.write_bytes(pax(comment="x") * (tar.MAX_HEADERS - 1) + path.read_bytes())
    assert len(load(path).train) == len(load(root).train)


def test_many_members_of_nothing_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MEMBERS_GRACE", 100)
    monkeypatch.setattr(archive, "MEMBER_BYTES", 1000)
    names = (header(tarfile.REGTYPE, 0, f"train/ant/{i}.png") for i in range(2000))
    path = packed(tmp_path / "x.tar.gz", *names, bytes(1024))
    most = path.stat().st_size // 1000 + 100
    with pytest.raises(DataError, match=f"holds over {most:,} members; refused"):
        load(path)
