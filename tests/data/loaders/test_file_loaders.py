"""Images that loaders decode from files every epoch: the same pixels as packed ones, and what
becomes of an epoch whose files or workers are taken away."""

import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from image_files import encoded, noise
from loader_cases import (
    CASES,
    EVERYTHING,
    FILE_LOADERS,
    FUSED,
    UNIT,
    WORKERS,
    assert_same_batches,
    by_label,
    files_of,
    listed,
    loader_of,
    numbered,
    odd_files,
    placed,
    worker_pids,
)
from torchvision.transforms import v2

from fastcnn.config import AugmentConfig
from fastcnn.data.draws import derive_seed
from fastcnn.data.images import Images
from fastcnn.data.loaders import torch_loader
from fastcnn.errors import DataError

FILE_CASES = [(kind, n) for kind in FILE_LOADERS for n in WORKERS.get(kind, (0,))]
BOX = AugmentConfig(crop_padding=0, flip="none", resized_crop=0.3)
SECONDS = 5  # until an error must be there


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.mark.full
@pytest.mark.parametrize(("kind", "workers"), FILE_CASES)
@pytest.mark.parametrize("resize", ["stretch", "crop"])
@pytest.mark.parametrize("augment", [None, FUSED, EVERYTHING], ids=["none", "fused", "everything"])
def test_files_and_packed_images_are_bit_equal(tmp_path, kind, workers, resize, augment):
    sides = (8, 10) if resize == "stretch" else (9, 9)
    files = odd_files(tmp_path, 14, resize, sides)
    packed = Images(files.pixels_of(range(14)), files.labels)
    loader, want = (
        loader_of(files, kind, augment, workers=workers),
        loader_of(packed, kind, augment),
    )
    for _ in range(2):
        assert_same_batches(list(loader), list(want))


@pytest.mark.parametrize("kind", FILE_LOADERS)
@pytest.mark.parametrize("augment", [None, AugmentConfig(resized_crop=0.3), BOX])
def test_result_depends_neither_on_batch_size_nor_on_workers(tmp_path, kind, augment):
    files = odd_files(tmp_path, 13)
    want = by_label(loader_of(files, kind, augment))
    for batch, workers in [(1, 0), (13, 0), *((5, n) for n in WORKERS.get(kind, ()))]:
        found = by_label(loader_of(files, kind, augment, batch=batch, workers=workers))
        assert found.keys() == want.keys()
        assert all(torch.equal(x, want[label]) for label, x in found.items())


def test_torchvision_cuts_the_box_out_of_the_whole_image(tmp_path):
    files = odd_files(tmp_path, 20, "crop", (9, 9))
    crop = v2.RandomResizedCrop((9, 9), scale=(0.3, 1.0), antialias=True)
    found = by_label(loader_of(files, "torch", BOX))
    for number in range(20):
        torch.manual_seed(derive_seed(0, "sample", 0, number))
        part = crop(torch.tensor(files.read(number)).permute(2, 0, 1))
        want = UNIT.apply(part.permute(1, 2, 0)[None])[0]
        assert torch.equal(found[number].permute(1, 2, 0), want)


@pytest.mark.parametrize("kind", FILE_LOADERS)
def test_a_random_box_may_lie_anywhere_in_the_image(tmp_path, kind):
    """On images twice as wide as high, whose red tells the row and whose green the column."""
    row, column = np.mgrid[:20, :40]
    image = np.stack([row * 12, column * 6, np.zeros_like(row)], 2).astype(np.uint8)
    files = listed([image] * 300, range(300), (8, 8), tmp_path, "crop")
    pixels = torch.cat([x for x, _ in loader_of(files, kind, BOX, batch=50)]) * 255
    rows, columns = pixels[:, 0] / 12, pixels[:, 1] / 6
    heights = (rows[:, -1, 0] - rows[:, 0, 0]) * 8 / 7
    widths = (columns[:, 0, -1] - columns[:, 0, 0]) * 8 / 7
    area = heights * widths / 800
    assert area.min() > 0.2
    assert area.max() < 1
    assert 0.3 < area.mean() < 0.7
    assert columns.min() < 3  # outside the square in the middle, which evaluation sees
    assert columns.max() > 36
    assert ((widths / heights).log().abs() < np.log(4 / 3) + 0.3).all()


