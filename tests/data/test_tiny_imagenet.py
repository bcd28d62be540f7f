"""Tiny ImageNet: the folder, the zip, the lists of wnids and annotations, the download."""

import hashlib
import http.server
import logging
import threading

import numpy as np
import pytest
from image_files import load, noise, tiny_members, write, write_members, write_zip

from fastcnn.data.sources import tiny_imagenet
from fastcnn.data.sources.tiny_layout import tiny_prefix
from fastcnn.errors import DataError, UsageError

pytestmark = pytest.mark.usefixtures("own_cache")

CLASSES = ("crane (n01)", "bee", "crane (n03)")
FOLDER = "tiny-imagenet-200"


@pytest.fixture
def folder(tmp_path):
    return write_members(tmp_path / "data" / FOLDER, tiny_members())


def assert_is_tiny(dataset):
    assert dataset.classes == CLASSES
    assert dataset.val is None
    assert dataset.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(dataset.train.pixels[7], noise((8, 8, 3), seed=21))
    assert dataset.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    for position, number in enumerate([0, 3, 1, 4, 2, 5]):
        assert np.array_equal(dataset.test.pixels[position], noise((8, 8, 3), seed=100 + number))


# Layout


def test_folder_by_path_also_one_folder_up(folder):
    assert_is_tiny(load(folder))
    assert_is_tiny(load(folder.parent))
    write(folder.parent / "beside" / "x.txt", b"")
    assert_is_tiny(load(folder.parent))
    folder.rename(folder.with_name("renamed"))
    (folder.parent / "beside/x.txt").unlink()
    (folder.parent / "beside").rmdir()
    assert_is_tiny(load(folder.parent))


def test_folder_that_was_unpacked_in_part(folder):
    (folder / "train/n02/images/n02_1.JPEG").unlink()
    (folder / "train/n01/n01_boxes.txt").unlink()
    assert load(folder).train.labels.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lists_with_windows_ends_and_without_a_last_one(tmp_path, ending):
    members = tiny_members()
    for name in ("wnids.txt", "words.txt", "val/val_annotations.txt"):
        members[name] = members[name].decode().strip().replace("\n", ending).encode()
    assert_is_tiny(load(write_members(tmp_path / "x", members)))


@pytest.mark.parametrize("words", [None, b"n01\tcrane\n"])
def test_classes_without_words_have_their_wnid(tmp_path, words):
    members = tiny_members()
    del members["words.txt"]
    if words:
        members["words.txt"] = words
    found = load(write_members(tmp_path / "x", members)).classes
    assert found == ("crane" if words else "n01", "n02", "n03")


