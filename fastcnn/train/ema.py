"""Exponential moving average of a model's weights and statistics (Polyak averaging)."""

import copy
from typing import Any

import torch
from torch import nn


class Ema:
    """A second model that trails the first: shadow += (1 − d) · (weight − shadow) a step.

    d is `decay`, or less in the first steps, (1 + t) / (10 + t), so that the shadow forgets the
    random start. Floating-point buffers (running statistics) trail as well; others are copied.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the shadow towards `model` after optimisation step `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        shadow, source = self._tensors(self.model), self._tensors(model)
        floats = [i for i, tensor in enumerate(source) if tensor.is_floating_point()]
        torch._foreach_lerp_([shadow[i] for i in floats], [source[i] for i in floats], 1 - decay)
        for i, tensor in enumerate(source):
            if not tensor.is_floating_point():
                shadow[i].copy_(tensor)

    @staticmethod
    def _tensors(model: nn.Module) -> list[Any]:
        return [*(p.detach() for p in model.parameters()), *model.buffers()]
