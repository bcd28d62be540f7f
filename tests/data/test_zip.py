"""Zips of image folders: the same images, and what is refused."""

import copy
import os
import stat
import tracemalloc
import zipfile
from pathlib import PurePosixPath

import numpy as np
import pytest
from image_files import image, load, members_of, write, write_folder, write_zip

from fastcnn.data.sources import archive as archives
from fastcnn.data.sources import base
from fastcnn.data.sources import zip as zip_reader
from fastcnn.data.sources.layout import normal_name
from fastcnn.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


def members(root):
    return members_of(write_folder(root))


@pytest.mark.parametrize(
    "compression",
    [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA],
)
@pytest.mark.parametrize("prefix", ["", "./", "top/"])
def test_zip_equals_folder(root, tmp_path, compression, prefix):
    files = members_of(write_folder(root, ("train", "test", "val")))
    shuffled = dict(sorted(files.items(), key=lambda item: hash(item[1])))
    path = write_zip(
        tmp_path / "x.zip",
        {f"{prefix}train/": b""} | {prefix + name: data for name, data in shuffled.items()},
        compression,
    )
    before = {entry.name for entry in tmp_path.iterdir()}
    from_zip, from_folder = load(path), load(root)
    assert from_zip.digest == from_folder.digest
    assert from_zip.classes == from_folder.classes
    assert np.array_equal(from_zip.train.pixels, from_folder.train.pixels)
    assert np.array_equal(from_zip.val.pixels, from_folder.val.pixels)
    # nothing is extracted
    assert {entry.name for entry in tmp_path.iterdir()} - before == {"cache"}


def test_zip_is_known_by_its_first_bytes_too(root, tmp_path):
    path = write_zip(tmp_path / "archive", members(root))
    assert load(path).classes == ("ant", "bee")


def test_zip_is_packed_once_and_again_when_it_changes(root, tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.zip", members(root))
    first = load(path)
    with monkeypatch.context() as patched:
        patched.setattr(zip_reader, "_list", None)
        assert load(path).digest == first.digest
    write_zip(path, members(root) | {"train/ant/9.png": members(root)["train/bee/1.png"]})
    assert len(load(path).train) == len(first.train) + 1


def test_folder_without_splits_keeps_its_split(root, tmp_path):
    files = members_of(write_folder(root, ("",), count=10))
    path = write_zip(tmp_path / "x.zip", files)
    for fraction, tested in ((0.3, 6), (0.2, 4)):
        dataset = load(path, test_fraction=fraction)
        assert (len(dataset.train), len(dataset.test)) == (20 - tested, tested)
        assert dataset.digest == load(root, test_fraction=fraction).digest


def test_metadata_of_macos_is_no_class(root, tmp_path):
    files = {f"top/{name}": data for name, data in members(root).items()}
    extra = {f"__MACOSX/top/train/ant/._{i}.png": b"x" for i in range(3)}
    extra |= {"__MACOSX/": b"", "__MACOSX/top/": b"", "top/.DS_Store": b"x"}
    path = write_zip(tmp_path / "x.zip", files | extra)
    assert load(path).digest == load(root).digest


def special(name, mode=0, data=b"x"):
    info = zipfile.ZipInfo(name)
    info.external_attr = (mode | 0o644) << 16 if mode else 0
    return info, data


@pytest.mark.parametrize(
    "member",
    [
        special("../evil.png"),
        special("train/../../evil.png"),
        special("/evil.png"),
        special("train/ant/link.png", stat.S_IFLNK, b"/etc/passwd"),
        special("train/ant/device.png", stat.S_IFCHR),
        special("train/ant/fifo.png", stat.S_IFIFO),
    ],
)
def test_dangerous_members_are_refused(root, tmp_path, member):
    path = write_zip(tmp_path / "x.zip", members(root))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(*member)
    with pytest.raises(DataError, match="refused") as error:
        load(path)
    assert f"'{member[0].filename}'" in str(error.value)
    assert not list(tmp_path.rglob("evil*"))


def test_name_twice(root, tmp_path):
    path = write_zip(tmp_path / "x.zip", members(root))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("./train/ant/0.png", b"x")
    with pytest.raises(DataError, match=r"holds train/ant/0\.png twice"):
        load(path)


def altered_flags(path, bit):
    """Set a flag of every member, in the archive's directory and before the members."""
    data = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = data.find(signature)
        while at >= 0:
            data[at + offset] |= bit
            at = data.find(signature, at + 4)
    path.write_bytes(data)
    return path


def test_encrypted_members_are_refused(root, tmp_path):
    path = altered_flags(write_zip(tmp_path / "x.zip", members(root)), zip_reader.ENCRYPTED)
    with pytest.raises(DataError, match=r"member 'test/ant/0\.png' is encrypted; unpack it"):
        load(path)


@pytest.mark.parametrize("part", [0, 0.3, 0.5, 0.9, 0.999])
def test_cut_zip(root, tmp_path, part):
    path = write_zip(tmp_path / "x.zip", members(root))
    os.truncate(path, int(path.stat().st_size * part))
    with pytest.raises(DataError, match=r"x\.zip: cut, damaged or not a zip \(.*get it again"):
        load(path)


def test_garbage_with_a_zips_name_or_start(tmp_path):
    for path in (tmp_path / "x.zip", tmp_path / "x"):
        with pytest.raises(DataError, match="not a zip"):
            load(write(path, b"PK\x03\x04" + b"garbage" * 1000))


@pytest.mark.parametrize(
    "compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_flipped_bit_in_a_member_is_named(root, tmp_path, compression):
    path = write_zip(tmp_path / "x.zip", members(root), compression)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("train/bee/1.png")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"1 unreadable image file: train/bee/1\.png: ") as error:
        load(path)
    assert "damaged in the zip (" in str(error.value)
    assert "\n" not in str(error.value)
    found = load(path, on_bad_image="skip", bad_limit=0.2)
    assert [path for path, _ in found.left_out.bad] == ["train/bee/1.png"]
    assert len(found.train) + len(found.test) == len(members(root)) - 1


def with_other_name(path, name):
    """Alter a member's name where its data stand, to zeros, which are quoted fourfold."""
    data = bytearray(path.read_bytes())
    at = data.index(name.encode())
    data[at : at + len(name)] = bytes(len(name))
    path.write_bytes(data)
    return path


def test_a_reason_does_not_quote_kilobytes(root, tmp_path):
    name = f"train/bee/{'long' * 1000}.png"
    path = write_zip(tmp_path / "x.zip", members(root) | {name: image()})
    found = load(with_other_name(path, name), on_bad_image="skip", bad_limit=0.2)
    ((_, reason),) = found.left_out.bad
    assert reason.startswith("damaged in the zip (File name in directory ")
    assert len(reason) < 250


def test_damage_without_words_has_the_name_of_its_kind(root, tmp_path, monkeypatch):
    def fail(*_):
        raise EOFError

    path = write_zip(tmp_path / "x.zip", members(root))
    monkeypatch.setattr(zip_reader, "_read", fail)
    with pytest.raises(DataError, match=r"damaged in the zip \(EOFError\)"):
        load(path)
    monkeypatch.setattr(zip_reader, "_list", fail)
    with pytest.raises(DataError, match=r"cut, damaged or not a zip \(EOFError\)"):
        load(write_zip(tmp_path / "y.zip", members(root)))


def test_a_fault_of_the_disk_is_no_damage_of_a_member(root, tmp_path, monkeypatch):
    path = write_zip(tmp_path / "x.zip", members(root))

    def fail(file, count):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(zipfile.ZipExtFile, "read", fail)
    with pytest.raises(DataError, match=r"cannot read .*x\.zip: Input/output error"):
        load(path, on_bad_image="skip", bad_limit=1.0)


def test_zip_that_grows_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "GROWTH_GRACE", 1 << 16)
    path = write_zip(tmp_path / "x.zip", members(root) | {"train/ant/zeros.bmp": bytes(4 << 20)})
    with pytest.raises(DataError, match="unpacks to over"):
        load(path)


