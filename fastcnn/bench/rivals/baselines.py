"""The rivals: training steps and networks as a careful user of plain PyTorch writes them.

Nothing here is shared with fastcnn's own step. Channels-last; in training torch.autocast (a
GradScaler for fp16), images resident as uint8, the draws of an epoch made at its start, crop, flip
and normalisation by tensor ops, torch's fused SGD, loss and hits summed on the device; in inference
weights that are rounded beforehand.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PADDING = 4
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """What every variant does: SGD with Nesterov momentum at a constant rate, weight decay on
    weights alone, label smoothing, reflected crop and random flip."""

    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    label_smoothing: float = 0.1


class ResidentImages:
    """Batches of uint8 images (N, H, W, 3) on the device, in a new order every epoch; the last,
    smaller batch is left out."""

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        mean: Tensor,
        std: Tensor,
        batch: int,
        dtype: torch.dtype,
        augment: bool,
    ):
        self.pixels, self.labels = pixels, labels
        self.scale, self.bias = 1 / (255 * std), -mean / std
        self.batch, self.dtype, self.augment = batch, dtype, augment
        self.side = torch.arange(pixels.shape[1], device=pixels.device)

    def __iter__(self) -> Iterator[Batch]:
        """Yield x (batch, 3, H, W) channels-last and y int64 (batch,), without end."""
        count, device = len(self.labels), self.labels.device
        whole = count // self.batch * self.batch
        while True:
            if not self.augment:
                order = torch.arange(count, device=device)
            else:
                order = torch.randperm(count, device=device)
                offsets = torch.randint(-PADDING, PADDING + 1, (2, count, 1), device=device)
                flips = torch.rand(count, 1, device=device) < 0.5
            for at in range(0, whole, self.batch):
                chosen = order[at : at + self.batch]
                if self.augment:
                    part = slice(at, at + self.batch)
                    x = self._cropped(chosen, offsets[:, part], flips[part])
                else:
                    x = self.pixels[chosen]
                yield self._normalised(x), self.labels[chosen]

    def _cropped(self, chosen: Tensor, offsets: Tensor, flips: Tensor) -> Tensor:
        last = len(self.side) - 1
        rows, columns = self.side + offsets[0], self.side + offsets[1]
        columns = torch.where(flips, columns.flip(1), columns)
        rows, columns = (last - (last - i.abs()).abs() for i in (rows, columns))  # reflected
        return self.pixels[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _normalised(self, pixels: Tensor) -> Tensor:
        x = pixels.float().mul_(self.scale).add_(self.bias)
        return x.to(self.dtype).permute(0, 3, 1, 2)


def compiled(function: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """torch.compile for one shape; mode: its name, or "default"."""
    options: dict[str, Any] = {} if mode == "default" else {"mode": mode}
    return torch.compile(function, fullgraph=True, dynamic=False, **options)


class RivalStep:
    """Forward, loss, backward and update on one batch; `sums`: loss, top-1, top-5, images.

    half: the dtype of autocast, None for fp32; mode: of torch.compile, None for eager.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, half: torch.dtype | None, mode: str | None
    ):
        self.model, self.recipe = model, recipe
        self.device = next(model.parameters()).device
        weights = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        groups: list[dict[str, Any]] = [
            {"params": others, "weight_decay": 0.0},
            {"params": weights},
        ]
        self.optimizer = torch.optim.SGD(
            groups,
            recipe.lr,
            recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=True,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half is torch.float16)
        self.half = half
        self.forward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = self._forward
        if mode is not None:
            self.forward = compiled(self._forward, mode)
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
            loss, figures = self.forward(images, labels)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.sums += figures

    def _forward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        with torch.no_grad():
            count = len(labels)
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            rows = (loss * count, best[:, 0].sum(), best.sum(), torch.full_like(loss, count))
            return loss, torch.stack(rows)


def cast_products(model: nn.Module, half: torch.dtype | None) -> nn.Module:
    """Round the weights of convolutions and linear layers, once and in place; None: not at all.

    Norms stay fp32, which costs no time beside activations in half precision and errs less.
    """
    for module in model.modules():
        if half and isinstance(module, nn.Conv2d | nn.Linear):
            module.to(half)
    return model
