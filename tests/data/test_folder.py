"""Image folders: layouts, packing, bad files."""

import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
from image_files import (
    IN_FILES,
    encoded,
    image,
    large_png,
    load,
    members_of,
    noise,
    write,
    write_folder,
    write_tar,
)

from fastcnn.data import examine, store
from fastcnn.data.decode import BadImageError, decode
from fastcnn.data.sources import base, folder
from fastcnn.data.sources.layout import listed
from fastcnn.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")


# Layouts


def test_train_and_test_folders(root):
    dataset = load(write_folder(root))
    assert dataset.name == "images"
    assert dataset.classes == ("ant", "bee")
    assert dataset.val is None
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(dataset.train.pixels[4], noise((8, 8, 3), seed=11))
    assert np.array_equal(dataset.test.pixels[4], noise((8, 8, 3), seed=111))


def test_val_alone_is_the_test_set(root):
    dataset = load(write_folder(root, ("train", "val")))
    assert dataset.val is None
    assert np.array_equal(dataset.test.pixels[0], noise((8, 8, 3), seed=100))


def test_val_beside_test_is_for_validation(root):
    dataset = load(write_folder(root, ("train", "test", "val")))
    assert np.array_equal(dataset.test.pixels[0], noise((8, 8, 3), seed=100))
    assert np.array_equal(dataset.val.pixels[0], noise((8, 8, 3), seed=200))


@pytest.mark.parametrize("split", ["", "train"])
@pytest.mark.parametrize(("fraction", "held"), [(0.2, 2), (0.5, 5), (0.01, 1), (0.99, 9)])
def test_class_folders_are_split_by_class(root, split, fraction, held):
    dataset = load(write_folder(root, (split,), ("ant", "bee", "cow"), 10), test_fraction=fraction)
    assert np.bincount(dataset.test.labels).tolist() == [held] * 3
    assert np.bincount(dataset.train.labels).tolist() == [10 - held] * 3
    images = np.concatenate([dataset.train.pixels, dataset.test.pixels])
    assert len({bytes(pixels) for pixels in images}) == 30


def test_nested_outer_and_hidden(root):
    write_folder(root / "outer" / "inner", ("train", "test"))
    write(root / "outer/inner/train/ant/more/deep.png", image(500))
    write(root / "outer/inner/train/ant/.hidden.png", b"not an image")
    write(root / ".git/config", b"x")
    dataset = load(root)
    assert np.bincount(dataset.train.labels).tolist() == [4, 3]


def test_other_files_are_counted(root, caplog):
    write_folder(root)
    write(root / "train/ant/notes.txt", b"x")
    write(root / "README.md", b"x")
    with caplog.at_level(logging.WARNING):
        dataset = load(root)
    assert "2 files left out" in caplog.text
    assert len(dataset.train) == 6


def test_links_are_followed_and_loops_end(root, tmp_path):
    write_folder(tmp_path / "elsewhere", ("",))
    write_folder(root)
    for split in ("train", "test"):
        (root / split / "cow").symlink_to(tmp_path / "elsewhere" / "ant")
    (tmp_path / "elsewhere" / "ant" / "loop").symlink_to(root / "train")
    dataset = load(root)
    assert dataset.classes == ("ant", "bee", "cow")
    # under test/cow/loop the training folder is seen once more, but not under itself
    assert np.bincount(dataset.train.labels).tolist() == [3, 3, 3]


def test_folders_that_link_to_each_other_are_refused(root):
    names = [f"c{i}" for i in range(9)]
    write_folder(root, ("",), names, count=2)
    for name in names:
        for other in set(names) - {name}:
            (root / name / other).symlink_to(root / other)
    with pytest.raises(DataError, match=rf"{root}: links lead to {root}/c\d more than 16 times"):
        load(root)


