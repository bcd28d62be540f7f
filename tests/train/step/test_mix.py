"""mixup and cutmix: what they mix is what their targets say."""

import pytest
import torch

from fastcnn.config import OptimConfig
from fastcnn.train.optim.mix import draw, mix

IMAGES = (
    torch.arange(6.0)
    .view(6, 1, 1, 1)
    .expand(6, 3, 8, 8)
    .contiguous(memory_format=torch.channels_last)
)
OTHERS = torch.arange(6.0).roll(1)


def mixed(step, seed=0, **options):
    return mix(IMAGES, torch.tensor(draw(OptimConfig(**options), seed, step)))


def test_mixup_blends_images_by_the_weight_of_their_targets():
    images, own = mixed(3, mixup=1.0)
    assert 0.01 < own < 0.99
    expected = own * torch.arange(6.0) + (1 - own) * OTHERS
    torch.testing.assert_close(images, expected.view(6, 1, 1, 1).expand(6, 3, 8, 8))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_is_mixed_in_fp32_and_rounded_once():
    row = torch.tensor(draw(OptimConfig(mixup=1.0), 0, 3))
    exact, _ = mix(IMAGES / 7, row)
    rounded, _ = mix((IMAGES / 7).bfloat16(), row)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=2**-7, atol=0)


@pytest.mark.parametrize("step", range(20))
def test_cutmix_weight_is_the_share_of_the_image_that_is_kept(step):
    images, own = mixed(step, seed=1, cutmix=1.0)
    kept = images == IMAGES
    torch.testing.assert_close(kept.float().mean((1, 2, 3)), own.expand(6))
    others = OTHERS.view(6, 1, 1, 1).expand(6, 3, 8, 8)
    assert torch.equal(images[~kept], others[~kept])
    rows, columns = (~kept[0, 0]).any(1), (~kept[0, 0]).any(0)
    assert torch.equal(~kept[0, 0], rows[:, None] & columns)  # a box
    assert torch.equal(IMAGES[:, 0, 0, 0], torch.arange(6.0))


def test_cutmix_cuts_the_share_that_it_drew():
    config = OptimConfig(cutmix=1.0)
    boxes = [draw(config, 0, step) for step in range(400)]
    inner = [d for d in boxes if min(d.top, d.left) >= 0 and max(d.bottom, d.right) <= 1]
    shares = torch.tensor([(d.bottom - d.top) * (d.right - d.left) for d in boxes])
    assert len(inner) > 40
    # Beta(1, 1) is uniform
    assert shares.mean().item() == pytest.approx(0.5, abs=0.05)
    assert shares.std().item() == pytest.approx(12**-0.5, abs=0.03)


def test_draws_depend_on_seed_and_step_alone():
    config = OptimConfig(mixup=0.4, cutmix=1.0)
    torch.manual_seed(5)
    first = draw(config, 2, 9)
    torch.manual_seed(6)
    assert draw(config, 2, 9) == first
    assert len({first, *(draw(config, 2, step) for step in range(10, 16)), draw(config, 3, 9)}) == 8


def test_both_on_uses_both():
    weights = [draw(OptimConfig(mixup=1.0, cutmix=1.0), 0, step).weight for step in range(40)]
    assert 5 < sum(weight == 1 for weight in weights) < 35
