"""The packed store: reuse, damage, two processes, errors; subsets and validation."""

import json
import logging
import multiprocessing
import os

import numpy as np
import pytest
from image_files import noise, write_folder

from fastcnn.config import DataConfig
from fastcnn.data import load_dataset
from fastcnn.data.select import Selection
from fastcnn.data.store import pack
from fastcnn.errors import DataError, UsageError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTCNN_CACHE", str(folder))
    return folder


class Reader:
    """Counts how often it is asked for its contents."""

    def __init__(self, train=6, test=4, labels=None, classes=("a", "b"), skip=0):
        self.pixels = {"train": noise((train, 4, 5, 3)), "test": noise((test, 4, 5, 3), 1)}
        self.labels = {
            name: np.arange(len(p), dtype=np.int64) % 2 for name, p in self.pixels.items()
        }
        if labels is not None:
            self.labels["train"] = np.array(labels, dtype=np.int64)
        self.classes, self.skip, self.calls = classes, skip, 0

    def __call__(self):
        self.calls += 1
        return Selection(self.classes, self.labels, self.blocks())

    def blocks(self):
        for name, pixels in self.pixels.items():
            order = np.random.default_rng(0).permutation(len(pixels))
            order = order[self.skip if name == "test" else 0 :]
            for part in np.array_split(order, 2):
                yield name, part, pixels[part]


def assert_holds(dataset, reader):
    for name in ("train", "test"):
        images = getattr(dataset, name)
        assert images.pixels.dtype == np.uint8
        assert images.labels.dtype == np.int64
        assert np.array_equal(images.pixels, reader.pixels[name])
        assert np.array_equal(images.labels, reader.labels[name])


def test_packed_once_and_mapped_after():
    reader = Reader()
    first, second = pack("x", "key", reader), pack("x", "key", reader)
    assert reader.calls == 1
    assert isinstance(second.train.pixels, np.memmap)
    assert_holds(first, reader)
    assert_holds(second, reader)
    assert first.digest == second.digest
    assert len(first.digest) == 64
    assert second.val is None


def test_no_temporary_is_left(cache):
    pack("x", "key", Reader())
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_digest_follows_pixels_labels_and_classes():
    digests = [pack("x", "a", Reader()).digest]
    changed = Reader()
    changed.pixels["test"][0, 0, 0, 0] ^= 1
    digests.append(pack("x", "b", changed).digest)
    digests.append(pack("x", "c", Reader(labels=[1, 0, 1, 0, 1, 0])).digest)
    digests.append(pack("x", "d", Reader(classes=("a", "c"))).digest)
    assert len(set(digests)) == 4
    assert pack("x", "e", Reader()).digest == digests[0]


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path):
    path.write_bytes(path.read_bytes() + b"x")


def garble_header(path):
    data = path.read_bytes()
    path.write_bytes(b"\0" * 10 + data[10:])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut, lengthen, garble_header, empty, os.remove])
@pytest.mark.parametrize("name", ["train.pixels.npy", "test.labels.npy", "meta.json"])
def test_damaged_entry_is_built_again(cache, caplog, name, damage):
    reader = Reader()
    digest = pack("x", "key", reader).digest
    damage(cache / "key" / name)
    dataset = pack("x", "key", reader)
    assert reader.calls == 2
    assert caplog.text.count("is damaged") == 1
    assert_holds(dataset, reader)
    assert dataset.digest == digest
    pack("x", "key", reader)
    assert reader.calls == 2


def test_entry_with_labels_out_of_range_is_built_again(cache):
    reader = Reader()
    pack("x", "key", reader)
    np.save(cache / "key" / "train.labels.npy", np.full(6, 2))
    assert_holds(pack("x", "key", reader), reader)


def test_entry_with_other_shape_in_meta_is_built_again(cache):
    reader = Reader()
    pack("x", "key", reader)
    meta = json.loads((cache / "key" / "meta.json").read_text())
    meta["shapes"]["train"][1:3] = [5, 4]
    (cache / "key" / "meta.json").write_text(json.dumps(meta))
    assert_holds(pack("x", "key", reader), reader)


def test_write_to_the_map_does_not_reach_the_file():
    reader = Reader()
    pack("x", "key", reader).train.pixels[:] = 0
    assert_holds(pack("x", "key", reader), reader)


