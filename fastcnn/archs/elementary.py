"""A network for looking into: every operation of its layers a plain torch module with its own name.

A layer of `layers.py` is one call, so that no hook sees what lies between its convolution and its
pool. Here each elementary operation is a submodule, named as in the table of `fastcnn archs`.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastcnn.archs.layers import ConvNormAct, GlobalAvgPool, LinearNormAct, ResidualBlock
from fastcnn.ops.reference import split_pads

IMAGES = "images"


class Add(nn.Module):
    """The sum that a shortcut ends in."""

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        return x + shortcut


class Elementary(nn.Module):
    """`model`, as `build` makes it, operation by operation: Conv2d-1, BatchNorm2d-2, ReLU-3, …

    In evaluation mode, with copies of the weights as they are (no norm is folded) that want no
    gradients. Input (N, 3, H, W), fp32; output: logits (N, classes). `steps`: each operation with
    the names of those whose outputs it takes, in forward order; the images are IMAGES.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.steps: list[tuple[str, tuple[str, ...]]] = []
        last = IMAGES
        for layer in model.children():
            last = self._add_layer(layer, last)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self._values(images)[self.steps[-1][0]]

    @torch.no_grad()
    def outputs(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The outputs of the named operations for images (N, 3, H, W)."""
        values = self._values(images)
        return {name: values[name] for name in names}

    def _values(self, images: Tensor) -> dict[str, Tensor]:
        values = {IMAGES: images}
        for name, sources in self.steps:
            values[name] = self.get_submodule(name)(*[values[source] for source in sources])
        return values

    def _append(self, kind: str, module: nn.Module, *sources: str) -> str:
        name = f"{kind}-{len(self.steps) + 1}"
        self.add_module(name, module)
        self.steps.append((name, sources))
        return name

    def _add_layer(self, layer: nn.Module, source: str) -> str:
        match layer:
            case ConvNormAct():
                return self._add_conv(layer, source)
            case ResidualBlock():
                shortcut = source
                if layer.projection is not None:
                    shortcut = self._add_conv(layer.projection, source)
                inner = self._add_conv(layer.conv1, source)
                return self._add_conv(layer.conv2, inner, shortcut)
            case LinearNormAct():
                product = self._append("Linear", copy.deepcopy(layer.linear), source)
                last = self._add_norm_act(layer, product, "BatchNorm1d")
                if not layer.dropout:
                    return last
                return self._append("Dropout", nn.Dropout(layer.dropout), last)
            case GlobalAvgPool():
                return self._append("GlobalAvgPool", GlobalAvgPool(), source)
            case nn.Flatten():
                return self._append("Flatten", nn.Flatten(1), source)
        raise TypeError(f"no layer of a network: {type(layer).__name__}")

    def _add_conv(self, layer: ConvNormAct, source: str, shortcut: str | None = None) -> str:
        product: nn.Module = copy.deepcopy(layer.conv)
        # the convolution itself pads the same on both sides alone; an even kernel wants more
        _, extra = split_pads(layer.pads)
        if any(extra):
            product = nn.Sequential(nn.ZeroPad2d(extra), product)
        last = self._append("Conv2d", product, source)
        last = self._add_norm_act(layer, last, "BatchNorm2d", shortcut)
        if layer.pool is None:
            return last
        size, stride, padding = layer.pool
        return self._append("MaxPool2d", nn.MaxPool2d(size, stride, padding), last)

    def _add_norm_act(
        self,
        layer: ConvNormAct | LinearNormAct,
        last: str,
        norm: str,
        shortcut: str | None = None,
    ) -> str:
        last = self._add_activation(layer.pre_slope, last)
        if layer.norm is not None:
            last = self._append(norm, copy.deepcopy(layer.norm), last)
        if shortcut is not None:
            last = self._append("Add", Add(), last, shortcut)
        return self._add_activation(layer.post_slope, last)

    def _add_activation(self, slope: float, source: str) -> str:
        if slope == 1:
            return source
        if slope == 0:
            return self._append("ReLU", nn.ReLU(), source)
        return self._append("LeakyReLU", nn.LeakyReLU(slope), source)
