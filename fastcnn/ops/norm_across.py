"""Batch norm with the statistics of all processes of a group: what norm_act.py does, in parts
between which the processes exchange what they have found.

Forward, one gather: count, mean and squared deviations of each channel from every process, merged
by the kernel that merges a convolution's partial statistics, in the order of the ranks, so that
every process has the same bits. Backward, one sum: of dweight and dbias, between the pass that
reduces and the one that applies. Processes may have different numbers of images, also none. Counts
stay on the device and nothing waits for it, so that both can be captured in a CUDA graph (NCCL).
torch.nn.SyncBatchNorm computes the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcnn.ops import tracing
from fastcnn.ops.loading import define, schemas
from fastcnn.ops.reference.norm_across import require_more_than_one_of_all

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ops = torch.ops.fastcnn


# bn_act_backward with batch statistics in two parts. sums: dweight and dbias; apply: the rest from
# dweight and dbias, which it divides by the number of values that x has a channel

define(
    "bn_act_backward_sums",
    "(Tensor dy, Tensor x, Tensor? y, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "
    "float pre_slope, float post_slope) -> (Tensor dweight, Tensor dbias)",
)
define(
    "bn_act_backward_apply",
    "(Tensor dy, Tensor x, Tensor? y, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "
    "Tensor dweight, Tensor dbias, float pre_slope, float post_slope) "
    "-> (Tensor dx, Tensor dresidual)",
)


@torch.library.register_fake("fastcnn::bn_act_backward_sums", lib=schemas)
def _(dy, x, y, mean, rstd, weight, bias, pre_slope, post_slope):  # type: ignore
    return tracing.per_channel(x), tracing.per_channel(x)


@torch.library.register_fake("fastcnn::bn_act_backward_apply", lib=schemas)
def _(dy, x, y, mean, rstd, weight, bias, dweight, dbias, pre_slope, post_slope):  # type: ignore
    return tracing.like(x), x.new_empty(0) if y is None else tracing.like(x)


# the same of bn_act_pool_backward

define(
    "bn_act_pool_backward_sums",
    "(Tensor dy, Tensor code, Tensor x, Tensor mean, Tensor rstd, Tensor weight, float pre_slope, "
    "float post_slope, int window, int stride, int padding) -> (Tensor dweight, Tensor dbias)",
)
define(
    "bn_act_pool_backward_apply",
    "(Tensor dy, Tensor code, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor dweight, "
    "Tensor dbias, float pre_slope, float post_slope, int window, int stride, int padding) "
    "-> Tensor",
)


@torch.library.register_fake("fastcnn::bn_act_pool_backward_sums", lib=schemas)
def _(dy, code, x, mean, rstd, weight, pre_slope, post_slope, *pool):  # type: ignore
    return tracing.per_channel(x), tracing.per_channel(x)


@torch.library.register_fake("fastcnn::bn_act_pool_backward_apply", lib=schemas)
def _(dy, code, x, mean, rstd, weight, dweight, dbias, pre_slope, post_slope, *pool):  # type: ignore
    return tracing.like(x)


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    pre_slope: float,
    post_slope: float,
    residual: Tensor | None,
    across: ProcessGroup,
) -> Tensor:
    """Return `norm_act.bn_act` in training."""
    running = (running_mean, running_var, momentum, eps, pre_slope)
    mean, rstd, share = _statistics(x, *running, across)
    norm = (mean, rstd, weight, bias, share, across)
    return _BnAct.apply(x, residual, *norm, pre_slope, post_slope)


def bn_act_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    pre_slope: float,
    post_slope: float,
    pool: tuple[int, int, int],
    across: ProcessGroup,
) -> Tensor:
    """Return `norm_act.bn_act_pool` in training."""
    running = (running_mean, running_var, momentum, eps, pre_slope)
    mean, rstd, share = _statistics(x, *running, across)
    norm = (mean, rstd, weight, bias, share, across)
    return _BnActPool.apply(x, *norm, pre_slope, post_slope, *pool)


def _statistics(
    x: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    pre_slope: float,
    across: ProcessGroup,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and rstd of pre(x) over all processes, and this one's share of all values.

    Each (K,), fp32 (fp64 where x is). The running statistics move, as in `bn_act`.
    Raises ValueError for one value a channel, see `require_more_than_one_of_all`.
    """
    import torch.distributed as dist

    values = x.numel() // max(x.shape[1], 1)
    own = x.new_zeros((3, x.shape[1]), dtype=tracing.parameter_dtype(x))
    mean, squares, count = own
    # as running statistics with momentum 1: the mean, and the variance times n / (n - 1)
    _ops.bn_stats(x.detach(), mean, squares, True, 1.0, eps, pre_slope)
    # one value: 0 / 0 until here
    squares.mul_(values - 1) if values > 1 else squares.zero_()
    count.fill_(values)
    found = own.new_empty((across.size() * 3, x.shape[1]))
    dist.all_gather_into_tensor(found, own, group=across)
    total = found[2::3].sum(0)
    require_more_than_one_of_all(x, total, across)
    partials = found.unflatten(0, (-1, 3)).transpose(0, 1).contiguous()
    merged = _ops.bn_stats_merge(partials, None, running_mean, running_var, momentum, eps)
    return *merged, count / total


class _BnAct(torch.autograd.Function):
    """The op bn_act with `_statistics`. All gradients but that of x are this process's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, *rest: Any) -> Tensor:
        """rest: mean, rstd, weight, bias; share, across; pre_slope, post_slope."""
        norm, (share, ctx.across), ctx.slopes = rest[:4], rest[4:6], rest[6:]
        y = _ops.bn_act(x, *norm, residual, True, *ctx.slopes)
        # as without a group: the mask comes from y where there is a residual
        ctx.save_for_backward(share, x, None if residual is None else y, *norm)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        share, *saved = ctx.saved_tensors
        given = (tracing.incoming(dy), *saved)
        dweight, dbias = _ops.bn_act_backward_sums(*given, *ctx.slopes)
        of_all = _of_all(dweight, dbias, share, ctx.across)
        dx, dresidual = _ops.bn_act_backward_apply(*given, *of_all, *ctx.slopes)
        with_residual = saved[1] is not None
        return dx, dresidual if with_residual else None, None, None, dweight, dbias, *[None] * 4


class _BnActPool(torch.autograd.Function):
    """The op bn_act_pool likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        """rest: mean, rstd, weight, bias; share, across; pre_slope, post_slope; pool."""
        norm, (share, ctx.across), ctx.settings = rest[:4], rest[4:6], rest[6:]
        y, code = _ops.bn_act_pool(x, *norm, True, *ctx.settings)
        ctx.save_for_backward(share, code, x, *norm[:3])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        share, *saved = ctx.saved_tensors
        given = (tracing.incoming(dy), *saved)
        dweight, dbias = _ops.bn_act_pool_backward_sums(*given, *ctx.settings)
        of_all = _of_all(dweight, dbias, share, ctx.across)
        dx = _ops.bn_act_pool_backward_apply(*given, *of_all, *ctx.settings)
        return dx, None, None, dweight, dbias, *[None] * 7


def _of_all(
    dweight: Tensor, dbias: Tensor, share: Tensor, across: ProcessGroup
) -> tuple[Tensor, ...]:
    """The sums of all processes, times this one's share of the values: what then is divided by
    its own number of values has been divided by that of all."""
    import torch.distributed as dist

    sums = torch.stack([dweight, dbias])
    dist.all_reduce(sums, group=across)
    return (sums * share).unbind()
