"""Subsets and the validation part, drawn from the run's seed."""

import hashlib
from dataclasses import replace

import numpy as np

from fastcnn.config import DataConfig
from fastcnn.data.draws import derive_seed
from fastcnn.data.files import Files
from fastcnn.data.store import Dataset, Images
from fastcnn.errors import DataError, UsageError


def split(dataset: Dataset, config: DataConfig, seed: int) -> Dataset:
    """Draw --train-subset and --test-subset, then hold out --val-fraction of what is left.

    Uniform without replacement; chosen images keep their order. Raises UsageError for a subset
    larger than the set and for a fraction beside a val/ folder, DataError for an empty part.
    """
    if config.val_fraction > 0 and dataset.val is not None:
        raise UsageError("--val-fraction: the data has a val/ folder already; leave one out")
    digest = hashlib.sha256(dataset.digest.encode())
    train = _subset(dataset.train, config.train_subset, "train", seed, digest)
    test = _subset(dataset.test, config.test_subset, "test", seed, digest)
    val = dataset.val
    if config.val_fraction > 0:
        train, val = _hold_out(train, config.val_fraction, seed, digest)
    if train is dataset.train and test is dataset.test:
        return dataset
    return replace(dataset, train=train, test=test, val=val, digest=digest.hexdigest())


def _subset(
    images: Images | Files, count: int | None, name: str, seed: int, digest: "hashlib._Hash"
) -> Images | Files:
    if count is None:
        return images
    if count > len(images):
        raise UsageError(f"--{name}-subset {count}: there are {len(images)} {name} images")
    chosen = np.sort(_permutation(len(images), f"{name} subset", seed)[:count])
    digest.update(name.encode() + chosen.tobytes())
    return images.take(chosen)


def _hold_out(
    images: Images | Files, fraction: float, seed: int, digest: "hashlib._Hash"
) -> tuple[Images | Files, Images | Files]:
    count = round(len(images) * fraction)
    if not 0 < count < len(images):
        raise DataError(
            f"--val-fraction {fraction}: of {len(images)} training images it holds out {count}, "
            "which leaves no image for one of the two"
        )
    order = _permutation(len(images), "validation", seed)
    held, kept = np.sort(order[:count]), np.sort(order[count:])
    digest.update(b"val" + held.tobytes())
    return images.take(kept), images.take(held)


def _permutation(count: int, purpose: str, seed: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, purpose)).permutation(count)
