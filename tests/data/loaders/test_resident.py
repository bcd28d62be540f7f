"""Loaders that make batches on the device: the same bits with and without the library, whether
images stay there or are staged; what a CUDA graph relies on; nothing of a file in memory."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from image_files import make_images, write_folder
from loader_cases import EVERYTHING, FUSED, LOADERS, UNIT, Staged, assert_same_batches, loader_of

from fastcnn.config import AugmentConfig, DataConfig
from fastcnn.data import Normalization, make_loader
from fastcnn.data.loaders.upload import mapped_file, resident

RESIDENT = ["fused", "resident"]


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def test_images_in_memory_are_read_without_a_copy():
    images = make_images(5)
    loader = loader_of(images)
    assert loader.pixels.data_ptr() == images.pixels.ctypes.data


def run_child(program, *arguments):
    """Return what a process of its own prints; it finds the tests' modules."""
    head = f"import sys; sys.path[:0] = {sys.path!r}\n"
    command = [sys.executable, "-c", head + program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


# a cut file that is mapped into memory ends the process with SIGBUS
DISTURBED = """
import hashlib, os, pathlib, shutil
from image_files import load
from loader_cases import FUSED, loader_of
_, root, folder, kind, workers, *disturbances = sys.argv
if kind == "fused":
    from fastcnn import ops
    ops.load()
for disturbance in disturbances:
    cache = pathlib.Path(folder) / disturbance
    cache.mkdir()
    os.environ["FASTCNN_CACHE"] = str(cache)
    images = load(root).train
    digest = hashlib.sha256()
    loader = loader_of(images, kind, FUSED, workers=int(workers))
    for number, (x, y) in enumerate(loader):
        digest.update(x.numpy().tobytes() + y.numpy().tobytes())
        if number == 1:
            for path in cache.glob("*/train.pixels.npy"):
                if disturbance == "cut":
                    os.truncate(path, 100)
                if disturbance == "overwritten":
                    path.write_bytes(bytes(path.stat().st_size))
                if disturbance == "removed":
                    shutil.rmtree(path.parent)
    print(number, digest.hexdigest())
"""


@pytest.mark.full
@pytest.mark.parametrize(("kind", "workers"), [(k, 0) for k in LOADERS] + [("torch", 2)])
def test_what_becomes_of_the_stores_file_disturbs_no_epoch(root, tmp_path, kind, workers):
    write_folder(root, count=20, side=32)
    disturbances = ("left alone", "cut", "overwritten", "removed")
    printed = run_child(DISTURBED, root, tmp_path, kind, workers, *disturbances).splitlines()
    assert len(printed) == 4
    assert len(set(printed)) == 1
    assert printed[0].startswith("9 ")


# prints what the loader holds at its most and in the end, in bytes
MEMORY = """
import numpy as np
from image_files import make_images
from loader_cases import loader_of
from fastcnn.data.loaders import upload
from fastcnn.data.images import Images
upload.PIECE = 2**22
def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(lines[name].split()[0]) * 1024 for name in ("VmHWM", "VmRSS")]
loader_of(make_images(9), sys.argv[2])
_, before = memory()
pixels = np.load(sys.argv[1], mmap_mode="c")
loader = loader_of(Images(pixels, np.arange(len(pixels))), sys.argv[2])
print(*[value - before for value in memory()])
"""


@pytest.mark.full
@pytest.mark.parametrize("kind", LOADERS[1:])
def test_memory_never_holds_the_store_twice(tmp_path, kind):
    size = 2**26
    np.save(tmp_path / "pixels.npy", np.ones((size // (32 * 32 * 4), 32, 32, 3), dtype=np.uint8))
    size = size * 3 // 4
    most, finally_ = map(int, run_child(MEMORY, tmp_path / "pixels.npy", kind).split())
    assert 0.95 * size < finally_ < size + 2**22
    assert most < size + 2 * 2**22


def test_what_is_mapped(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="c")
    for values in (mapped, np.asarray(mapped), mapped[2:].reshape(5, 2)[:, 1]):
        assert mapped_file(values) is not None
        copied = resident(values, torch.device("cpu"))
        assert copied.tolist() == values.tolist()
        assert not np.shares_memory(copied.numpy(), mapped)
    for values in (mapped[[1, 2]], np.array(mapped), np.arange(3)[::-1], mapped[:0].copy()):
        assert mapped_file(values) is None
        assert resident(values, torch.device("cpu")).tolist() == values.tolist()
    assert resident(mapped[:0], torch.device("cpu")).tolist() == []


# Staged images


@pytest.mark.parametrize("backend", ["fused", "torch"])
@pytest.mark.parametrize(
    "augment", [None, FUSED, EVERYTHING, AugmentConfig(crop_padding=0, resized_crop=0.4)]
)
@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_staged_images_give_the_batches_of_resident_ones(backend, augment, rank, world):
    images = make_images(22)
    part = {"rank": rank, "world": world}
    staged = Staged(images, augment, backend=backend, **part)
    want = loader_of(images, "resident", augment, **part)
    for _ in range(2):
        assert_same_batches(list(staged), list(want))


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_staging_goes_on_where_an_epoch_was_given_up(backend):
    images = make_images(22)
    whole = list(Staged(images, FUSED, backend=backend))
    loader, resumed = (Staged(images, FUSED, backend=backend) for _ in range(2))
    first = []
    for batch in loader:
        first.append(batch)
        if len(first) == 2:
            break
    resumed.load_state_dict(loader.state_dict())
    assert_same_batches(first + list(loader), whole)
    assert_same_batches(list(resumed), whole[2:])
    assert_same_batches(list(loader), list(resumed))


@pytest.mark.cuda
def test_staged_images_in_a_graph():
    images = make_images(20)
    loader, other = (Staged(images, FUSED, device="cuda") for _ in range(2))
    loader.begin()
    loader.stage(4)
    loader.batch(4)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, y = loader.batch(4)
    for count, want in zip(loader.begin(), list(other), strict=True):
        loader.stage(count)
        graph.replay()
        loader.advance(count)
        assert_same_batches([(x, y)], [want])


KERNEL_CASES = [
    FUSED,
    AugmentConfig(crop_mode="zero", crop_padding=11, cutout=20),
    AugmentConfig(crop_padding=0),
    AugmentConfig(flip="none"),
    None,
]


@pytest.mark.parametrize("mode", ["zscore", "unit", "centered", "mean-image", "levels"])
@pytest.mark.parametrize("augment", [*KERNEL_CASES, EVERYTHING])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_library_changes_no_bit(augment, mode, dtype):
    images = make_images(23)
    options = {"normalization": Normalization.fit(images, mode), "dtype": dtype, "seed": 2**31 - 1}
    fused, plain = (loader_of(images, kind, augment, **options) for kind in ("fused", "resident"))
    assert fused.fused == (augment is not EVERYTHING)
    assert not plain.fused
    for _ in range(3):
        assert_same_batches(list(fused), list(plain))


def test_auto_takes_the_library_where_it_can(monkeypatch):
    images = make_images(5)

    def made(dtype):
        options = {"batch_size": 4, "device": torch.device("cpu"), "dtype": dtype}
        order = {"seed": 0, "shuffle": True, "drop_last": False}
        return make_loader(images, DataConfig(), AugmentConfig(), UNIT, **options, **order)

    assert made(torch.float32).fused
    assert not made(torch.float16).fused
    monkeypatch.setattr("fastcnn.ops.loading._loaded", False)
    assert not made(torch.float32).fused


@pytest.mark.parametrize("kind", RESIDENT)
@pytest.mark.parametrize("augment", [FUSED, EVERYTHING, AugmentConfig(resized_crop=0.4)])
def test_a_batch_follows_from_what_is_on_the_device(kind, augment):
    images = make_images(22)
    loader, wanted = loader_of(images, kind, augment), list(loader_of(images, kind, augment))
    assert loader.begin() == [4] * 5 + [2]
    made = [loader.batch(4) for _ in range(3)]
    assert loader.state_dict() == {"epoch": 0, "position": 0}  # of the host: it is told apart
    assert loader.at.tolist() == [0, 12]
    loader.cursor.fill_(4)  # a replay makes the batch of the position that it finds
    made.append(loader.batch(4))
    assert_same_batches(made, [*wanted[:3], wanted[1]])
    loader.advance(8)
    assert loader.begin() == [4, 4, 4, 2]
    assert loader.at.tolist() == [0, 8]
    assert_same_batches([loader.batch(n) for n in (4, 4, 4, 2)], wanted[2:])
    loader.finish()
    assert loader.state_dict() == {"epoch": 1, "position": 0}
    loader.begin()
    assert loader.at.tolist() == [1, 0]


@pytest.mark.parametrize("kind", RESIDENT)
@pytest.mark.parametrize("augment", [FUSED, EVERYTHING, AugmentConfig(resized_crop=0.4)])
def test_addresses_stay(kind, augment):
    loader = loader_of(make_images(22), kind, augment)

    def addresses():
        tensors = [loader.order, loader.at, loader.cursor, loader.pixels, loader.labels]
        tensors += [loader.scale, loader.bias, loader.fill, *loader.draws.values()]
        return [t.data_ptr() for t in tensors]

    before = addresses()
    for _ in range(3):
        list(loader)
        assert addresses() == before


@pytest.mark.parametrize("kind", LOADERS)
def test_parts_are_what_iteration_gives(kind):
    images = make_images(22)
    loader, other = loader_of(images, kind, FUSED), loader_of(images, kind, FUSED)
    for _ in range(2):
        made = []
        for count in loader.begin():
            loader.stage(count)
            made.append(loader.batch(count))
            loader.advance(count)
        loader.finish()
        assert_same_batches(made, list(other))


def test_a_loader_used_in_inference_mode_works_outside_it():
    for augment in (FUSED, EVERYTHING):
        loader = loader_of(make_images(9), "resident", augment)
        with torch.inference_mode():
            list(loader)
        assert sum(len(x) for x, _ in loader) == 9


@pytest.mark.cuda
@pytest.mark.parametrize("kind", RESIDENT)
@pytest.mark.parametrize("augment", [None, FUSED, AugmentConfig()])
def test_cuda_equals_cpu(kind, augment):
    images = make_images(20)
    cpu = loader_of(images, augment=augment)
    for (x, y), want in zip(loader_of(images, kind, augment, device="cuda"), cpu, strict=True):
        assert x.is_cuda
        assert_same_batches([(x.cpu(), y.cpu())], [want])


@pytest.mark.cuda
@pytest.mark.parametrize("kind", RESIDENT)
@pytest.mark.parametrize("augment", [None, FUSED, EVERYTHING])
def test_batches_replayed_from_a_graph(kind, augment):
    images = make_images(20)
    loader, other = (loader_of(images, kind, augment, device="cuda") for _ in range(2))
    loader.begin()
    loader.batch(4)  # what torch does at its first call must not be captured
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x, y = loader.batch(4)
    for _ in range(2):
        torch.cuda.set_sync_debug_mode("error")
        try:
            sizes = loader.begin()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for count, want in zip(sizes, list(other), strict=True):
            graph.replay()
            loader.advance(count)
            assert_same_batches([(x, y)], [want])
        loader.finish()
