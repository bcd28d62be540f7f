"""mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019) on a batch.

Each image is mixed with its neighbour in the (shuffled) batch. The mixing weight comes from a host
generator seeded by (seed, step), so a resumed run draws the same and the device is never waited
for.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcnn.config import OptimConfig


@dataclass(frozen=True)
class Mixed:
    """A batch whose targets are `weight` · labels + (1 − weight) · others."""

    images: Tensor
    labels: Tensor
    others: Tensor
    weight: float


def mix(images: Tensor, labels: Tensor, config: OptimConfig, seed: int, step: int) -> Mixed:
    """Mix a batch (N, C, H, W) by mixup or cutmix; both on: one of them at random a step."""
    generator = random.Random(f"mix {seed} {step}")
    pick_cutmix = config.cutmix > 0 and (config.mixup == 0 or generator.random() < 0.5)
    alpha = config.cutmix if pick_cutmix else config.mixup
    weight = generator.betavariate(alpha, alpha)
    others = labels.roll(1)
    if not pick_cutmix:
        return Mixed(torch.lerp(images.roll(1, 0), images, weight), labels, others, weight)
    top, bottom, left, right = _box(images.shape[2], images.shape[3], weight, generator)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.roll(1, 0)[:, :, top:bottom, left:right]
    cut = (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    return Mixed(mixed, labels, others, 1 - cut)


def _box(
    height: int, width: int, weight: float, generator: random.Random
) -> tuple[int, int, int, int]:
    """A box of area (1 − weight) around a random centre, clipped at the image's edges."""
    half = (1 - weight) ** 0.5 / 2
    row, column = generator.randrange(height), generator.randrange(width)
    top, bottom = max(0, round(row - half * height)), min(height, round(row + half * height))
    left, right = max(0, round(column - half * width)), min(width, round(column + half * width))
    return top, bottom, left, right