def test_a_folder_may_be_linked_a_few_times(root, tmp_path):
    write_folder(tmp_path / "elsewhere", ("",), ("shared",))
    for i in range(folder.MOST_VISITS // 2):
        for split in ("train", "test"):
            (root / split).mkdir(parents=True, exist_ok=True)
            (root / split / f"c{i}").symlink_to(tmp_path / "elsewhere" / "shared")
    assert len(load(root).classes) == 8


def test_fingerprint_decides_on_packing_again(root, monkeypatch):
    write_folder(root)
    calls = []
    real = examine.decode
    monkeypatch.setattr(examine, "decode", lambda *args: calls.append(1) or real(*args))
    first = load(root)
    assert len(calls) == 12
    load(root)
    assert len(calls) == 12
    load(root, image_size=16)
    assert len(calls) == 24
    write(root / "train/ant/0.png", image(99))
    os.utime(root / "train/ant/0.png", (1, 1))
    assert load(root).digest != first.digest
    assert len(calls) == 36


def bitmap(number):
    return encoded(noise((8, 8, 3), seed=number), "BMP")  # of one length, whatever it shows


def write_bitmaps(root, first):
    for number, name in enumerate(["ant/0", "ant/1", "bee/0", "bee/1"]):
        path = write(root / f"{name}.bmp", bitmap(first + number))
        os.utime(path, (1, 1))
    return root


def test_folders_of_equal_names_sizes_and_times_are_told_apart(root, tmp_path, monkeypatch):
    def without_ctime(entry):
        status = entry.stat()
        names = ("st_mode", "st_size", "st_mtime_ns")
        return SimpleNamespace(st_ctime_ns=0, **{name: getattr(status, name) for name in names})

    # the path alone must do, also where two unpackings fall into one tick of the clock
    monkeypatch.setattr(folder, "_status", without_ctime)
    first = load(write_bitmaps(root, 0))
    assert load(write_bitmaps(tmp_path / "other" / "images", 10)).digest != first.digest


def test_contents_replaced_under_an_old_mtime_are_seen(root, tmp_path):
    first = load(write_bitmaps(root, 0))
    assert load(write_bitmaps(root, 10)).digest != first.digest
    path = tmp_path / "x.tar"
    digests = []
    for number in (0, 10):
        os.utime(write_tar(path, members_of(write_bitmaps(root, number))), (1, 1))
        digests.append(load(path).digest)
    assert digests[0] != digests[1]


@pytest.mark.parametrize("outer", ["", "outer"])
@pytest.mark.parametrize(
    "splits", [("Train", "Test"), ("TRAIN", "val", "Test"), ("train", "VAL"), ("Train",)]
)
def test_splits_in_capitals(root, splits, outer):
    write_folder(root / outer, splits, count=5)
    dataset = load(root)
    assert dataset.classes == ("ant", "bee")
    assert (dataset.val is not None) == (len(splits) == 3)
    assert len(dataset.train) == (8 if len(splits) == 1 else 10)


@pytest.mark.parametrize("outer", ["", "outer"])
@pytest.mark.parametrize(
    "splits", [("training", "testing"), ("Training", "Testing", "Validation", "x")]
)
def test_misnamed_splits_are_refused(root, splits, outer):
    write_folder(root / outer, splits)
    with pytest.raises(DataError, match=r"same folders \(ant, bee\).*expected train/ with test/"):
        load(root)


def test_classes_with_folders_inside_are_no_splits(root):
    # Tiny ImageNet has <class>/images/; and under train/ nothing is guessed
    write_folder(root / "one", ("ant", "bee"), ("images",))
    assert load(root / "one").classes == ("ant", "bee")
    write_folder(root / "two" / "train", ("ant", "bee"), ("left", "right"))
    assert load(root / "two").classes == ("ant", "bee")
    write(write_folder(root / "three", ("ant", "bee"), ("left", "right")) / "ant/0.png", image())
    assert load(root / "three").classes == ("ant", "bee")
    write_folder(root / "four", ("ant", "bee"), ("left", "right"))
    write_folder(root / "four", ("cow",), ("left", "front"))
    assert load(root / "four").classes == ("ant", "bee", "cow")


@pytest.mark.parametrize("name", ["train/caf\udce9/0.png", "train/ant/caf\udce9.png"])
def test_names_that_are_not_utf8_are_refused(root, tmp_path, name):
    write(write_folder(root) / name, image())
    archive = write_tar(tmp_path / "x.tar", members_of(root))
    for path in (root, archive):
        with pytest.raises(DataError, match=r"caf\\udce9.* is not UTF-8; rename it") as error:
            load(path)
        assert str(error.value).isascii()
    (root / name).rename(root / "train/ant/.caf\udce9")
    if name.startswith("train/caf"):
        (root / name).parent.rmdir()
    assert len(load(root).train) == 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root.mkdir(), "no files"),
        (lambda root: write_folder(root, ("train", "test"), ("ant",)), "one class only"),
        (lambda root: write_folder(root, ("test",)), "has test/ but no train/"),
        (lambda root: write_folder(root, ("train", "valid")), "train/ and valid/"),
        (lambda root: write_folder(root, ("Train", "valid")), "Train/ and valid/.*rename it"),
        (lambda root: write_folder(root, ("Train", "train")), "has Train/ and train/; keep one"),
        (lambda root: write_folder(root, ("Test",)), "has Test/ but no train/"),
        (lambda root: write(root / "a.png", image()), "no class folders"),
        (lambda root: write_folder(root, ("",), count=1), "one image"),
        (lambda root: (write_folder(root) / "train" / "cow").mkdir(), "cow: no images"),
        (
            lambda root: write(write_folder(root) / "train/cow/x.txt", b"x"),
            r"cow: no images; x.txt has no image's extension",
        ),
        (
            lambda root: write(write_folder(root) / "test/cow/0.png", image()),
            "class 'cow' is in the test images, not in train",
        ),
        (
            lambda root: write(write_folder(root) / "train/cow/0.png", image()),
            "class 'cow' is in the train images, not in test",
        ),
    ],
)
def test_bad_layouts(root, make, message):
    make(root)
    with pytest.raises(DataError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


# Sizes


def test_different_sizes_name_the_odd_file(root):
    write(write_folder(root) / "train/bee/1.png", encoded(noise((6, 9, 3))))
    with pytest.raises(
        DataError, match=r"train/bee/1\.png has 9 x 6 .*train/ant/0\.png 8 x 8.*--image-size 8"
    ):
        load(root)


def test_image_size_makes_one_size(root):
    write(write_folder(root) / "train/bee/1.png", encoded(noise((6, 9, 3))))
    dataset = load(root, image_size=12)
    assert dataset.train.pixels.shape == (6, 12, 12, 3)
    assert dataset.test.pixels.shape == (6, 12, 12, 3)


def test_equal_oblong_images_are_kept(root):
    for path in write_folder(root).rglob("*.png"):
        path.write_bytes(encoded(noise((6, 9, 3))))
    assert load(root).train.pixels.shape == (6, 6, 9, 3)


# Unreadable files


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"this is text", "cannot identify image file"),
        (encoded(noise((32, 32, 3)))[:-300], ""),
        (encoded(noise((32, 32, 3)), "JPEG")[:400], "(?i)truncated"),
        (large_png(10_000), "pixels"),
        (large_png(20_000), "pixels"),
        (bytes(1000), "cannot identify image file"),
    ],
)
def test_undecodable(data, message, recwarn):
    with pytest.raises(BadImageError, match=message):
        decode(data)