# Files that are taken away


def gone(path):
    path.unlink()


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def emptied(path):
    os.truncate(path, 0)


def garbled(path):
    path.write_bytes(b"x" * path.stat().st_size)


def replaced(path):
    new = path.with_suffix(".new")
    new.write_bytes(encoded(noise((8, 8, 3), seed=99)) + b"\0")  # as good an image
    new.rename(path)


def replaced_by_as_good(path):
    """An image of equal length and sides, under the old mtime."""
    before = path.stat()
    new = encoded(noise((8, 8, 3), seed=99), "BMP")
    other = path.with_suffix(".new")
    other.write_bytes(new.ljust(before.st_size, b"\0")[: before.st_size])
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(path)


def made_a_folder(path):
    path.unlink()
    path.mkdir()


FAULTS = [gone, cut, emptied, garbled, replaced, replaced_by_as_good, made_a_folder]


def failure(batches, seen=None):
    """Take batches, whose labels `seen` collects, until there is an error in one line, soon, and
    nothing printed; return it. (An error that is kept would keep the loader.)"""
    start = time.monotonic()
    message = ""
    try:
        for _, labels in batches:
            (seen if seen is not None else []).extend(labels.tolist())
    except DataError as error:
        message = str(error)
    assert time.monotonic() - start < SECONDS
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.full
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("augment", [None, BOX], ids=["evaluation", "training"])
@pytest.mark.parametrize(("kind", "workers"), FILE_CASES)
def test_a_file_taken_away_is_named(tmp_path, capfd, kind, workers, fault, augment):
    files = files_of(numbered(60), tmp_path)
    loader = loader_of(files, kind, augment, workers=workers, batch=2, shuffle=False)
    batches = iter(loader)
    seen = next(batches)[1].tolist()
    path = tmp_path / "0041.png"
    content = path.read_bytes()
    fault(path)
    assert failure(batches, seen).startswith(f"{path}: ")
    assert seen == list(range(40))
    assert capfd.readouterr() == ("", "")  # no worker's traceback
    # with the file back, the epoch goes on
    if path.is_dir():
        path.rmdir()
    path.write_bytes(content)
    assert loader.state_dict() == {"epoch": 0, "position": 40}
    assert [label for _, labels in loader for label in labels.tolist()] == list(range(40, 60))


@pytest.mark.full
@pytest.mark.parametrize("place", sorted({place for _, n, place in CASES if n}))
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_worker_is_named(tmp_path, capfd, place, killed):
    images = placed(numbered(60), place, tmp_path)
    loader = loader_of(images, "torch", workers=2, batch=2)
    batches = iter(loader)
    next(batches)
    pid = worker_pids(loader)[killed]
    os.kill(pid, signal.SIGKILL)
    assert re.match(rf"--loader torch: DataLoader worker .*\b{pid}\b", failure(batches))
    assert capfd.readouterr() == ("", "")


def test_what_a_worker_raised_is_told():
    told = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback:\n  File …\n"
    with (
        pytest.raises(DataError, match=r"process 0\. RuntimeError: no space; --workers 0 loads"),
        torch_loader._worker_errors(None),
    ):
        raise RuntimeError(told + "RuntimeError: no space")


@pytest.mark.cuda
@pytest.mark.parametrize(("kind", "workers"), FILE_CASES)
def test_on_a_gpu(tmp_path, kind, workers):
    files = odd_files(tmp_path, 30)
    options = {"workers": workers, "shuffle": False}
    loader = loader_of(files, kind, device="cuda", **options)
    found = [(x.cpu(), y.cpu()) for x, y in loader]
    assert_same_batches(found, list(loader_of(files, kind, **options)))
    (tmp_path / "0021.png").unlink()
    with pytest.raises(DataError, match=r"0021.png: No such file"):
        list(loader)
