"""What goes wrong under the DALI loader: one line that names the file, within five seconds."""

import builtins
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from dali_cases import encode, made, scanned, smooth, stored, write_files
from image_files import make_images, write
from loader_cases import assert_same_batches

from fastcnn.config import AugmentConfig, DataConfig
from fastcnn.data import Images
from fastcnn.data.choose import choose
from fastcnn.errors import DataError, UsageError

dali = pytest.importorskip("nvidia.dali")

WITHIN_S = 5


@pytest.fixture(autouse=True)
def _cache(own_cache):
    return own_cache


@pytest.fixture
def root(tmp_path):
    return tmp_path


def as_good(path):
    """Replace an image by another one of equal sides and as many bytes, under the old mtime."""
    before, data = path.stat(), b"x" * 10**6
    form = "PNG" if path.suffix == ".png" else "JPEG"
    for seed in range(100, 200):
        if len(data) > before.st_size:
            data = encode(smooth(12, 10, seed), form)
    path.write_bytes(data + bytes(before.st_size - len(data)))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGED = "changed since it was scanned"
FAULTS = {
    "gone": (lambda path: path.unlink(), "No such file"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-20]), f"{CHANGED}: "),
    "empty": (lambda path: path.write_bytes(b""), f"{CHANGED}: .* bytes then, 0 now"),
    "longer": (lambda path: path.write_bytes(path.read_bytes() + b"x" * 9), f"{CHANGED}: "),
    "garbage": (lambda path: path.write_bytes(b"#" * path.stat().st_size), f"{CHANGED}; put it"),
    "as good": (as_good, f"{CHANGED}; put it back"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "Is a directory"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("place", [9, 35])  # the second of a batch that is not read yet
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
    assert loader.position >= place - 9  # batches before it were delivered


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


def test_a_file_that_is_touched_goes_on(root):
    names = write_files(root, 20)
    files = scanned(root, names)
    loader, wanted = made(files), list(made(files))
    for name in names[:12]:
        data = (root / name).read_bytes()
        (root / name).unlink()
        (root / name).write_bytes(data)
    assert_same_batches(list(loader), wanted)


def test_of_a_file_that_is_not_plain_the_original_counts(root):
    names = [f"{i}.webp" for i in range(8)]
    for i, name in enumerate(names):
        write(root / name, encode(smooth(12, 10, i), "WEBP"))
    loader = made(scanned(root, names), batch=2)
    list(loader)
    (root / "3.webp").unlink()
    with pytest.raises(DataError, match=r"3\.webp: No such file"):
        list(loader)


@pytest.mark.parametrize(
    ("said", "named"),
    [("planted", ""), ("sample #2: planted", r".*image 2\.jpg: "), ("sample #9: planted", "")],
)
def test_what_dali_itself_fails_at_is_told(root, monkeypatch, said, named):
    loader = made(scanned(root, write_files(root, 8)), shuffle=False)

    def fail(**_):
        raise RuntimeError(f"Critical error in pipeline:\ntraceback\nencountered:\n\n{said}\nmore")

    loader.begin()
    monkeypatch.setattr(loader.stream.pipeline, "share_outputs", fail)
    with pytest.raises(DataError, match=rf"^{named}--loader dali: DALI failed: {said}$"):
        loader.stage(4)


DAMAGE = """
import sys; sys.path[:0] = {path!r}
from pathlib import Path
from dali_cases import encode, made, scanned, smooth
from fastcnn.errors import DataError
root, batch = Path({root!r}), {batch}
for form in ("jpeg", "png", "bmp"):
    names = [f"{{i}}.{{form}}" for i in range(2 * batch)]
    for i, name in enumerate(names):
        (root / name).write_bytes(encode(smooth(24, 24, i), form))
    loader = made(scanned(root, names), shuffle=False, batch=batch)
    for victim in (root / names[place] for place in (1, batch + 1)):
        good = victim.read_bytes()
        for bad in (b"", good[:20], good[: len(good) // 2], b"#" * len(good), None):
            victim.unlink() if bad is None else victim.write_bytes(bad)
            loader.load_state_dict({{"epoch": 0, "position": 0}})
            try:
                list(loader)
            except DataError as error:
                print(error)
            victim.write_bytes(good)
    loader.load_state_dict({{"epoch": 0, "position": 0}})
    assert sum(len(y) for _, y in loader) == 2 * batch
"""


@pytest.mark.full
@pytest.mark.parametrize("batch", [64, 128])
def test_a_damaged_file_early_in_a_large_batch_kills_nothing(root, batch):
    """In a process of its own: DALI 2.4 dies of a batch of which it cannot parse one image."""
    code = DAMAGE.format(path=sys.path, root=str(root), batch=batch)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stderr) == (0, "")
    named = [
        f"{root}/{place}.{form}: "
        for form in ("jpeg", "png", "bmp")
        for place in (1, batch + 1)
        for _ in range(5)
    ]
    lines = found.stdout.splitlines()
    assert all(line.startswith(name) for line, name in zip(lines, named, strict=True))


@pytest.mark.full
def test_a_store_that_is_cut_is_an_error_not_a_signal(tmp_path):
    code = f"""
import sys; sys.path[:0] = {sys.path!r}
import os, pathlib
from dali_cases import made, stored
from image_files import make_images, write
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


@pytest.fixture
def broken(monkeypatch):
    """A DALI whose import fails, at length."""
    real = builtins.__import__

    def fail(name, *rest):
        if name == "nvidia.dali":
            raise OSError("libdali.so: planted;\n  it needs" + " glibc" * 100)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", fail)


REASON = r"DALI cannot be imported \(libdali.so: planted; it needs( glibc){10,40} …\)"


def test_dali_broken_is_one_line(broken):
    with pytest.raises(UsageError, match=rf"^--loader dali: {REASON}; pip install"):
        made(make_images(4))


def test_auto_goes_round_a_broken_dali(broken):
    files = DataConfig(data="x", store="files")
    found = choose(files, 4, (8, 8), True, torch.device("cpu"))
    assert (found.loader, found.store) == ("torch", "files")
    assert re.fullmatch(rf"--loader auto is torch: --store files; {REASON}", found.why)
    found = choose(replace(files, store="auto"), 4, (8, 8), True, torch.device("cpu"))
    assert found.loader == "resident"
    named = replace(files, loader="dali")
    assert choose(named, 4, (8, 8), True, torch.device("cpu")).loader == "dali"  # fails later


@pytest.mark.parametrize("version", ["1.53.0", "2.1.1"])
def test_dali_too_old_is_one_line(monkeypatch, version):
    monkeypatch.setattr(dali, "__version__", version)
    with pytest.raises(UsageError, match=rf"DALI {version}, 2.2 is needed; pip install"):
        made(make_images(4))
