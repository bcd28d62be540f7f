"""Grad-CAM: which parts of an image speak for a class (Selvaraju et al. 2017).

    map = ReLU(Σ_k a_k · A_k),  a_k = mean over the pixels of ∂ logit / ∂ A_k

A_k are the channels of a layer's output: that of the named operation of the network's table
(convolution, norm, activation or pool), or of a whole layer, which is its last operation's.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcnn.archs.elementary import Elementary
from fastcnn.archs.spec import LayerRow
from fastcnn.errors import UsageError, nearest


def find_operations(rows: Sequence[LayerRow], name: str, option: str) -> list[LayerRow]:
    """The operation of this name ("ReLU-9"), or those of the layer of this name ("conv3").

    rows: the network's table. option: the flag that an error names. Raises UsageError for a name
    that the network does not have, with the nearest one.
    """
    found = [row for row in rows if name.lower() in (row.name.lower(), row.layer.lower())]
    if not found:
        valid = dict.fromkeys([*(row.layer for row in rows), *(row.name for row in rows)])
        hint = nearest(name, valid) or f"; one of {', '.join(valid)}"
        raise UsageError(f"{option}: the network has no layer '{name}'{hint}")
    return found


def choose_operation(rows: Sequence[LayerRow], name: str | None) -> str:
    """The operation whose output Grad-CAM weighs: that of this name, the last one of a layer of
    this name, or, for None, the last one with more than one pixel.

    Raises UsageError for an unknown name, and where the output has no pixels, or a single one,
    which leaves no parts to tell apart.
    """
    spatial = [row for row in rows if _pixels(row) > 1]
    if not spatial:
        raise UsageError("Grad-CAM: no layer of this network has an output with pixels")
    if name is None:
        return spatial[-1].name
    row = find_operations(rows, name, "--layer")[-1]
    if _pixels(row) < 2:
        what = "a single pixel" if _pixels(row) else "no pixels"
        raise UsageError(
            f"--layer {name}: the output of {row.name} has {what}; the last layer that Grad-CAM "
            f"can show is {spatial[-1].name}"
        )
    return row.name


def _pixels(row: LayerRow) -> int:
    return row.output_shape[1] * row.output_shape[2] if len(row.output_shape) == 3 else 0


@torch.enable_grad()
def gradcam(network: Elementary, images: Tensor, operation: str, classes: Tensor) -> Tensor:
    """Return the maps (N, P, Q), 0 or more, of the output of `operation`.

    images: (N, 3, H, W), normalised. classes: int64 (N,), the class that each map speaks for.
    """
    seen: list[Tensor] = []

    def begin_here(module: Any, inputs: Any, output: Tensor) -> Tensor:
        # gradients are wanted from here on, and of nothing before
        seen.append(output.detach().requires_grad_())
        return seen[0]

    hook = network.get_submodule(operation).register_forward_hook(begin_here)
    try:
        logits = network(images)
    finally:
        hook.remove()
    (gradients,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), seen)
    weights = gradients.mean((2, 3), keepdim=True)
    return (weights * seen[0]).sum(1).relu().detach()


def enlarged(maps: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return maps (N, P, Q) as large as the images (N, H, W), by bilinear interpolation."""
    return F.interpolate(maps[:, None], sides, mode="bilinear", align_corners=False)[:, 0]
