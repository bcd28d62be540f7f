"""Exponential moving average of a model's weights and statistics (Polyak averaging)."""

import copy

import torch
from torch import Tensor, nn

from fastcnn.train.numerics.statistics import statistics


class Ema:
    """A second model that trails the first: shadow += (1 − d) · (weight − shadow) a step.

    The optimiser moves the parameters in the pass that updates the weights; `update_statistics`
    moves the running statistics of the norms.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.parameters = [p.detach() for p in self.model.parameters()]
        self._shadow, self._source = statistics(self.model), statistics(model)

    @torch.no_grad()
    def update_statistics(self, weight: Tensor) -> None:
        """Move the statistics by `weight`, fp32 () on the device, towards those of the model."""
        if self._shadow:
            moves = torch._foreach_sub(self._source, self._shadow)
            torch._foreach_mul_(moves, weight)
            torch._foreach_add_(self._shadow, moves)


def move_of(decay: float, step: int) -> float:
    """1 − d after step `step` (0-based): d is `decay`, or less in the first steps,
    (1 + t) / (10 + t), so that the shadow forgets the random start."""
    return 1 - min(decay, (1 + step) / (10 + step))
