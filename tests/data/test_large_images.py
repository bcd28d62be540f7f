"""Small files of large images: what they unpack to is bounded in memory, and refused on a disk
without room."""

import tracemalloc

import pytest
from image_files import encoded, large_png, load, noise, write_members, write_tar

from fastcnn.cache import cache_dir
from fastcnn.data import examine
from fastcnn.data.decode import decode
from fastcnn.data.sources.base import Encoded
from fastcnn.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")
SIDE, COUNT = 2000, 32
LARGE = large_png(SIDE)  # a few hundred bytes, of which 64 would make a task
MOST = COUNT * 3 * SIDE * SIDE // 2


@pytest.fixture
def peak():
    """What returns the bytes that Python and NumPy have held at most."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("cores", "mean_bytes"), [(1, len(LARGE)), (2, examine.THREADED_BYTES)], ids=["one", "threads"]
)
def test_few_pixels_are_in_memory_at_once(monkeypatch, peak, cores, mean_bytes):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(cores))
    monkeypatch.setattr(examine, "FLIGHT_PIXELS", 1 << 26)
    sources = (Encoded("train", i, str(i), lambda: LARGE) for i in range(COUNT))
    view, seen = examine.View(None, "stretch"), []
    for chunk in examine.examine_all(sources, view, mean_bytes, keep_pixels=True):
        seen += [(source.position, record.shape) for source, record in chunk]
    assert seen == [(i, (SIDE, SIDE)) for i in range(COUNT)]
    assert peak() < MOST


def members(first):
    """Two splits of two classes, `first` before all others, which are large."""
    names = [f"train/a/{i}.png" for i in range(COUNT)]
    names += [f"{folder}/{i}.png" for folder in ("train/b", "test/a", "test/b") for i in range(2)]
    return dict.fromkeys(names, LARGE) | {names[0]: first}


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_another_size_is_refused_before_all_are_decoded(tmp_path, monkeypatch, peak, kind):
    decoded = []
    monkeypatch.setattr(examine, "decode", lambda data: decoded.append(1) or decode(data))
    path, images = tmp_path / f"x.{kind}", members(encoded(noise((32, 32, 3))))
    (write_tar if kind == "tar" else write_members)(path, images)
    with pytest.raises(DataError, match=f"images of different sizes: .* has {SIDE} x {SIDE}"):
        load(path)
    assert peak() < MOST
    assert len(decoded) < COUNT // 2
    assert list(cache_dir().glob(".tmp-*")) == []


def test_what_the_disk_cannot_hold_is_refused_at_the_first_images(tmp_path, monkeypatch, peak):
    usage = type("Usage", (), {"free": 400 << 20})
    monkeypatch.setattr("fastcnn.data.store.shutil.disk_usage", lambda _: usage)
    path = write_tar(tmp_path / "x.tar", members(LARGE))
    wanted = (
        f"{(COUNT + 6) * 3 * SIDE * SIDE} bytes needed for {COUNT + 6} images of {SIDE} x {SIDE} "
        f"pixels, {400 << 20} free; give a smaller --image-size, free some or set FASTCNN_CACHE"
    )
    with pytest.raises(DataError, match=wanted):
        load(path)
    assert peak() < MOST
    assert list(cache_dir().glob(".tmp-*")) == []