def test_member_that_holds_more_than_it_says_is_refused(root, tmp_path):
    path = write_zip(tmp_path / "x.zip", members(root) | {"train/ant/9.bmp": bytes(4 << 20)})
    data = bytearray(path.read_bytes())
    size = (4 << 20).to_bytes(4, "little")
    while (at := data.find(size)) >= 0:
        data[at : at + 4] = (100).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"train/ant/9\.bmp: damaged in the zip .*CRC"):
        load(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_member_that_says_too_little_is_not_inflated_whole(root, tmp_path, compression):
    long = 64 << 20
    files = members(root) | {"train/ant/9.bmp": bytes(long)}
    path = write_zip(tmp_path / "x.zip", files, compression)
    path.write_bytes(path.read_bytes().replace(long.to_bytes(4, "little"), b"d\0\0\0"))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"train/ant/9\.bmp: damaged in the zip .*CRC"):
            load(path)
        # LZMA makes 28 MB of the least that zipfile hands it, and joins them once more
        assert tracemalloc.get_traced_memory()[1] < 1.5 * long
    finally:
        tracemalloc.stop()


def test_members_that_share_their_data_are_refused(root, tmp_path, monkeypatch):
    """A bomb of one kernel, which every entry of the directory inflates anew."""
    monkeypatch.setattr(archives, "GROWTH_GRACE", 1 << 20)
    path = write_zip(tmp_path / "x.zip", members(root) | {"train/ant/9.bmp": bytes(1 << 20)})
    with zipfile.ZipFile(path, "a") as archive:
        kernel = archive.getinfo("train/ant/9.bmp")
        for number in range(10, 30):
            shared = copy.copy(kernel)
            shared.filename = f"train/ant/{number}.bmp"
            archive.filelist.append(shared)
        archive._didModify = True
    monkeypatch.setattr(zip_reader, "_read", None)
    with pytest.raises(DataError, match=r"unpacks to over [\d,]+ bytes; refused|[Oo]verlap"):
        load(path)


def test_too_long_members_are_named(root, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "MAX_FILE_BYTES", 100)
    with pytest.raises(DataError, match="bytes, over 100"):
        load(write_zip(tmp_path / "x.zip", members(root)))


def test_corrupt_image_in_a_zip_is_named(root, tmp_path):
    files = members(root) | {"train/bee/0.png": b"text"}
    with pytest.raises(DataError, match=r"train/bee/0\.png: cannot identify"):
        load(write_zip(tmp_path / "x.zip", files))


def test_large_images_are_decoded_in_threads(tmp_path):
    files = {
        f"{name}/{i}.png": image(number, side=80)
        for number, name in enumerate(("ant", "bee"))
        for i in range(40)
    }
    dataset = load(write_zip(tmp_path / "x.zip", files), image_size=8)
    assert len(dataset.train) + len(dataset.test) == 80


def test_empty_zip(tmp_path):
    with pytest.raises(DataError, match="no files"):
        load(write_zip(tmp_path / "x.zip", {}))


@pytest.mark.parametrize("name", ["a/b.png", "./a//b/./c", "a/", ".", "", "a/.b/..c/ d", "a\\b/c."])
def test_names_are_as_pathlib_has_them(name):
    assert normal_name(name) == str(PurePosixPath(name))
