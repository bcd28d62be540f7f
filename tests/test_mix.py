"""mixup and cutmix: what they mix is what their targets say."""

import pytest
import torch

from fastcnn.config import OptimConfig
from fastcnn.train.mix import mix

IMAGES = (
    torch.arange(6.0)
    .view(6, 1, 1, 1)
    .expand(6, 3, 8, 8)
    .contiguous(memory_format=torch.channels_last)
)
LABELS = torch.arange(6)


def test_mixup_blends_images_by_the_weight_of_their_targets():
    mixed = mix(IMAGES, LABELS, OptimConfig(mixup=1.0), seed=0, step=3)
    first, second = mixed.labels.float(), mixed.others.float()
    expected = mixed.weight * first + (1 - mixed.weight) * second
    torch.testing.assert_close(mixed.images[:, 0, 4, 4], expected)
    assert mixed.images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("step", range(20))
def test_cutmix_weight_is_the_share_of_the_image_that_is_kept(step):
    mixed = mix(IMAGES, LABELS, OptimConfig(cutmix=1.0), seed=1, step=step)
    kept = (mixed.images == IMAGES).float().mean((1, 2, 3))
    torch.testing.assert_close(kept, torch.full((6,), mixed.weight))
    replaced = mixed.images[mixed.images != IMAGES].view(6, -1) if mixed.weight < 1 else None
    if replaced is not None:
        assert torch.equal(replaced[:, 0].long(), mixed.others)
    assert torch.equal(IMAGES[:, 0, 0, 0], torch.arange(6.0))


def test_draws_depend_on_seed_and_step_alone():
    config = OptimConfig(mixup=0.4, cutmix=1.0)
    torch.manual_seed(5)
    first = mix(IMAGES, LABELS, config, seed=2, step=9)
    torch.manual_seed(6)
    again = mix(IMAGES, LABELS, config, seed=2, step=9)
    other = [mix(IMAGES, LABELS, config, seed=2, step=step).weight for step in range(10, 16)]
    assert torch.equal(first.images, again.images)
    assert len({first.weight, *other}) == 7


def test_both_on_uses_both():
    config = OptimConfig(mixup=1.0, cutmix=1.0)
    whole = [
        mix(IMAGES, LABELS, config, seed=0, step=s).images[:, 0].flatten(1).unique(dim=1).shape[1]
        for s in range(40)
    ]
    assert 5 < sum(values == 1 for values in whole) < 35
