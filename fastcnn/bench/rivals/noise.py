"""Images of noise: the time of a step does not depend on what they show."""

import numpy as np
import torch

from fastcnn.bench.timing import cache_bytes
from fastcnn.data import Images

MOST = 50_000  # as many as CIFAR-10 has


def images(count: int, size: int, classes: int, seed: int) -> Images:
    """Return `count` labelled images, uint8 (count, size, size, 3)."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return Images(pixels, rng.integers(0, classes, count))


def enough(size: int, batch: int, device: torch.device) -> int:
    """How many images make a set larger than the cache, of at least four whole batches."""
    beyond_cache = 2 * cache_bytes(device) // (3 * size * size)
    return max(4, min(beyond_cache, MOST) // batch + 1) * batch
