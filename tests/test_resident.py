"""The resident loader: the same bits with and without the library; what a CUDA graph relies on."""

import pytest
import torch
from image_files import make_images
from loader_cases import EVERYTHING, FUSED, LOADERS, UNIT, assert_same_batches, loader_of

from fastcnn.config import AugmentConfig, DataConfig
from fastcnn.data import Normalization, make_loader

RESIDENT = ["fused", "resident"]


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def test_resident_reads_the_images_without_a_copy():
    images = make_images(5)
    loader = loader_of(images)
    assert loader.pixels.data_ptr() == images.pixels.ctypes.data


KERNEL_CASES = [
    FUSED,
    AugmentConfig(crop_mode="zero", crop_padding=11, cutout=20),
    AugmentConfig(crop_padding=0),
    AugmentConfig(flip="none"),
    None,
]


@pytest.mark.parametrize("mode", ["zscore", "unit", "centered", "mean-image"])
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