def test_test_images_are_left_out_in_a_line_of_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    root = write_members(tmp_path / "x", tiny_members(tests=2) | {"train/odd.txt": b""})
    assert_is_tiny(load(root))
    lines = [record.getMessage() for record in caplog.records]
    expected = "2 test images have no labels and are left out; testing takes the validation images"
    assert f"{root}: {expected}" in lines
    assert f"{root}: 1 file left out: not images of a class" in lines
    caplog.clear()
    load(write_members(tmp_path / "y", tiny_members()))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("wnids.txt", b"", "wnids.txt: empty"),
        ("wnids.txt", b"n01\nn02 n03\n", "wnids.txt, line 2: expected one wnid, got 'n02 n03'"),
        ("wnids.txt", b"n01\n\nn02\n", "wnids.txt, line 2: expected one wnid, got ''"),
        ("wnids.txt", b"n01\nn02\nn03\nn02\n", "wnids.txt, line 4: n02 stands in line 2 too"),
        ("wnids.txt", b"n01\nn\xff\n", "wnids.txt, line 2: not UTF-8"),
        ("wnids.txt", b"n01\nn02\n", "train/n03/images/n03_0.JPEG: 'n03' is not in wnids.txt"),
        ("wnids.txt", b"n01\nn02\nn03\nn04\n", "wnids.txt, line 4: no images in train/n04/images"),
        ("words.txt", b"n01\tx\nn02 x\n", "words.txt, line 2: expected wnid, tab, words, got 'n02"),
        ("val/val_annotations.txt", b"", "val/images/val_0.JPEG: no line for it"),
        ("val/images/val_9.JPEG", b"x", "val/images/val_9.JPEG: no line for it in val/val_ann"),
        ("val/images/deeper/val_3.JPEG", b"x", "val/images/val_3.JPEG have one name"),
    ],
)
def test_odd_lists_are_one_line_with_their_place(tmp_path, name, data, message):
    root = write_members(tmp_path / "x", tiny_members() | {name: data})
    with pytest.raises(DataError) as error:
        load(root)
    assert message in str(error.value)
    assert str(root) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("val_2.JPEG n01 0 0 7 7", "line 3: expected file, tab, wnid, tab, box, got 'val_2.JPEG n"),
        ("", "line 3: expected file, tab, wnid, tab, box, got ''"),
        ("val_2.JPEG\tn09\t0", "line 3: 'n09' is not in wnids.txt"),
        ("val_2.JPEG\t", "line 3: '' is not in wnids.txt"),
        ("val_1.JPEG\tn01\t0", "line 3: val_1.JPEG has a line already"),
        ("val_7.JPEG\tn01\t0", "line 3: no val_7.JPEG in val/images"),
        ("../x.JPEG\tn01\t0", "line 3: no ../x.JPEG in val/images"),
    ],
)
def test_odd_annotations_are_one_line_with_their_place(tmp_path, line, message):
    members = tiny_members()
    lines = members["val/val_annotations.txt"].decode().split("\n")
    lines[2] = line
    members["val/val_annotations.txt"] = "\n".join(lines).encode()
    root = write_members(tmp_path / "x", members)
    with pytest.raises(DataError) as error:
        load(root)
    assert f"{root}/val/val_annotations.txt, {message}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["wnids.txt", "val/val_annotations.txt"])
def test_one_list_without_the_other_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"{FOLDER}: {name} is missing; unpack"):
        load(folder.parent)


@pytest.mark.parametrize(
    ("files", "prefix"),
    [
        (["wnids.txt", "val/val_annotations.txt"], ""),
        (["x/wnids.txt", "x/val/val_annotations.txt"], "x/"),
        (["x/wnids.txt", "y/val/val_annotations.txt"], None),
        (["x/y/wnids.txt", "x/y/val/val_annotations.txt"], None),
        (["wnids.txt", "interval/val_annotations.txt"], None),
        (["inter/wnids.txt", "inter" + "val/val_annotations.txt"], None),
        (["wnids.txt"], None),
    ],
)
def test_prefix(files, prefix):
    assert tiny_prefix(files) == prefix


# Zip


@pytest.mark.parametrize("prefix", ["", f"{FOLDER}/"])
def test_zip_by_path_equals_the_folder(tmp_path, folder, prefix):
    members = {prefix + name: data for name, data in reversed(tiny_members(tests=1).items())}
    dataset = load(write_zip(tmp_path / "any.zip", members))
    assert_is_tiny(dataset)
    assert dataset.digest == load(folder).digest


def test_zip_names_file_and_line(tmp_path):
    path = tmp_path / "x.zip"
    write_zip(path, {"x/" + n: d for n, d in (tiny_members() | {"wnids.txt": b"n1 2"}).items()})
    with pytest.raises(DataError, match=rf"{path}/x/wnids.txt, line 1: expected one wnid"):
        load(path)


# By name


