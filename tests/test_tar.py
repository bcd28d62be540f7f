"""Tars of image folders: the same images, and what is refused."""

import os
import tarfile

import numpy as np
import pytest
from image_files import load, members_of, write, write_folder, write_tar

from fastcnn.data import examine, tar
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
    monkeypatch.setattr(tar, "GROWTH_GRACE", 1 << 16)
    members = {**members_of(write_folder(root)), "train/ant/zeros.bmp": bytes(4 << 20)}
    path = write_tar(tmp_path / "x.tar.gz", members, "w:gz")
    with pytest.raises(DataError, match="unpacks to over"):
        load(path)


def test_too_long_files_are_refused(root, tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", members_of(write_folder(root)))
    for module in (examine, tar):
        monkeypatch.setattr(module, "MAX_FILE_BYTES", 100)
    for where in (root, path):
        with pytest.raises(DataError, match="bytes, over 100"):
            load(where)


def test_corrupt_image_in_a_tar_is_named(root, tmp_path):
    members = members_of(write_folder(root)) | {"train/bee/0.png": b"text"}
    with pytest.raises(DataError, match=r"train/bee/0\.png: cannot identify"):
        load(write_tar(tmp_path / "x.tar", members))