def test_bad_files_are_named_and_counted(root, recwarn):
    write_folder(root, count=8)
    for i, data in enumerate([b"", b"text", large_png(20_000), large_png(9999)]):
        write(root / f"train/ant/{i}.png", data)
    write(root / "test/bee/7.png", image()[:60])
    with pytest.raises(DataError, match=r"5 unreadable .*train/ant/0\.png: empty.*and 2 more") as e:
        load(root)
    assert "\n" not in str(e.value)
    assert not list(recwarn)


def test_one_bad_file_is_singular(root):
    write(write_folder(root) / "train/ant/0.png", b"")
    with pytest.raises(
        DataError, match=r"1 unreadable image file: .*empty; .* remove it, or leave it out with"
    ):
        load(root)


def test_broken_link_to_an_image_is_one_bad_file(root):
    write(write_folder(root) / "train/ant/0.png", b"")
    (root / "train/bee/9.png").symlink_to("nowhere")
    (root / "test/bee/9.png").symlink_to("9.png")
    with pytest.raises(
        DataError,
        match=r"3 unreadable .*ant/0\.png: empty; train/bee/9\.png: No such file.*9\.png: Too many",
    ):
        load(root)


def test_broken_link_that_may_be_a_class_is_named(root):
    (write_folder(root) / "train/cow").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"train/cow: broken link \(No such file"):
        load(root)


