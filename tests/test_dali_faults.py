"""What goes wrong under the DALI loader: one line that names the file, within five seconds."""

import builtins
import subprocess
import sys
import time

import numpy as np
import pytest
from dali_cases import encode, made, scanned, smooth, stored, write_files
from image_files import make_images
from loader_cases import assert_same_batches

from fastcnn.config import AugmentConfig
from fastcnn.data import Images
from fastcnn.errors import DataError, UsageError

dali = pytest.importorskip("nvidia.dali")

WITHIN_S = 5


@pytest.fixture(autouse=True)
def _cache(own_cache):
    return own_cache


@pytest.fixture
def root(tmp_path):
    return tmp_path


def other_file(length):
    """A whole image of exactly so many bytes, 12 x 9 pixels in place of 10 x 12."""
    data = encode(smooth(9, 12), "PNG")
    assert len(data) <= length
    return data + bytes(length - len(data))


FAULTS = {
    "gone": (lambda path: path.unlink(), "No such file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "changed: "),
    "empty": (lambda path: path.write_bytes(b""), "changed: .* 0 now"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x" * 9), "changed: "),
    "garbage": (lambda path: path.write_bytes(b"#" * path.stat().st_size), "cannot identify"),
    "other sides": (
        lambda path: path.write_bytes(other_file(path.stat().st_size)),
        "changed: .* pixels when it was listed",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("place", [7, 35])  # the second of its batch
def test_a_file_that_changes_under_a_running_epoch_is_named(root, fault, form, place):
    names = write_files(root, 40, form=form)
    files = scanned(root, names, sides=(8, 8))
    loader = made(files, augment=AugmentConfig(), shuffle=False, batch=2)
    batches = iter(loader)
    next(batches)
    spoil, said = FAULTS[fault]
    spoil(root / names[place])
    start = time.monotonic()
    with pytest.raises(DataError, match=rf"image {place}\..*{said}") as found:
        for _ in batches:
            pass
    assert time.monotonic() - start < WITHIN_S
    assert "\n" not in str(found.value)
    assert loader.position >= place - 7  # batches before it were delivered


def test_a_mended_folder_loads_again(root):
    names = write_files(root, 20)
    files = scanned(root, names)
    wanted = list(made(files))
    loader = made(files)
    data = (root / names[5]).read_bytes()
    (root / names[5]).unlink()
    with pytest.raises(DataError, match=r"image 5\.jpg"):
        list(loader)
    (root / names[5]).write_bytes(data)
    loader.load_state_dict({"epoch": 0, "position": 0})
    assert_same_batches(list(loader), wanted)


def test_a_fault_in_batches_that_nobody_takes_is_none(root):
    names = write_files(root, 20)
    files = scanned(root, names)
    loader, wanted = made(files, shuffle=False), list(made(files, shuffle=False))
    next(iter(loader))
    path = root / names[9]  # DALI is at work on it
    data = path.read_bytes()
    loader.begin()
    path.unlink()
    time.sleep(0.2)
    path.write_bytes(data)
    loader.load_state_dict({"epoch": 0, "position": 0})
    assert_same_batches(list(loader), wanted)


def test_where_no_file_is_to_blame_dali_s_line_is_told(root, monkeypatch):
    files = scanned(root, write_files(root, 8))
    loader = made(files, shuffle=False)

    def fail(**_):
        raise RuntimeError("Critical error in pipeline:\ntraceback\nencountered:\n\nplanted\nmore")

    loader.begin()
    monkeypatch.setattr(loader.stream.pipeline, "share_outputs", fail)
    with pytest.raises(DataError, match=r"image 0\.jpg, or another of its batch: .*: planted$"):
        loader.stage(4)


def test_a_file_that_dali_cannot_read_in_a_large_batch_is_found_in_time(root):
    names = write_files(root, 300, 300, 400)
    files = scanned(root, names, sides=(32, 32))
    loader = made(files, shuffle=False, batch=100)
    loader.begin()
    list(loader)
    path = root / names[299]
    path.write_bytes(b"#" * path.stat().st_size)
    start = time.monotonic()
    with pytest.raises(DataError, match=r"image 299\.jpg"):
        list(loader)
    assert time.monotonic() - start < WITHIN_S


def test_a_store_that_is_cut_is_an_error_not_a_signal(tmp_path):
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import os, pathlib
from dali_cases import made, stored
from image_files import make_images
from fastcnn.errors import DataError
path = pathlib.Path({str(tmp_path)!r}) / "train.pixels.npy"
loader = made(stored(path, make_images(3000, 32, 32)), batch=50, backend="torch")
for i, _ in enumerate(loader):
    if i == 3:
        os.truncate(path, 5000)
        break
try:
    list(loader)
except DataError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert f"{tmp_path / 'train.pixels.npy'}: cut while it was in use" in found.stdout
    assert found.stderr == ""


def test_a_store_that_is_gone_from_its_folder_is_still_read(tmp_path):
    images = stored(tmp_path / "x.npy", make_images(20))
    loader = made(images)
    (tmp_path / "x.npy").unlink()
    assert_same_batches(list(loader), list(made(make_images(20), "resident")))
    with pytest.raises(DataError, match=r"x\.npy: No such file"):
        made(images)


@pytest.mark.parametrize("part", [slice(0, 9), slice(7, None), slice(5, 12)])
def test_a_part_of_the_store_is_read_where_it_lies(tmp_path, part):
    whole = make_images(20)
    pixels = stored(tmp_path / "x.npy", whole).pixels[part]
    loader = made(Images(pixels, whole.labels[part]), shuffle=False)
    assert loader.source.file is not None
    wanted = Images(whole.pixels[part], whole.labels[part])
    assert_same_batches(list(loader), list(made(wanted, "resident", shuffle=False)))


def test_images_that_lie_otherwise_are_indexed(tmp_path):
    pixels = stored(tmp_path / "x.npy", make_images(20)).pixels[::2]
    images = Images(pixels, np.arange(10))
    loader = made(images)
    assert loader.source.file is None
    assert_same_batches(list(loader), list(made(images, "resident")))


def test_dali_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UsageError, match=r"pip install 'fastcnn\[dali\]'") as found:
        made(make_images(4))
    assert "\n" not in str(found.value)


def test_dali_broken_is_one_line(monkeypatch):
    real = builtins.__import__

    def broken(name, *rest):
        if name == "nvidia.dali":
            raise OSError("libdali.so: planted\nmore")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(UsageError, match=r"cannot be imported \(libdali.so: planted\); pip"):
        made(make_images(4))


@pytest.mark.parametrize("version", ["1.53.0", "2.1.1"])
def test_dali_too_old_is_one_line(monkeypatch, version):
    monkeypatch.setattr(dali, "__version__", version)
    with pytest.raises(UsageError, match=rf"DALI {version}, 2.2 is needed; pip install"):
        made(make_images(4))
