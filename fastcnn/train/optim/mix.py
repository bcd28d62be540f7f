"""mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) on a batch.

Each image is mixed with its neighbour in the (shuffled) batch. What a step mixes comes from a host
generator seeded by (seed, step), so a resumed run draws the same, as a row of numbers that the step
reads on the device.
"""

import random
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.config import OptimConfig


class Draw(NamedTuple):
    """The mixing of a step: the weight of an image's own pixels, and a box that its neighbour fills
    whole, its edges in parts of the side. mixup: no box; cutmix: weight 1."""

    weight: float
    top: float = 0.0
    bottom: float = 0.0
    left: float = 0.0
    right: float = 0.0


NUMBERS = len(Draw._fields)


def draw(config: OptimConfig, seed: int, step: int) -> Draw:
    """mixup or cutmix; both on: one of them at random a step."""
    generator = random.Random(f"mix {seed} {step}")
    pick_cutmix = config.cutmix > 0 and (config.mixup == 0 or generator.random() < 0.5)
    alpha = config.cutmix if pick_cutmix else config.mixup
    weight = generator.betavariate(alpha, alpha)
    if not pick_cutmix:
        return Draw(weight)
    half, y, x = (1 - weight) ** 0.5 / 2, generator.random(), generator.random()
    return Draw(1.0, y - half, y + half, x - half, x + half)


def mix(images: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Mix images (N, C, H, W) by the numbers of a Draw, fp32 (5,) on the device.

    Returns the mixed images and the weight of an image's own label, fp32 (): the part of the pixels
    that are its own.
    """
    weight, top, bottom, left, right = row
    rolled = images.roll(1, 0)
    mixed = torch.lerp(rolled.float(), images.float(), weight).to(images.dtype)
    rows = _between(images.shape[2], top, bottom)
    columns = _between(images.shape[3], left, right)
    inside = rows[:, None] & columns
    label = weight * (1 - inside.float().mean())
    return torch.where(inside, rolled, mixed), label


def _between(side: int, low: Tensor, high: Tensor) -> Tensor:
    """Which pixels of a side have their centre between two edges in parts of the side."""
    centres = (torch.arange(side, device=low.device) + 0.5) / side
    return (centres >= low) & (centres < high)
