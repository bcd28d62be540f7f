"""CIFAR-10: both archives, both unpacked folders, damage, forged pickles, no network."""

import hashlib
import http.client
import io
import logging
import pickle
import urllib.error

import numpy as np
import pytest
from image_files import (
    cifar_batches,
    cifar_binary,
    cifar_pickle,
    cifar_python,
    write,
    write_tar,
)

from fastcnn.config import DataConfig
from fastcnn.data import load_dataset
from fastcnn.data.sources import cifar
from fastcnn.errors import DataError, UsageError

BATCHES = cifar_batches()


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Return a function that writes an archive into data/ and makes its MD5 the expected one."""

    def make(name=cifar.PYTHON_ARCHIVE, members=None):
        if members is None:
            binary = name == cifar.BINARY_ARCHIVE
            members = cifar_binary(BATCHES) if binary else cifar_python(BATCHES)
        path = write_tar(write(tmp_path / "data" / name, b""), members, "w:gz")
        expected = hashlib.md5(path.read_bytes()).hexdigest()
        monkeypatch.setitem(cifar.MD5, name, expected)
        return path

    return make


def load(folder=None, **options):
    return load_dataset(DataConfig(data_dir=None if folder is None else str(folder), **options), 32)


def assert_is_cifar(dataset):
    assert dataset.classes[0] == "airplane"
    assert dataset.classes[9] == "truck"
    planes = np.concatenate([planes for planes, _ in list(BATCHES.values())[:5]])
    labels = np.concatenate([labels for _, labels in list(BATCHES.values())[:5]])
    expected = np.stack([p.reshape(3, 32, 32).transpose(1, 2, 0) for p in planes])
    assert np.array_equal(dataset.train.pixels, expected)
    assert np.array_equal(dataset.train.labels, labels)
    test_planes, test_labels = BATCHES["test_batch"]
    assert np.array_equal(dataset.test.pixels[3, :, :, 1].ravel(), test_planes[3, 1024:2048])
    assert np.array_equal(dataset.test.labels, test_labels)


@pytest.mark.parametrize("name", [cifar.PYTHON_ARCHIVE, cifar.BINARY_ARCHIVE])
def test_archives(archive, name):
    assert_is_cifar(load(archive(name).parent))


def test_both_archives_have_one_digest(archive):
    first = load(archive(cifar.PYTHON_ARCHIVE).parent)
    (path := archive(cifar.BINARY_ARCHIVE)).with_name(cifar.PYTHON_ARCHIVE).unlink()
    assert load(path.parent).digest == first.digest


@pytest.mark.parametrize("members", [cifar_python(BATCHES), cifar_binary(BATCHES)])
def test_unpacked_folders(tmp_path, members):
    for name, data in members.items():
        write(tmp_path / "data" / name, data)
    assert_is_cifar(load(tmp_path / "data"))
    (folder,) = (tmp_path / "data").iterdir()
    assert_is_cifar(load(folder))
    next(folder.iterdir()).unlink()
    with pytest.raises(DataError, match="No such file"):
        load(folder)


@pytest.mark.parametrize("inner", ["", "deeper"])
def test_data_dir_that_is_a_file_is_named(tmp_path, inner):
    path = write(tmp_path / "file", b"x") / inner
    with pytest.raises(DataError, match=f"{path}.*ot a (folder|directory)"):
        load(path)


def test_data_dir_that_cannot_be_a_path():
    with pytest.raises(UsageError, match="--data-dir is empty"):
        load("")
    with pytest.raises(DataError, match=r"--data-dir .*name too long"):
        load("x" * 5000)


def test_second_start_unpickles_nothing(archive, monkeypatch):
    path = archive()
    load(path.parent)
    monkeypatch.setattr(cifar, "parse_python", None)
    assert_is_cifar(load(path.parent))
    # packed once, the archive itself is no longer needed
    path.unlink()
    assert_is_cifar(load())


def test_image_size_resizes(archive):
    dataset = load(archive().parent, image_size=16)
    assert dataset.train.pixels.shape == (100, 16, 16, 3)
    # antialiased halving of noise: the mean stays, the deviation shrinks
    assert abs(dataset.train.pixels.mean() - 127.5) < 1
    assert 20 < dataset.train.pixels.std() < 50


def test_wrong_md5_names_both_hashes_and_reads_nothing(archive, monkeypatch):
    path = archive()
    expected = cifar.MD5[path.name]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    found = hashlib.md5(data).hexdigest()
    monkeypatch.setattr("tarfile.open", None)
    with pytest.raises(DataError, match=f"{found}, expected {expected}"):
        load(path.parent)


def test_truncated_archive(archive):
    path = archive()
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="MD5"):
        load(path.parent)


def test_archive_without_a_batch(archive):
    members = cifar_python(BATCHES)
    del members["cifar-10-batches-py/data_batch_3"]
    with pytest.raises(DataError, match="data_batch_3 is missing"):
        load(archive(members=members).parent)


def test_nothing_is_extracted(archive, tmp_path):
    members = {"../evil": b"x", **cifar_python(BATCHES)}
    load(archive(members=members).parent)
    assert not list(tmp_path.rglob("evil"))
    assert not list(tmp_path.rglob("data_batch*"))


class Exploit:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def forged_batches(tmp_path):
    exploit = Exploit(tmp_path / "executed")
    yield pickle.dumps(exploit)
    yield pickle.dumps({b"data": exploit, b"labels": [0]}, 2)
    yield b"cos\nsystem\n(S'touch executed'\ntR."
    yield b"cbuiltins\neval\n(S'1+1'\ntR."
    yield b"cnumpy\nload\n(S'x'\ntR."
    yield b"cnumpy.core.multiarray\nscalar\n."


def test_forged_pickles_execute_nothing(tmp_path):
    for data in forged_batches(tmp_path):
        with pytest.raises(DataError, match="refused"):
            cifar.parse_python("x", data)
    assert not (tmp_path / "executed").exists()
    # the first one does execute where it is not stopped
    pickle.loads(next(iter(forged_batches(tmp_path))))  # noqa: S301
    assert (tmp_path / "executed").exists()


def test_forged_pickle_in_a_folder_is_refused(tmp_path):
    for name, data in cifar_python(BATCHES).items():
        write(tmp_path / "data" / name, data)
    evil = pickle.dumps(Exploit(tmp_path / "executed"))
    write(tmp_path / "data/cifar-10-batches-py/data_batch_2", evil)
    with pytest.raises(DataError, match="data_batch_2"):
        load(tmp_path / "data")
    assert not (tmp_path / "executed").exists()


PLANES, LABELS = BATCHES["test_batch"]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        cifar_pickle(PLANES, LABELS)[:-50],
        cifar_pickle(PLANES, LABELS[:-1]),
        cifar_pickle(PLANES[:, :-1], LABELS),
        cifar_pickle(PLANES.astype(np.int16), LABELS),
        pickle.dumps({b"labels": [1]}),
        pickle.dumps([1, 2]),
        cifar_pickle(PLANES[:0], []),
    ],
)
def test_bad_python_batches(data):
    with pytest.raises(DataError):
        cifar.parse_python("x", data)


@pytest.mark.parametrize("length", [0, 3072, 3074, 10 * 3073 - 1])
def test_binary_batch_of_wrong_length(length):
    with pytest.raises(DataError, match="multiple of 3073"):
        cifar.parse_binary("x", bytes(length))


@pytest.mark.parametrize("name", [cifar.PYTHON_ARCHIVE, cifar.BINARY_ARCHIVE])
def test_label_out_of_range(archive, name):
    batches = dict(BATCHES)
    batches["data_batch_4"] = (BATCHES["data_batch_4"][0], np.full(20, 10))
    members = cifar_binary(batches) if name == cifar.BINARY_ARCHIVE else cifar_python(batches)
    with pytest.raises(DataError, match=r"data_batch_4.*labels 10 to 10, expected 0 to 9"):
        load(archive(name, members).parent)


def test_offline_names_the_alternatives(tmp_path):
    with pytest.raises(DataError, match="--data digits or --data PATH") as error:
        load(tmp_path / "data")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "data").iterdir()) == []


class CutResponse(io.BytesIO):
    headers = {}  # noqa: RUF012

    def read(self, *_):
        raise http.client.IncompleteRead(b"x")


def no_http(*_, **__):
    raise http.client.BadStatusLine("garbage\r\n")


@pytest.mark.parametrize("answer", [no_http, lambda *_, **__: CutResponse()])
def test_garbled_answer_is_as_offline(tmp_path, monkeypatch, answer):
    monkeypatch.setattr("urllib.request.urlopen", answer)
    with pytest.raises(DataError, match="--data digits or --data PATH") as error:
        load(tmp_path / "data")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "data").iterdir()) == []


class Response(io.BytesIO):
    headers = {"Content-Length": "1"}  # noqa: RUF012


def test_download_is_checked_and_kept(archive, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    path = archive()
    data = path.read_bytes()
    path.unlink()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Response(data))
    assert_is_cifar(load(tmp_path / "elsewhere"))
    assert [p.name for p in (tmp_path / "elsewhere").iterdir()] == [cifar.PYTHON_ARCHIVE]
    # the download is worth a line of the log, packing it is not
    assert [record.getMessage() for record in caplog.records] == ["downloading CIFAR-10: 1 bytes"]


def test_download_with_wrong_md5_is_not_kept(archive, tmp_path, monkeypatch):
    archive().unlink()
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: Response(b"altered"))
    with pytest.raises(DataError, match="MD5"):
        load(tmp_path / "elsewhere")
    assert list((tmp_path / "elsewhere").iterdir()) == []
