"""What follows a convolution or a linear layer, each in one fused kernel: normalisation or bias,
residual, activation, max-pool.

Below, one block an op of the library: schema, shapes for tracing, gradient. csrc/bindings.cpp
registers the kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcnn.ops import norm_across, tracing
from fastcnn.ops.loading import define, ready, schemas
from fastcnn.ops.reference import require_same_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ops = torch.ops.fastcnn


def require_more_than_one(x: Tensor) -> None:
    # the text of torch.nn.functional.batch_norm
    if x.dim() > 1 and x.numel() == x.shape[1] > 0:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {x.size()}"
        )


# bn_stats: mean and rstd = 1 / sqrt(var + eps) of pre(x) a channel; training: those of the batch,
# and the running ones move towards them by momentum; else those of the running ones

define(
    "bn_stats",
    "(Tensor x, Tensor(a!) running_mean, Tensor(b!) running_var, bool training, float momentum, "
    "float eps, float pre_slope) -> (Tensor mean, Tensor rstd)",
)


@torch.library.register_fake("fastcnn::bn_stats", lib=schemas)
def _(x, running_mean, running_var, training, momentum, eps, pre_slope):  # type: ignore
    return tracing.per_channel(x), tracing.per_channel(x)


# bn_act: post((pre(x) - mean) · rstd · weight + bias + residual). batch_stats: mean and rstd are
# those of this very x, and the gradient counts what it does through them

define(
    "bn_act",
    "(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, Tensor? residual, "
    "bool batch_stats, float pre_slope, float post_slope) -> Tensor",
)
define(
    "bn_act_backward",
    "(Tensor dy, Tensor x, Tensor? y, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, "
    "bool batch_stats, float pre_slope, float post_slope) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias, Tensor dresidual)",
)


@torch.library.register_fake("fastcnn::bn_act", lib=schemas)
def _(x, mean, rstd, weight, bias, residual, batch_stats, pre_slope, post_slope):  # type: ignore
    return tracing.like(x)


@torch.library.register_fake("fastcnn::bn_act_backward", lib=schemas)
def _(dy, x, y, mean, rstd, weight, bias, batch_stats, pre_slope, post_slope):  # type: ignore
    dresidual = x.new_empty(0) if y is None else tracing.like(x)
    return tracing.like(x), tracing.per_channel(x), tracing.per_channel(x), dresidual


def _bn_act_save(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, mean, rstd, weight, bias, residual, *ctx.rest = inputs
    # with a residual the mask comes from y, which the next layer keeps anyway
    ctx.save_for_backward(x, output if residual is not None else None, mean, rstd, weight, bias)


def _bn_act_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias, dresidual = _ops.bn_act_backward(
        tracing.incoming(dy), *ctx.saved_tensors, *ctx.rest
    )
    with_residual = ctx.saved_tensors[1] is not None
    return dx, None, None, dweight, dbias, dresidual if with_residual else None, None, None, None


torch.library.register_autograd(
    "fastcnn::bn_act", _bn_act_gradient, setup_context=_bn_act_save, lib=schemas
)


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pre_slope: float = 1.0,
    post_slope: float = 1.0,
    residual: Tensor | None = None,
    across: ProcessGroup | None = None,
) -> Tensor:
    """Return post((pre(x) - mean) / sqrt(var + eps) * weight + bias + residual).

    x, residual, result: (N, K, P, Q) channels-last, or (N, K); one dtype.
    weight, bias, running_mean, running_var: (K,), fp32 (fp64 where x is).
    training: mean and biased variance of pre(x) over all but K; the running statistics move by
    `momentum` towards them (the variance unbiased), in place. Else the running statistics.
    Slopes are >= 0. Saved for the backward: x, mean, rstd, and y where there is a residual.
    across: a process group of torch.distributed. In training mean and variance are then those of
    pre(x) on all its processes, each of which must call this, with any number of images; so are
    what the running statistics move to and the gradient of x. The gradients of weight and bias are
    sums over this process's images.

    Raises ValueError for one value a channel in training (of all processes, where that can be seen:
    `reference_across.require_more_than_one_of_all`) and for a residual of another shape,
    RuntimeError for another layout, dtype, device or length, BuildError without a library.
    Ioffe and Szegedy 2015, algorithm 1; He et al. 2016, figure 2.
    """
    ready()
    if training and across is None:
        require_more_than_one(x)
    if residual is not None:
        require_same_shape(residual, x.shape)
    if training and across is not None:
        norm = (weight, bias, running_mean, running_var, momentum, eps)
        return norm_across.bn_act(x, *norm, pre_slope, post_slope, residual, across)
    mean, rstd = _ops.bn_stats(
        x.detach(), running_mean, running_var, training, momentum, eps, pre_slope
    )
    return _ops.bn_act(x, mean, rstd, weight, bias, residual, training, pre_slope, post_slope)


# bn_act_pool: max-pool(bn_act(x)); code: one byte for each pooled value (csrc/arguments.h)

define(
    "bn_act_pool",
    "(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, bool batch_stats, "
    "float pre_slope, float post_slope, int window, int stride, int padding) "
    "-> (Tensor y, Tensor code)",
)
define(
    "bn_act_pool_backward",
    "(Tensor dy, Tensor code, Tensor x, Tensor mean, Tensor rstd, Tensor weight, "
    "bool batch_stats, float pre_slope, float post_slope, int window, int stride, int padding) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
)


@torch.library.register_fake("fastcnn::bn_act_pool", lib=schemas)
def _(x, mean, rstd, weight, bias, batch_stats, pre_slope, post_slope, *pool):  # type: ignore
    return tracing.pooled(x, x.shape, pool)


@torch.library.register_fake("fastcnn::bn_act_pool_backward", lib=schemas)
def _(dy, code, x, mean, rstd, weight, batch_stats, pre_slope, post_slope, *pool):  # type: ignore
    return tracing.like(x), tracing.per_channel(x), tracing.per_channel(x)


def _bn_act_pool_save(ctx: Any, inputs: Any, output: Any) -> None:
    x, mean, rstd, weight, _, *ctx.rest = inputs
    tracing.no_gradient_of_code(ctx, output[1])
    ctx.save_for_backward(output[1], x, mean, rstd, weight)


def _bn_act_pool_gradient(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    dx, dweight, dbias = _ops.bn_act_pool_backward(
        tracing.incoming(dy), *ctx.saved_tensors, *ctx.rest
    )
    return dx, None, None, dweight, dbias, *[None] * 6


torch.library.register_autograd(
    "fastcnn::bn_act_pool", _bn_act_pool_gradient, setup_context=_bn_act_pool_save, lib=schemas
)


def bn_act_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pre_slope: float = 1.0,
    post_slope: float = 1.0,
    pool: tuple[int, int, int] = (2, 2, 0),
    across: ProcessGroup | None = None,
) -> Tensor:
    """Return max-pool(bn_act(x, ...)).

    x: (N, K, P, Q) channels-last; parameters, statistics, across and errors as for `bn_act`.
    pool: window (at most 11), stride and padding in pixels; sizes floor:
    (P + 2 padding - window) // stride + 1.
    result: (N, K, P', Q') channels-last, x's dtype. The winner of a window is chosen before
    rounding to x's dtype; of equal values the first, and a NaN over all (as torch).
    Saved for the backward: x, mean, rstd and a byte for each pooled value.

    Raises RuntimeError, as torch does, for a window larger than the padded image.
    """
    ready()
    if training and across is not None:
        norm = (weight, bias, running_mean, running_var, momentum, eps)
        return norm_across.bn_act_pool(x, *norm, pre_slope, post_slope, pool, across)
    if training:
        require_more_than_one(x)
    mean, rstd = _ops.bn_stats(
        x.detach(), running_mean, running_var, training, momentum, eps, pre_slope
    )
    y, _ = _ops.bn_act_pool(x, mean, rstd, weight, bias, training, pre_slope, post_slope, *pool)
    return y


# bias_act: act(x + bias + residual). The mask comes from y, so that x need not be kept

define("bias_act", "(Tensor x, Tensor? bias, Tensor? residual, float slope) -> Tensor")
define(
    "bias_act_backward",
    "(Tensor dy, Tensor y, bool with_bias, float slope) -> (Tensor dx, Tensor dbias)",
)


@torch.library.register_fake("fastcnn::bias_act", lib=schemas)
def _(x, bias, residual, slope):  # type: ignore
    return tracing.like(x)


@torch.library.register_fake("fastcnn::bias_act_backward", lib=schemas)
def _(dy, y, with_bias, slope):  # type: ignore
    return tracing.like(y), tracing.per_channel(y) if with_bias else tracing.per_channel(
        y
    ).new_empty(0)


def _bias_act_save(ctx: Any, inputs: Any, output: Tensor) -> None:
    _, bias, residual, ctx.slope = inputs
    ctx.with_bias, ctx.with_residual = bias is not None, residual is not None
    ctx.save_for_backward(output)


def _bias_act_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, dbias = _ops.bias_act_backward(
        tracing.incoming(dy), ctx.saved_tensors[0], ctx.with_bias, ctx.slope
    )
    return dx, dbias if ctx.with_bias else None, dx if ctx.with_residual else None, None


torch.library.register_autograd(
    "fastcnn::bias_act", _bias_act_gradient, setup_context=_bias_act_save, lib=schemas
)


def bias_act(
    x: Tensor, bias: Tensor | None, slope: float = 1.0, residual: Tensor | None = None
) -> Tensor:
    """Return act(x + bias + residual); no bias: a linear layer has added its own.

    With nothing to do (no bias, no residual, slope 1) the result is x itself, as in `reference`.
    x, residual, result: (N, K, P, Q) channels-last, or (N, K); one dtype. bias: (K,), fp32 (fp64
    where x is). slope >= 0. Saved for the backward: the result alone.
    Raises ValueError for a residual of another shape, RuntimeError for a bias of another length and
    for another layout, dtype or device, BuildError without a library.
    """
    ready()
    if residual is not None:
        require_same_shape(residual, x.shape)
    if bias is None and residual is None and slope == 1:
        return x
    return _ops.bias_act(x, bias, residual, slope)


# bias_act_pool: max-pool(bias_act(x)); the backward needs the codes and the size of x, not x

define(
    "bias_act_pool",
    "(Tensor x, Tensor? bias, float slope, int window, int stride, int padding) "
    "-> (Tensor y, Tensor code)",
)
define(
    "bias_act_pool_backward",
    "(Tensor dy, Tensor code, SymInt p, SymInt q, bool with_bias, float slope, int window, "
    "int stride, int padding) -> (Tensor dx, Tensor dbias)",
)


@torch.library.register_fake("fastcnn::bias_act_pool", lib=schemas)
def _(x, bias, slope, *pool):  # type: ignore
    return tracing.pooled(x, x.shape, pool)


@torch.library.register_fake("fastcnn::bias_act_pool_backward", lib=schemas)
def _(dy, code, p, q, with_bias, slope, *pool):  # type: ignore
    dbias = tracing.per_channel(dy) if with_bias else tracing.per_channel(dy).new_empty(0)
    return tracing.image(dy, (*dy.shape[:2], p, q), dy.dtype), dbias


def _bias_act_pool_save(ctx: Any, inputs: Any, output: Any) -> None:
    x, bias, ctx.slope, *ctx.pool = inputs
    ctx.size, ctx.with_bias = x.shape[2:], bias is not None
    tracing.no_gradient_of_code(ctx, output[1])
    ctx.save_for_backward(output[1])


def _bias_act_pool_gradient(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 6
    dx, dbias = _ops.bias_act_pool_backward(
        tracing.incoming(dy), ctx.saved_tensors[0], *ctx.size, ctx.with_bias, ctx.slope, *ctx.pool
    )
    return dx, dbias if ctx.with_bias else None, *[None] * 4


torch.library.register_autograd(
    "fastcnn::bias_act_pool",
    _bias_act_pool_gradient,
    setup_context=_bias_act_pool_save,
    lib=schemas,
)


def bias_act_pool(
    x: Tensor, bias: Tensor | None, slope: float = 1.0, pool: tuple[int, int, int] = (2, 2, 0)
) -> Tensor:
    """Return max-pool(bias_act(x, bias, slope)).

    x: (N, K, P, Q) channels-last. bias: (K,), fp32 (fp64 where x is), or None. slope >= 0.
    pool: as for `bn_act_pool`. result: (N, K, P', Q') channels-last, x's dtype.
    Saved for the backward: a byte for each pooled value, and not x.
    Raises RuntimeError for a bias of another length, a window larger than the padded image, another
    layout, dtype or device, BuildError without a library.
    """
    ready()
    y, _ = _ops.bias_act_pool(x, bias, slope, *pool)
    return y
