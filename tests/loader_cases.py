"""The loaders on small images: one way to make each, and to compare what they give."""

import numpy as np
import torch
from image_files import make_images

from fastcnn.config import AugmentConfig, DataConfig
from fastcnn.data import Normalization, make_loader
from fastcnn.data.store import Images

FUSED = AugmentConfig(cutout=3, flip="alternating")  # all of it by the kernel
EVERYTHING = AugmentConfig(rotation=10, shift=0.1, cutout=3, color_jitter=0.3)
UNIT = Normalization("unit", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
LOADERS = ["fused", "resident", "torch"]


def loader_of(
    images,
    kind="resident",
    augment=None,
    *,
    workers=0,
    normalization=UNIT,
    batch=4,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    shuffle=True,
    drop_last=False,
):
    return make_loader(
        images,
        DataConfig(loader="torch" if kind == "torch" else "resident", workers=workers),
        augment,
        normalization,
        batch_size=batch,
        device=torch.device(device),
        dtype=dtype,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        backend="fused" if kind == "fused" else "torch",
    )


def numbered(count):
    """Images whose label is their own number."""
    return Images(make_images(count).pixels, np.arange(count, dtype=np.int64))


def epoch_labels(loader):
    return [label for _, y in loader for label in y.tolist()]


def by_label(loader):
    """Return {label: x} of one epoch."""
    return {int(label): image for x, y in loader for image, label in zip(x, y, strict=True)}


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for (x, y), (other_x, other_y) in zip(first, second, strict=True):
        assert torch.equal(y, other_y)
        assert torch.equal(x, other_x)
