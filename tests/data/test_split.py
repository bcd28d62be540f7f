"""Subsets and the validation part: counts, seeds, and the same of files as of packed images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import IN_FILES, load, make_images, write_folder

from fastcnn.config import DataConfig
from fastcnn.data.images import Dataset
from fastcnn.data.select import split
from fastcnn.errors import DataError, UsageError


def dataset(train=40, test=20, val=None):
    return Dataset(
        "x",
        ("a", "b", "c"),
        make_images(train),
        make_images(test, seed=1),
        None if val is None else make_images(val, seed=2),
        "0" * 64,
    )


def rows(images):
    return [bytes(image) for image in images.pixels]


@settings(max_examples=30, deadline=None)
@given(
    train=st.integers(1, 40),
    test=st.integers(1, 20),
    fraction=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
    seed=st.integers(0, 5),
)
def test_split_counts_and_disjoint_parts(train, test, fraction, seed):
    whole = dataset()
    config = DataConfig(train_subset=train, test_subset=test, val_fraction=fraction)
    held = round(train * fraction)
    if fraction > 0 and not 0 < held < train:
        with pytest.raises(DataError, match="--val-fraction"):
            split(whole, config, seed)
        return
    parts = split(whole, config, seed)
    assert len(parts.train) == train - held
    assert len(parts.test) == test
    train_rows, val_rows = rows(parts.train), rows(parts.val) if parts.val else []
    assert len(val_rows) == held
    assert len({*train_rows, *val_rows}) == train
    assert {*train_rows, *val_rows} <= set(rows(whole.train))
    label_of = dict(zip(rows(whole.train), whole.train.labels, strict=True))
    assert [label_of[row] for row in train_rows] == parts.train.labels.tolist()


def test_split_is_seeded():
    config = DataConfig(train_subset=20, val_fraction=0.5)
    first, again, other = (split(dataset(), config, seed) for seed in (0, 0, 1))
    assert rows(first.train) == rows(again.train)
    assert rows(first.val) == rows(again.val)
    assert first.digest == again.digest
    assert rows(first.train) != rows(other.train)
    assert first.digest != other.digest


def test_split_of_nothing_returns_the_dataset():
    whole = dataset(val=3)
    assert split(whole, DataConfig(), 0) is whole


def test_subset_is_uniform():
    hits = np.zeros(40)
    whole = dataset()
    position = {row: i for i, row in enumerate(rows(whole.train))}
    for seed in range(200):
        for row in rows(split(whole, DataConfig(train_subset=10), seed).train):
            hits[position[row]] += 1
    # binomial(200, 1/4): mean 50, deviation 6.1
    assert hits.sum() == 2000
    assert hits.min() > 25
    assert hits.max() < 80


@pytest.mark.parametrize(
    ("config", "val", "message"),
    [
        (DataConfig(train_subset=41), None, "--train-subset 41: there are 40"),
        (DataConfig(test_subset=21), None, "--test-subset 21: there are 20"),
        (DataConfig(val_fraction=0.2), 3, "has a val/ folder"),
    ],
)
def test_split_refuses(config, val, message):
    with pytest.raises(UsageError, match=message):
        split(dataset(val=val), config, 0)


def test_files_are_split_like_packed_images(root, own_cache):
    write_folder(root, count=10)
    config = DataConfig(train_subset=15, test_subset=7, val_fraction=0.2)
    packed, files = (split(load(root, **options), config, 3) for options in ({}, IN_FILES))
    assert files.digest == packed.digest
    assert files.left_out == packed.left_out
    for name in ("train", "test", "val"):
        one, other = getattr(packed, name), getattr(files, name)
        assert np.array_equal(other.labels, one.labels)
        assert np.array_equal(other.pixels_of(range(len(other))), one.pixels)
