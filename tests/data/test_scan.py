"""The scan: only what is new is examined, a damaged one is done again."""

import logging
import os
from dataclasses import replace

import numpy as np
import pytest
from image_files import IN_FILES, encoded, image, load, noise, write, write_folder

from fastcnn.data import examine
from fastcnn.data.examine import View
from fastcnn.data.scan import ARRAYS, scan_images
from fastcnn.data.sources import base
from fastcnn.data.sources.folder import Folder, list_folder
from fastcnn.data.sources.layout import listed
from fastcnn.errors import DataError

OWN_SIZE = View(None, "stretch")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    path = tmp_path / "cache"
    path.mkdir()
    monkeypatch.setenv("FASTCNN_CACHE", str(path))
    return path


@pytest.fixture
def decoded(monkeypatch):
    """What was decoded for a scan."""
    calls = []
    real = examine.decode
    monkeypatch.setattr(examine, "decode", lambda data: calls.append(data) or real(data))
    return calls


def scanned(root, where=None):
    return scanning(root, where).finish()


def scanning(root, where=None):
    files, _ = list_folder(root)
    found = listed(str(root), ("x", "y"), {"train": [(path, 0) for path in sorted(files)]}, 0)
    contents = Folder(root, files, found).contents()
    return scan_images(replace(contents, where=where or root), OWN_SIZE, keep_pixels=False)


def assert_same(first, second):
    for name in ARRAYS:
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert first.reasons == second.reasons


def damaged(root):
    write(write_folder(root) / "train/ant/1.png", b"")
    write(root / "test/bee/2.png", b"text")
    return root


def test_what_is_known_comes_back(root, decoded):
    first = scanned(damaged(root))
    assert len(decoded) == 12
    assert_same(scanned(root), first)
    assert len(decoded) == 12
    assert first.reasons == {5: "cannot identify image file", 7: "empty"}


def test_only_new_and_changed_files_are_examined(root, tmp_path, decoded):
    scanned(damaged(root))
    decoded.clear()
    write(root / "train/ant/0.png", image(50))
    write(root / "train/ant/9.png", image(51))
    os.remove(root / "train/bee/1.png")
    again = scanned(root)
    assert sorted(decoded) == sorted([image(50), image(51)])
    # all of it examined by one that knows nothing
    (tmp_path / "copy").mkdir()
    (root / "train").rename(tmp_path / "copy" / "train")
    (root / "test").rename(tmp_path / "copy" / "test")
    assert_same(again, scanned(tmp_path / "copy"))
    assert len(decoded) == 14


def test_only_what_is_seen_asks_for_another_scan(root, decoded):
    write_folder(root, ("",), count=5)
    write(root / "ant/grey.png", encoded(noise((8, 8))))
    load(root, **IN_FILES)
    assert len(decoded) == 11
    for options in (
        {"grayscale": "drop"},
        {"on_bad_image": "skip"},
        {"test_fraction": 0.4},
        {"test_fraction": 0.4, "grayscale": "drop"},
    ):
        load(root, **IN_FILES, **options)
    assert len(decoded) == 11
    load(root, image_size=12, **IN_FILES)
    load(root, image_size=12, resize="crop", **IN_FILES)
    assert len(decoded) == 33


def test_a_file_that_could_not_be_read_is_tried_again(root, monkeypatch, decoded):
    write_folder(root)
    real = base.read_stamped

    def fail(path, length):
        if path.name == "1.png":
            raise examine.BadImageError("Input/output error")
        return real(path, length)

    with monkeypatch.context() as patch:
        patch.setattr(base, "read_stamped", fail)
        assert len(scanned(root).reasons) == 4
    assert len(decoded) == 8
    assert not scanned(root).reasons
    assert len(decoded) == 12


def cut(path):
    os.truncate(path, path.stat().st_size - 100)


def garble_contents(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)


def garble_start(path):
    path.write_bytes(b"\0" * 40 + path.read_bytes()[40:])


def rewrite(path, change):
    with np.load(path) as held:
        arrays = {name: held[name] for name in held}
    change(arrays)
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def leave_out_an_array(path):
    rewrite(path, lambda arrays: arrays.pop("sums"))


def shorten_an_array(path):
    rewrite(path, lambda arrays: arrays.update(grey=arrays["grey"][:-1]))


def retype_an_array(path):
    rewrite(path, lambda arrays: arrays.update(stamps=arrays["stamps"].astype(np.float64)))


def pickle_it(path):
    with open(path, "wb") as file:
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)


def empty(path):
    path.write_bytes(b"")


DAMAGES = [
    cut,
    garble_contents,
    garble_start,
    leave_out_an_array,
    shorten_an_array,
    retype_an_array,
    pickle_it,
    empty,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_scan_is_done_again(root, cache, caplog, decoded, damage):
    first = scanned(damaged(root))
    (path,) = cache.iterdir()
    damage(path)
    assert_same(scanned(root), first)
    assert len(decoded) == 24
    assert "is damaged" in caplog.text
    scanned(root)
    assert len(decoded) == 24


def test_full_disk_costs_the_cache_alone(root, cache, caplog, monkeypatch):
    def full(*args, **arrays):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez", full)
    assert len(scanned(write_folder(root)).shapes) == 12
    assert "No space left" in caplog.text
    assert not list(cache.iterdir())


def test_the_scan_ends_at_the_first_odd_size(root, decoded, monkeypatch):
    monkeypatch.setattr(examine, "CHUNK", 2)
    write(write_folder(root, count=20) / "train/ant/1.png", encoded(noise((6, 9, 3))))
    with pytest.raises(DataError, match=r"train/ant/1\.png has 9 x 6"):
        load(root, **IN_FILES)
    assert len(decoded) < 10


@pytest.mark.parametrize("end", [KeyboardInterrupt, DataError])
def test_what_a_scan_has_examined_is_kept_however_it_ends(root, decoded, monkeypatch, end):
    monkeypatch.setattr(examine, "CHUNK", 2)
    chunks = scanning(damaged(root)).chunks
    for _ in range(3):
        next(chunks)
    with pytest.raises(end):
        chunks.throw(end)
    assert len(decoded) == 6
    again = scanned(root)
    assert len(decoded) == 12
    assert_same(again, scanned(root))
    monkeypatch.setenv("FASTCNN_CACHE", str(root.parent / "other"))
    assert_same(again, scanned(root))


@pytest.mark.parametrize(("limit", "lines"), [(12, []), (11, ["examining images: 12"])])
def test_a_long_scan_is_announced(root, caplog, monkeypatch, limit, lines):
    monkeypatch.setattr("fastcnn.data.scan.SLOW_IMAGES", limit)
    caplog.set_level(logging.INFO)
    scanned(write_folder(root))
    assert [record.getMessage() for record in caplog.records] == lines


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_keep_the_order(root, monkeypatch, threads):
    monkeypatch.setattr(examine, "THREADED_BYTES", 0 if threads > 1 else 1 << 20)
    monkeypatch.setattr(examine, "CHUNK", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(threads))
    found = scanned(write_folder(root, ("train",), count=9))
    for i in range(9):
        assert np.array_equal(found.sums[9 + i, :3], noise((8, 8, 3), seed=10 + i).sum((0, 1)))
