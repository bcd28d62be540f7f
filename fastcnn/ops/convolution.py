"""A convolution with what follows it, by the implementation that is the fastest for its shapes.

The vendor's way is torch's convolution and one op for the rest (norm_act.py). The fused way, for
half precision on a GPU and 3x3 filters in fp32 on a CPU, is the library's own convolution: what the
layer before left pending is applied while its input is loaded, the statistics of batch norm and a
max-pool come out of the product, and inference is one kernel. conv_autotune chooses, for each layer
and gradient. Both ways compute the same, up to rounding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastcnn.ops import conv_autotune, conv_composites, norm_act
from fastcnn.ops.conv_autotune import Kind, Plan
from fastcnn.ops.conv_library import POOL, Pads, Pending, result_shape
from fastcnn.ops.loading import product_dtype, ready
from fastcnn.ops.native.library import pending_channels
from fastcnn.ops.reference import product, require_no_residual, require_same_shape
from fastcnn.ops.tracing import parameter_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_ops = torch.ops.fastcnn
conv_composites.register()


def conv_bn_act(
    x: Tensor | Pending,
    filter: Tensor,
    conv_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pre_slope: float = 1.0,
    post_slope: float = 1.0,
    stride: int = 1,
    pads: Pads = (0, 0, 0, 0),
    pool: tuple[int, int, int] | None = None,
    residual: Tensor | None = None,
    defer: bool = False,
    plan: Plan | None = None,
    across: ProcessGroup | None = None,
) -> Tensor | Pending:
    """Return bn_act or, with a pool, bn_act_pool of conv2d(x, filter) + conv_bias.

    x: (N, C, H, W) channels-last, or what the layer before left pending. filter: (K, C, R, S)
    channels-last, x's dtype; under autocast both are taken in autocast's. conv_bias: (K,), of
    filter's dtype or fp32, or None. stride: both ways. pads: pixels of zeros at the top, bottom,
    left and right. pool: window, stride and padding, or None.
    weight, bias, running_mean, running_var, training, momentum, eps, slopes, residual, result and
    errors: as for `bn_act` and `bn_act_pool`; ValueError for a residual with a pool.
    defer: leave normalisation and activation to the next convolution, where gradients may be wanted
    (ValueError with a pool or a residual). plan: who computes what; None: as
    `conv_autotune.plan_for` says.
    across: as for `bn_act`. In training the convolution is then the vendor's, whatever mode and
    measurements say: a product of our own kernel would come with this process's statistics alone.
    ValueError with defer or another plan.
    Saved for the backward by the fused way: x, what is pending of it, filter; the product.
    """
    ready()
    _require_deferrable(defer, pool, residual)
    x, filter = _loadable(x), _loadable(filter)
    geometry, norm = (stride, pads), (running_mean, running_var, training, momentum, eps, pre_slope)
    if training and across is not None:
        _require_vendor(plan, defer)
        y, _ = _convolve(x, filter, conv_bias, geometry, None, conv_autotune.VENDOR)
        rest = (weight, bias, running_mean, running_var, True, momentum, eps, pre_slope, post_slope)
        if pool:
            return norm_act.bn_act_pool(y, *rest, pool, across)
        return norm_act.bn_act(y, *rest, residual, across)
    inference = not training and not torch.is_grad_enabled() and pool in (None, POOL)
    kind = _kind("bn", inference, pool)
    plan = plan or _plan(x, filter, geometry, kind, training, conv_bias is not None)
    if inference and plan.forward == "fused":
        scale = weight * torch.rsqrt(running_var + eps)
        affine = (scale, torch.addcmul(bias, running_mean, scale, value=-1))
        slopes = (pre_slope, post_slope)
        return _inference(x, filter, conv_bias, affine, residual, slopes, geometry, pool)
    y, partials = _convolve(x, filter, conv_bias, geometry, pre_slope if training else None, plan)
    mean, rstd = _statistics(y, partials, *norm)
    left = Pending(y, mean, rstd, weight, bias, training, pre_slope, post_slope)
    if defer and not inference:
        return left
    if pool:
        return _ops.bn_act_pool(*left, *pool)[0]
    if residual is not None:
        require_same_shape(residual, y.shape)
    return _ops.bn_act(*left[:5], residual, *left[5:])


def conv_bias_act(
    x: Tensor | Pending,
    filter: Tensor,
    bias: Tensor | None,
    slope: float = 1.0,
    stride: int = 1,
    pads: Pads = (0, 0, 0, 0),
    pool: tuple[int, int, int] | None = None,
    residual: Tensor | None = None,
    defer: bool = False,
    plan: Plan | None = None,
) -> Tensor | Pending:
    """Return bias_act or, with a pool, bias_act_pool of conv2d(x, filter).

    bias: (K,), fp32 (fp64 where x is), or None. slope, residual, result: as for `bias_act` and
    `bias_act_pool`. The rest and errors: as for `conv_bn_act`.
    Saved for the backward by the fused way: x, what is pending of it, filter; the result, or with a
    pool of 2x2 a byte for each pooled value.
    """
    ready()
    _require_deferrable(defer, pool, residual)
    x, filter = _loadable(x), _loadable(filter)
    geometry, wants_gradients = (stride, pads), torch.is_grad_enabled()
    inference = not wants_gradients and pool in (None, POOL)
    kind = _kind("bias", inference, pool)
    # with nothing else to follow, the product's own kernel adds the bias
    alone = slope == 1 and residual is None and pool is None and not defer
    with_bias = bias is not None and (alone or kind != "bias")
    plan = plan or _plan(x, filter, geometry, kind, wants_gradients, with_bias)
    fused = plan.forward == "fused"
    if fused and inference:
        affine = (None, None)
        return _inference(x, filter, bias, affine, residual, (1.0, slope), geometry, pool)
    if fused and pool == POOL:
        given = (bias, *_pending(x)[1:], slope, *geometry, *_own(plan))
        return _ops.conv_bias_act_pool(_pending(x).x, filter, *given)[0]
    inside = bias if fused and alone else None
    y, _ = _convolve(x, filter, inside, geometry, None, plan)
    if defer and not inference:
        return Pending(y, bias=bias, post_slope=slope)
    if pool:
        return norm_act.bias_act_pool(y, bias, slope, pool)
    return norm_act.bias_act(y, bias if inside is None else None, slope, residual)


def _require_deferrable(
    defer: bool, pool: tuple[int, int, int] | None, residual: Tensor | None
) -> None:
    require_no_residual(residual, pool)
    if defer and (pool or residual is not None):
        raise ValueError("defer: expected neither a pool nor a residual, which need the result")


def _require_vendor(plan: Plan | None, defer: bool) -> None:
    if defer or plan not in (None, conv_autotune.VENDOR):
        raise ValueError(
            "across: expected neither defer nor a fused plan, whose statistics are one process's"
        )


def _loadable(x: Any) -> Any:
    """What a kernel can load: of the dtype that autocast casts to for torch's convolution, and with
    nothing pending on more channels than it has room for."""
    if not isinstance(x, Pending):
        return x.to(product_dtype(x))
    return x.applied() if x.shape[1] > pending_channels() else x


def _pending(x: Tensor | Pending) -> Pending:
    return x if isinstance(x, Pending) else Pending(x)


def _kind(product_kind: Kind, inference: bool, pool: tuple[int, int, int] | None) -> Kind:
    if inference:
        return "inference-pool" if pool else "inference"
    return "bias-pool" if product_kind == "bias" and pool == POOL else product_kind


def _plan(
    x: Tensor | Pending,
    filter: Tensor,
    geometry: tuple[int, Pads],
    kind: Kind,
    training: bool,
    with_bias: bool,
) -> Plan:
    pending = _pending(x)
    is_pending = not pending.is_plain
    wants_data_gradient = is_pending or pending.x.requires_grad
    return conv_autotune.plan_for(
        pending.x, filter, *geometry, kind, is_pending, training, wants_data_gradient, with_bias
    )


def _own(plan: Plan) -> tuple[bool, bool]:
    return plan.data_gradient == "fused", plan.weight_gradient == "fused"


def _convolve(
    x: Tensor | Pending,
    filter: Tensor,
    bias: Tensor | None,
    geometry: tuple[int, Pads],
    stats_slope: float | None,
    plan: Plan,
) -> tuple[Tensor, Tensor | None]:
    """The product, and its partial statistics where its kernel has them."""
    pending = _pending(x)
    if plan.forward == "vendor":
        # in the filter's dtype, as torch wants it
        inside = None if bias is None else bias.to(filter.dtype)
        return product(pending.applied(), filter, inside, *geometry), None
    given = (_wide(bias, filter), *pending[1:], *geometry, stats_slope, *_own(plan))
    y, partials = _ops.conv(pending.x, filter, *given)
    return y, None if stats_slope is None else partials


def _wide(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """The bias as the library's kernels want it: one before a norm is in half precision."""
    return None if bias is None else bias.to(parameter_dtype(x))


def _statistics(
    y: Tensor,
    partials: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float,
    eps: float,
    pre_slope: float,
) -> tuple[Tensor, Tensor]:
    if training:
        norm_act.require_more_than_one(y)
    if partials is None:
        rest = (training, momentum, eps, pre_slope)
        return _ops.bn_stats(y.detach(), running_mean, running_var, *rest)
    count = y.shape[0] * y.shape[2] * y.shape[3]
    return _ops.bn_stats_merge(partials, count, running_mean, running_var, momentum, eps)


def _inference(
    x: Tensor | Pending,
    filter: Tensor,
    bias: Tensor | None,
    affine: tuple[Tensor | None, Tensor | None],
    residual: Tensor | None,
    slopes: tuple[float, float],
    geometry: tuple[int, Pads],
    pool: tuple[int, int, int] | None,
) -> Tensor:
    applied = _pending(x).applied()
    if residual is not None:
        require_same_shape(residual, result_shape(applied, filter, *geometry))
    given = (_wide(bias, filter), *affine, residual, *slopes, *geometry, pool is not None)
    return _ops.conv_affine_act(applied, filter, *given)
