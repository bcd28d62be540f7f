"""Seeded draws: every random choice depends on (seed, purpose, epoch, sample) and nothing else.

So neither batch size nor position nor device changes what becomes of a sample, and a run resumed in
mid-epoch goes on exactly where it stopped. Here are the draws of the host; crop, flip and cutout
are drawn from a counter where the batch is made (fastcnn.ops.augment).
"""

import hashlib
from typing import Literal

import torch

from fastcnn.ops.reference.augmentation import draw_alternating_flip

Shuffle = bool | Literal["once"]
"""Whether an epoch has an order of its own; "once": one order for all of them; False: as stored."""


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """Return a 63-bit seed of its own for each purpose and numbers (epoch, sample)."""
    text = "/".join([str(seed), purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *numbers))


def epoch_order(seed: int, epoch: int, samples: int, shuffle: Shuffle) -> torch.Tensor:
    """Return int64 (samples,): the order of an epoch, a permutation or, unshuffled, 0, 1, 2, …"""
    if not shuffle:
        return torch.arange(samples)
    turn = 0 if shuffle == "once" else epoch
    return torch.randperm(samples, generator=generator(seed, "order", turn))


def alternating_flip(seed: int, epoch: int, samples: int) -> torch.Tensor:
    """Return bool (samples,): one half on even epochs, the other on odd ones, as ops.augment."""
    return draw_alternating_flip(seed, torch.tensor(epoch), torch.arange(samples))
