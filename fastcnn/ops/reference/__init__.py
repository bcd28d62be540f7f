"""Every op of fastcnn in plain torch: the oracle that faster versions are judged against.

Here the layers; `augment`, which makes a batch of images, and what it is made of is in
reference_augment.py, the optimisers' updates are in reference_update.py.

An op is a convolution with what follows it, or what follows a convolution or a linear layer:
[activation] → normalisation (or bias) → [+ residual] → [activation] → [max-pool]. An activation is
its negative slope: 1 none, 0 ReLU, 0.01 leaky ReLU. Gradients come from autograd.

Sizes: N images, K channels, P x Q pixels, and C channels of H x W pixels before a convolution with
K filters of R x S. Images are (N, K, P, Q) tensors in channels-last memory (NHWC); plain torch
keeps whatever layout comes in and copies nothing. Activations are bf16, fp16, fp32 or fp64;
parameters and statistics are fp32 (fp64 where the activations are). Everything works under
autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional as F

from fastcnn.ops.reference.augmentation import augment
from fastcnn.ops.reference.norm_across import batch_norm_across
from fastcnn.ops.reference.optimizers import adam_, find_nonfinite_, sgd_

__all__ = [
    "adam_",
    "augment",
    "bias_act",
    "bias_act_pool",
    "bn_act",
    "bn_act_pool",
    "conv_bias_act",
    "conv_bn_act",
    "find_nonfinite_",
    "sgd_",
]

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Pads = tuple[int, int, int, int]


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
    across: a process group of torch.distributed. In training mean and variance are then those of
    pre(x) on all its processes (`batch_norm_across`); no effect else.

    Raises ValueError for one value a channel in training (as torch.nn.BatchNorm2d does) and for a
    residual of another shape. Ioffe and Szegedy 2015, algorithm 1; He et al. 2016, figure 2.
    """
    arguments = (_activation(x, pre_slope), running_mean, running_var, weight, bias)
    if training and across is not None:
        y = batch_norm_across(*arguments, momentum, eps, across)
    else:
        y = F.batch_norm(*arguments, training, momentum, eps)
    # in place: y is a temporary, and a second one costs memory and, on the CPU, page faults
    return _activation(_add(y, residual), post_slope, inplace=True)


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
    pool: window, stride and padding in pixels; sizes floor: (P + 2 padding - window) // stride + 1.
    result: (N, K, P', Q') channels-last, x's dtype.

    Raises RuntimeError, as torch does, for a window larger than the padded image.
    """
    norm = (weight, bias, running_mean, running_var, training, momentum, eps)
    return _max_pool(bn_act(x, *norm, pre_slope, post_slope, across=across), pool)


def bias_act(
    x: Tensor, bias: Tensor | None, slope: float = 1.0, residual: Tensor | None = None
) -> Tensor:
    """Return act(x + bias + residual); no bias: a linear layer has added its own.

    x, residual, result: (N, K, P, Q) channels-last, or (N, K); one dtype. bias: (K,), fp32.
    Raises ValueError for a residual of another shape, RuntimeError for a bias of another length.
    """
    y = x if bias is None else x + _per_channel(bias, x)
    y = _add(y, residual)
    return _activation(y, slope, inplace=y is not x)


def bias_act_pool(
    x: Tensor, bias: Tensor | None, slope: float = 1.0, pool: tuple[int, int, int] = (2, 2, 0)
) -> Tensor:
    """Return max-pool(bias_act(x, bias, slope)).

    x: (N, K, P, Q) channels-last. bias: (K,), fp32, or None. pool: as for `bn_act_pool`.
    result: (N, K, P', Q') channels-last, x's dtype.
    Raises RuntimeError for a bias of another length or a window larger than the padded image.
    """
    return _max_pool(bias_act(x, bias, slope), pool)


def conv_bn_act(
    x: Tensor,
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
    plan: Any = None,
    across: ProcessGroup | None = None,
) -> Tensor:
    """Return bn_act or, with a pool, bn_act_pool of `product`(x, filter, conv_bias, stride, pads).

    x: (N, C, H, W); filter: (K, C, R, S); both channels-last. conv_bias: (K,), of filter's dtype,
    or None. pool: as for `bn_act_pool`, or None; no residual then. defer and plan are for
    `fastcnn.ops`, where they change the way and not the result. The rest, across and errors as for
    `bn_act` and `bn_act_pool`; ValueError for a residual with a pool.
    """
    require_no_residual(residual, pool)
    y = product(x, filter, conv_bias, stride, pads)
    arguments = (weight, bias, running_mean, running_var, training, momentum, eps)
    if pool is None:
        return bn_act(y, *arguments, pre_slope, post_slope, residual, across)
    return bn_act_pool(y, *arguments, pre_slope, post_slope, pool, across)


def conv_bias_act(
    x: Tensor,
    filter: Tensor,
    bias: Tensor | None,
    slope: float = 1.0,
    stride: int = 1,
    pads: Pads = (0, 0, 0, 0),
    pool: tuple[int, int, int] | None = None,
    residual: Tensor | None = None,
    defer: bool = False,
    plan: Any = None,
) -> Tensor:
    """Return bias_act or, with a pool, bias_act_pool of `product`(x, filter, None, stride, pads).

    x, filter, pool, residual, defer, plan and errors: as for `conv_bn_act`. bias: (K,), fp32 (fp64
    where x is), or None.
    """
    require_no_residual(residual, pool)
    y = product(x, filter, None, stride, pads)
    if pool is None:
        return bias_act(y, bias, slope, residual)
    return bias_act_pool(y, bias, slope, pool)


def product(x: Tensor, filter: Tensor, bias: Tensor | None, stride: int, pads: Pads) -> Tensor:
    """Return torch's convolution; pads: pixels at the top, bottom, left and right."""
    common, extra = split_pads(pads)
    if any(extra):
        x = F.pad(x, extra)
    return F.conv2d(x, filter, bias, stride, common)


def split_pads(pads: Pads) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """Return what a convolution of torch pads itself, rows and columns, the same on both sides,
    and what is left for F.pad: left, right, top, bottom."""
    top, bottom, left, right = pads
    rows, columns = min(top, bottom), min(left, right)
    return (rows, columns), (left - columns, right - columns, top - rows, bottom - rows)


def require_no_residual(residual: Tensor | None, pool: tuple[int, int, int] | None) -> None:
    """Raise ValueError for a residual of a layer that pools."""
    if residual is not None and pool:
        raise ValueError("residual: expected none in a layer that pools")


def require_same_shape(residual: Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError for a residual that would have to be broadcast."""
    if residual.shape != tuple(shape):
        raise ValueError(f"residual: expected shape {list(shape)}, got {list(residual.shape)}")


def _per_channel(bias: Tensor, x: Tensor) -> Tensor:
    # x's dtype, as a bias inside the convolution has under autocast: fp32 would promote the sum
    return bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def _add(y: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return y
    require_same_shape(residual, y.shape)
    return y + residual


def _activation(x: Tensor, slope: float, inplace: bool = False) -> Tensor:
    if slope == 1:
        return x
    return F.relu(x, inplace) if slope == 0 else F.leaky_relu(x, slope, inplace)


def _max_pool(y: Tensor, pool: tuple[int, int, int]) -> Tensor:
    size, stride, padding = pool
    return F.max_pool2d(y, size, stride, padding)