@pytest.mark.parametrize("archived", [False, True])
def test_packing_is_announced_from_some_size_on(root, tmp_path, caplog, monkeypatch, archived):
    path = write_folder(root)
    if archived:
        path = write_tar(tmp_path / "x.tar", members_of(root))
    caplog.set_level(logging.INFO)
    load(path)
    assert not caplog.records
    monkeypatch.setattr(store, "SLOW_IMAGES", 11)
    load(path, image_size=16)
    assert [record.getMessage() for record in caplog.records] == ["packing images: 12"]


def test_file_cut_between_listing_and_reading(root, monkeypatch):
    write_folder(root)
    real = folder.Folder.contents

    def cut_first(source):
        os.truncate(root / "train/ant/0.png", 20)
        return real(source)

    monkeypatch.setattr(folder.Folder, "contents", cut_first)
    with pytest.raises(
        DataError, match=r"train/ant/0\.png: changed: .* when it was listed, 20 now"
    ):
        load(root)


def test_file_gone_between_listing_and_reading(root, monkeypatch):
    write_folder(root)
    real = folder.Folder.contents

    def remove_first(source):
        (root / "train/ant/0.png").unlink()
        return real(source)

    monkeypatch.setattr(folder.Folder, "contents", remove_first)
    with pytest.raises(DataError, match=r"train/ant/0\.png: No such file"):
        load(root)


def test_what_could_not_be_read_when_it_was_packed_is_tried_again(root, monkeypatch):
    """As the scan does: the bytes may be there another time, under the same stamp."""
    write(write_folder(root, count=10) / "train/bee/2.png", b"text")
    real, skip = base.read_stamped, {"on_bad_image": "skip"}
    packed = []
    real_write = store._write
    monkeypatch.setattr(store, "_write", lambda *a: packed.append(a) or real_write(*a))

    def fail(path, length):
        if path == root / "train/ant/1.png":
            raise BadImageError("Input/output error")
        return real(path, length)

    with monkeypatch.context() as patch:
        patch.setattr(base, "read_stamped", fail)
        for _ in range(2):  # while it stays so, what was packed serves
            bad = [path for path, _ in load(root, **skip).left_out.bad]
            assert bad == ["train/ant/1.png", "train/bee/2.png"]
        assert len(packed) == 1
    for _ in range(2):
        found = load(root, **skip)
        assert [path for path, _ in found.left_out.bad] == ["train/bee/2.png"]
        assert len(found.train) == 19
        assert len(packed) == 2
    assert found.digest == load(root, **skip, **IN_FILES).digest


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_keep_the_order(root, monkeypatch, threads):
    monkeypatch.setattr(examine, "THREADED_BYTES", 0 if threads > 1 else 1 << 20)
    monkeypatch.setattr(examine, "CHUNK", 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(threads))
    dataset = load(write_folder(root, count=9))
    for i in range(9):
        assert np.array_equal(dataset.train.pixels[9 + i], noise((8, 8, 3), seed=10 + i))


@pytest.mark.parametrize("options", [{}, IN_FILES])
def test_a_layout_of_ones_own(root, options, monkeypatch):
    """Classes that no folder names, as Tiny ImageNet's validation images have them."""
    members = members_of(write_folder(root, ("train",), ("ant", "bee"), 4))

    def loaded(labels):
        items = list(zip(sorted(members), labels, strict=True))
        splits = {"train": items[:5], "test": items[5:]}
        found = listed(str(root), ("x", "y", "z"), splits, 0)
        monkeypatch.setattr(folder, "find_layout", lambda *_: found)
        return load(root, **options)

    first = loaded([0, 1, 2, 0, 1, 0, 1, 2])
    assert first.classes == ("x", "y", "z")
    assert first.train.labels.tolist() == [0, 1, 2, 0, 1]
    assert first.test.labels.tolist() == [0, 1, 2]
    # of the same files
    other = loaded([0, 1, 2, 0, 1, 0, 2, 1])
    assert other.test.labels.tolist() == [0, 2, 1]
    assert other.digest != first.digest