def test_failed_reader_leaves_nothing(cache):
    def fail():
        raise DataError("bad")

    with pytest.raises(DataError, match="bad"):
        pack("x", "key", fail)
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("reader", "message"),
    [
        (Reader(labels=[0, 1, 2, 0, 1, 0]), "expected 0 to 1, got 2"),
        (Reader(labels=[0, 1, -1, 0, 1, 0]), "expected 0 to 1, got -1"),
        (Reader(classes=("a",), labels=[0] * 6), "one class only"),
        (Reader(test=0), "no test images"),
        (Reader(skip=1), "1 of 4 test images are missing"),
    ],
)
def test_bad_contents_are_refused(reader, message):
    with pytest.raises(DataError, match=message):
        pack("x", "key", reader)


def test_full_disk_is_one_error(monkeypatch, cache):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastcnn.data.store._put", full)
    with pytest.raises(DataError, match="No space left"):
        pack("x", "key", Reader())
    assert list(cache.iterdir()) == []


def test_too_small_disk_names_bytes(monkeypatch):
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(DataError, match=r"600 bytes needed for .*, 10 free; free some"):
        pack("x", "key", Reader())


def _pack_with_barrier(barrier, results):
    reader = Reader()

    def read():
        barrier.wait(20)
        return reader()

    dataset = pack("x", "key", read)
    assert_holds(dataset, reader)
    results.put(dataset.digest)


def test_processes_that_pack_at_once_agree(cache):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_pack_with_barrier, args=(barrier, results)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    digests = {results.get(timeout=30) for _ in processes}
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert digests == {pack("x", "key", Reader()).digest}
    assert [path.name for path in cache.iterdir()] == ["key"]


def test_old_unfinished_entries_are_removed(cache):
    (cache / ".tmp-old").mkdir(parents=True)
    (cache / ".tmp-new").mkdir()
    os.utime(cache / ".tmp-old", (0, 0))
    pack("x", "key", Reader())
    assert sorted(path.name for path in cache.iterdir()) == [".tmp-new", "key"]


def test_digits_fill_the_wanted_size():
    for size, expected in ((None, 16), (8, 8)):
        digits = load_dataset(DataConfig(data="digits", image_size=size), default_size=16)
        assert digits.train.pixels.shape[1:] == (expected, expected, 3)
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.classes == tuple("0123456789")
    assert set(digits.test.labels) == set(range(10))
    assert digits.train.pixels.max() == 255
    assert (digits.train.pixels[..., 0] == digits.train.pixels[..., 2]).all()
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    ours = np.concatenate([digits.train.pixels, digits.test.pixels])[..., 0].reshape(1797, 64)
    numbers = np.concatenate([digits.train.labels, digits.test.labels])
    rounded = np.rint(grey * 255 / 16).astype(np.uint8)
    assert sorted(zip(map(bytes, ours), numbers, strict=True)) == sorted(
        zip(map(bytes, rounded), labels, strict=True)
    )


def test_digits_are_packed_in_silence(caplog):
    with caplog.at_level(logging.INFO):
        load_dataset(DataConfig(data="digits"), 8)
    assert not caplog.records


@pytest.mark.parametrize(("name", "hint"), [("cifr10", "cifar10"), ("digit", "digits")])
def test_unknown_data_names_the_nearest(name, hint):
    with pytest.raises(UsageError, match=f"did you mean '{hint}'"):
        load_dataset(DataConfig(data=name), 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/none/such", "no such file or folder"),
        ("x" * 5000, "name too long"),
        ("/" + "x" * 300, "name too long"),
        ("/dev/null", "neither a folder nor"),
        ("~no-such-user/images", "home directory"),
        ("caf\udce9", r"'caf\\udce9' is not UTF-8"),
        ("a\0b", "null"),
    ],
)
def test_bad_path_is_a_data_error(name, message):
    with pytest.raises(DataError, match=message) as error:
        load_dataset(DataConfig(data=name), 32)
    assert len(str(error.value).encode()) < 200


def test_empty_name_is_a_usage_error(tmp_path, monkeypatch):
    monkeypatch.chdir(write_folder(tmp_path / "images"))
    with pytest.raises(UsageError, match="--data is empty"):
        load_dataset(DataConfig(data=""), 32)
    assert load_dataset(DataConfig(data="."), 32).name == "images"
