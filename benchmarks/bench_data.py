"""Images/s of the loaders, one epoch a round, batches of 512 to float32 on the CPU.

    pytest benchmarks/bench_data.py --benchmark-enable
    FASTCNN_BENCH_DATA=<image folder> pytest benchmarks/bench_data.py --benchmark-enable

"resident-fused" makes its batches with fastcnn.ops.augment, "resident-torch" with tensor
operations; "all" is more than that op does, and there both are alike. Without a folder the images
are noise of CIFAR-10's size. `images_per_s`, from the median round, is in the extra info of the
JSON (--benchmark-json) and printed.
"""

import os

import numpy as np
import pytest
import torch

from fastcnn.config import AugmentConfig, DataConfig
from fastcnn.data import Images, Normalization, load_dataset, make_loader

# the backend, and images an epoch: a loader of single images is some 50 times slower
LOADERS = {
    "resident-fused": (DataConfig(), "fused", 20_000),
    "resident-torch": (DataConfig(), "torch", 20_000),
    "torch-0-workers": (DataConfig(loader="torch", workers=0), "torch", 2_000),
    "torch-2-workers": (DataConfig(loader="torch", workers=2), "torch", 4_000),
}
AUGMENTS = {
    "off": None,
    "crop-flip": AugmentConfig(),
    "all": AugmentConfig(rotation=15, shift=0.1, cutout=8, color_jitter=0.2),
}


@pytest.fixture(scope="module")
def images():
    if folder := os.environ.get("FASTCNN_BENCH_DATA"):
        return load_dataset(DataConfig(data=folder), 32).train
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    return Images(pixels, rng.integers(0, 10, 50_000))


@pytest.mark.parametrize("batch_size", [128, 512])
@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("name", LOADERS)
def test_loader(benchmark, images, name, augment, batch_size):
    config, backend, count = LOADERS[name]
    part = Images(images.pixels[:count], images.labels[:count])
    loader = make_loader(
        part,
        config,
        AUGMENTS[augment],
        Normalization.fit(part, "zscore"),
        batch_size=batch_size,
        device=torch.device("cpu"),
        seed=0,
        shuffle=True,
        drop_last=False,
        backend=backend,
    )

    def epoch():
        return sum(len(x) for x, _ in loader)

    assert benchmark.pedantic(epoch, rounds=3, warmup_rounds=1) == len(part)
    if benchmark.stats is not None:
        rate = len(part) / benchmark.stats.stats.median
        benchmark.extra_info["images_per_s"] = round(rate)
        print(f"\n{name} {augment} batch {batch_size}: {rate:,.0f} images/s")


@pytest.mark.parametrize("mode", ["zscore", "mean-image"])
def test_fit(benchmark, images, mode):
    fitted = benchmark.pedantic(Normalization.fit, (images, mode), rounds=3)
    assert fitted.mode == mode