@pytest.fixture
def official(tmp_path, monkeypatch):
    """A zip whose MD5 is the expected one, beside the folder that tests look into."""
    members = {f"{FOLDER}/{name}": data for name, data in tiny_members(tests=1).items()}
    path = write_zip(tmp_path / "official.zip", members)
    monkeypatch.setattr(tiny_imagenet, "MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def server(official, monkeypatch):
    """A server of the official zip; `answer` is what it sends, `claimed` the length it tells."""

    class Handler(http.server.BaseHTTPRequestHandler):
        answer = official.read_bytes()
        claimed = len(answer)
        asked = 0

        def do_GET(self):
            type(self).asked += 1
            self.send_response(200)
            self.send_header("Content-Length", str(self.claimed))
            self.end_headers()
            self.wfile.write(self.answer)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        host, port = serving.server_address
        monkeypatch.setattr(tiny_imagenet, "URL", f"http://{host}:{port}/x.zip")
        yield Handler
        serving.shutdown()


@pytest.fixture
def offline(monkeypatch):
    # nothing listens at the port of discarded bytes
    monkeypatch.setattr(tiny_imagenet, "URL", "http://127.0.0.1:9/x.zip")


def named(folder=None, **options):
    return load("tiny-imagenet", data_dir=None if folder is None else str(folder), **options)


def test_zip_in_data_dir(official, offline, tmp_path):
    official.rename(write(tmp_path / "data" / tiny_imagenet.ARCHIVE, b""))
    assert_is_tiny(named(tmp_path / "data"))


@pytest.mark.parametrize("inner", ["", FOLDER])
def test_unpacked_folder_in_data_dir(folder, offline, inner):
    assert_is_tiny(named(folder.parent / inner))


def test_unpacked_folder_in_the_cache(tmp_path, offline):
    write_members(tmp_path / "cache" / "tiny-imagenet" / FOLDER, tiny_members())
    assert_is_tiny(named())


def test_folder_that_lacks_a_list_is_no_place_to_download_to(folder, server):
    (folder / "val/val_annotations.txt").unlink()
    with pytest.raises(DataError, match=r"val_annotations\.txt is missing"):
        named(folder.parent)
    assert server.asked == 0


def test_download_is_checked_kept_and_packed_once(server, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    assert_is_tiny(named())
    kept = tmp_path / "cache" / "tiny-imagenet"
    assert [path.name for path in kept.iterdir()] == [tiny_imagenet.ARCHIVE]
    first = caplog.records[0].getMessage()
    assert first == f"downloading Tiny ImageNet: {server.claimed:,} bytes"
    (kept / tiny_imagenet.ARCHIVE).unlink()
    assert_is_tiny(named())  # packed: the zip is not needed any more
    assert server.asked == 1
    assert named(image_size=16).train.sides == (16, 16)
    assert server.asked == 2


def refused(folder):
    with pytest.raises(DataError) as error:
        named(folder)
    text = str(error.value)
    assert "\n" not in text
    assert "put tiny-imagenet-200.zip into the folder of --data-dir" in text
    assert list(folder.iterdir()) == []
    return text


def test_download_with_wrong_md5_is_not_kept(server, tmp_path):
    server.answer = server.answer[:-1] + b"x"
    found = hashlib.md5(server.answer).hexdigest()
    text = refused(tmp_path / "data")
    assert f"MD5 {found}, expected {tiny_imagenet.MD5}" in text


def test_download_that_is_cut_is_not_kept(server, tmp_path):
    server.answer = server.answer[:100]
    assert f"cut after 100 of {server.claimed:,} bytes" in refused(tmp_path / "data")


def test_no_network_says_what_to_do(offline, tmp_path):
    assert "cannot download Tiny ImageNet" in refused(tmp_path / "data")


def test_wrong_md5_of_a_zip_that_is_there_reads_nothing(official, tmp_path, monkeypatch):
    path = write(tmp_path / "data" / tiny_imagenet.ARCHIVE, official.read_bytes() + b"x")
    monkeypatch.setattr("zipfile.ZipFile", None)
    with pytest.raises(DataError, match=rf"{path}: MD5 .*expected .*remove it to download"):
        named(tmp_path / "data")


def test_data_dir_that_is_no_folder(tmp_path, offline):
    with pytest.raises(DataError, match="not a folder; give the one that holds tiny-imagenet-200"):
        named(write(tmp_path / "file", b"x"))
    with pytest.raises(UsageError, match="--data-dir is empty"):
        named("")


def test_options_make_entries_of_their_own(official, offline, tmp_path):
    official.rename(write(tmp_path / "data" / tiny_imagenet.ARCHIVE, b""))
    assert named(tmp_path / "data", image_size=16).train.sides == (16, 16)
    assert named(tmp_path / "data").train.sides == (8, 8)
