"""Batch norm with the statistics of all processes of a group, in plain torch; for reference.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def batch_norm_across(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor,
    bias: Tensor,
    momentum: float,
    eps: float,
    across: ProcessGroup,
) -> Tensor:
    """Return torch.nn.functional.batch_norm, in training, of the x of all processes together.

    The result and the gradient of x are this process's part of it; those of weight and bias are the
    sums over its own images. Computed in fp32 (fp64 where x is), then rounded to x's dtype.
    Raises ValueError for one value a channel, see `require_more_than_one_of_all`.
    """
    values = x.to(weight.dtype)
    pixels = [dim for dim in range(x.dim()) if dim != 1]
    shape = (-1, *[1] * (x.dim() - 2))
    count = values.new_full((1,), x.numel() // max(x.shape[1], 1))
    sums = _SumOverProcesses.apply(torch.cat([values.sum(pixels), count]), across)
    total = sums[-1].detach()
    require_more_than_one_of_all(x, total, across)
    divisor = total.clamp(min=1)
    mean = sums[:-1] / divisor
    deviations = values - mean.view(shape)
    squares = _SumOverProcesses.apply(deviations.square().sum(pixels), across)
    with torch.no_grad():
        for running, now in ((running_mean, mean), (running_var, squares / (total - 1))):
            moved = running + momentum * (now - running)
            running.copy_(torch.where(total > 0, moved, running))
    scale = weight * torch.rsqrt(squares / divisor + eps)
    return (deviations * scale.view(shape) + bias.view(shape)).to(x.dtype)


def require_more_than_one_of_all(x: Tensor, total: Tensor, across: ProcessGroup) -> None:
    """Raise ValueError for one value a channel in all processes together, on each of them.

    total: values a channel. On a GPU it is not looked at, since the host would have to wait for it,
    nor by torch.compile: there one value is seen in a group of one process alone. In a larger one,
    whose other processes are without images, the running variance becomes NaN on a GPU.
    """
    alone = across.size() == 1 and x.numel() == x.shape[1] > 0
    readable = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if alone or (readable and bool((total == 1).any())):
        raise ValueError(
            "Expected more than 1 value per channel when training, over all processes, "
            f"got input size {x.size()} on this one"
        )


class _SumOverProcesses(torch.autograd.Function):
    """Σ of a tensor over processes. What is done with the sum on each of them counts in its
    gradient, which so is a sum as well."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, across: ProcessGroup) -> Tensor:
        ctx.across = across
        return _summed(part, across)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.across), None


def _summed(part: Tensor, across: ProcessGroup) -> Tensor:
    """Gathered and then added in the order of the ranks: an all_reduce in the place of what such a
    function returns loses its gradient under torch.compile (torch 2.11)."""
    import torch.distributed as dist

    parts = part.new_empty(across.size() * len(part))
    dist.all_gather_into_tensor(parts, part.contiguous(), group=across)
    return parts.view(across.size(), len(part)).sum(0)
