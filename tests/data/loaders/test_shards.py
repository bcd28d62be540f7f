"""Loaders of several processes: together they have each image once, and each has its own pixels."""

import pytest
import torch
from image_files import make_images
from loader_cases import (
    CASES,
    EVERYTHING,
    FUSED,
    LOADERS,
    Staged,
    assert_same_batches,
    by_label,
    epoch_labels,
    loader_of,
    numbered,
    placed,
)

from fastcnn.errors import DataError

TOTALS = {0: (4, 7, 13), 2: (13,)}  # by the number of workers, which take their time to start


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.mark.full
@pytest.mark.parametrize(("kind", "workers", "place"), CASES)
@pytest.mark.parametrize(
    ("augment", "shuffle"), [(None, False), (FUSED, True), (EVERYTHING, True)], ids=str
)
def test_shards_are_the_whole(kind, workers, place, augment, shuffle, tmp_path):
    for total in TOTALS[workers]:
        images = placed(numbered(total), place, tmp_path / str(total))
        options = {"kind": kind, "augment": augment, "shuffle": shuffle, "batch": 3}
        whole = loader_of(images, **options)
        orders = [epoch_labels(whole) for _ in range(2)]
        whole.load_state_dict({"epoch": 0, "position": 0})
        pixels = [by_label(whole) for _ in range(2)]
        for world in range(1, 5):
            shards = [
                loader_of(images, **options, workers=workers, rank=rank, world=world)
                for rank in range(world)
            ]
            check_shards(shards, orders, pixels)


def check_shards(shards, orders, pixels):
    """orders: all labels of each epoch. pixels: {label: x} of each epoch."""
    total, world = len(orders[0]), len(shards)
    for order, by_number in zip(orders, pixels, strict=True):
        found = [by_label(shard) for shard in shards]
        assert [list(own) for own in found] == [order[rank::world] for rank in range(world)]
        assert sorted(label for own in found for label in own) == list(range(total))
        for own in found:
            assert all(torch.equal(x, by_number[label]) for label, x in own.items())
    assert [shard.samples for shard in shards] == [len(orders[0][r::world]) for r in range(world)]
    for shard in shards:
        assert len(shard) == -(-shard.samples // 3)
        assert shard.state_dict() == {"epoch": 2, "position": 0}


@pytest.mark.parametrize(("kind", "workers", "place"), CASES)
def test_a_shard_is_resumed(kind, workers, place, tmp_path):
    images = placed(make_images(23), place, tmp_path)
    options = {"kind": kind, "augment": FUSED, "batch": 2, "rank": 1, "world": 3}
    whole = loader_of(images, **options)
    assert len(list(whole)) == 4  # of epoch 0; epoch 1 follows
    wanted = list(whole)
    for done in range(5):
        resumed = loader_of(images, **options, workers=workers)
        # of all three together
        resumed.load_state_dict({"epoch": 1, "position": min(6 * done, 23)})
        assert_same_batches(list(resumed), wanted[done:])
        assert resumed.state_dict() == {"epoch": 2, "position": 0}
    with pytest.raises(DataError, match="position 24 of epoch 1: there are 23 images"):
        resumed.load_state_dict({"epoch": 1, "position": 24})


@pytest.mark.parametrize("kind", [*LOADERS, "staged"])
def test_a_process_without_images(kind):
    def made(rank, world, count=3):
        images = numbered(count)
        if kind == "staged":
            return Staged(images, rank=rank, world=world)
        return loader_of(images, kind, rank=rank, world=world)

    assert made(2, 4).samples == 1
    with pytest.raises(DataError) as error:
        made(3, 4)
    message = "process 3 of 4: 3 images leave none for it; start 3 processes at most"
    assert str(error.value) == message
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=f"rank: expected 0 to 3, got {rank}"):
            made(rank, 4)
