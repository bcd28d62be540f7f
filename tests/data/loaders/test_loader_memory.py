"""The memory of loaders does not grow from epoch to epoch, nor does that of their workers."""

import gc

import pytest
from image_files import make_images
from loader_cases import CASES, loader_of, placed, resident_bytes, worker_pids

from fastcnn.config import AugmentConfig

pytestmark = pytest.mark.full

EPOCHS = 20
FIRST = 3  # epoch whose memory is that of a loader at work
MOST = 2 * 2**20  # bytes more; a leak of an epoch's batches would be 17 times an epoch's bytes


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.mark.parametrize(("kind", "workers", "place"), CASES)
@pytest.mark.parametrize("augment", [None, AugmentConfig(resized_crop=0.5)], ids=["plain", "box"])
def test_memory_is_flat_over_twenty_epochs(tmp_path, kind, workers, place, augment):
    images = placed(make_images(64, 32, 32), place, tmp_path)
    loader = loader_of(images, kind, augment, workers=workers, batch=16)
    sizes = []
    for epoch in range(1, EPOCHS + 1):
        for _ in loader:
            pids = worker_pids(loader) if workers else []
        if epoch in (FIRST, EPOCHS):
            gc.collect()  # which takes a while where many tests have run
            sizes.append([resident_bytes(pid) for pid in ("self", *pids)])
    assert len(sizes[0]) == 1 + workers
    epoch_bytes = 64 * 32 * 32 * 3 * 4
    assert epoch_bytes * (EPOCHS - FIRST) > 5 * MOST
    for early, late in zip(*sizes, strict=True):
        assert late - early < MOST
