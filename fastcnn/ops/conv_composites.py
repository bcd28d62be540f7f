"""The convolution's ops for the CPU: the library's kernels where it has some, else torch's
convolution and the ops that follow one.

The kernels are for 3x3 filters with stride 1 in fp32 and fp64. Elsewhere these ops save no time:
they let a network that is meant for a GPU run anywhere, and say what a kernel must compute.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcnn.ops import tracing
from fastcnn.ops.conv_library import (
    POOL,
    Pads,
    Pending,
    channels_last,
    gradients_of_pending,
    result_shape,
    vendor_gradients,
)
from fastcnn.ops.loading import DTYPES, schemas
from fastcnn.ops.reference import product

_ops = torch.ops.fastcnn


def has_kernels(x: Tensor, filter_shape: Sequence[int], stride: int, pads: Pads) -> bool:
    """Whether the CPU's kernels compute this convolution of an image on the CPU."""
    return (
        stride == 1
        and tuple(filter_shape[2:]) == (3, 3)
        and max(pads) <= 2
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and filter_shape[0] > 0
    )


def _conv(x, filter, bias, *rest):  # type: ignore[no-untyped-def]
    *block, stride, pads, stats_slope, _, _ = rest
    pending = Pending(x, *block)
    _check_product(pending, filter, bias, stride, pads)
    if has_kernels(x, filter.shape, stride, pads):
        return _ops.conv3x3(x, filter, bias, *rest)
    y = _product(pending.applied(), filter, bias, stride, pads)
    wide = tracing.parameter_dtype(x)
    if stats_slope is None:
        return y, x.new_empty((3, 0, y.shape[1]), dtype=wide)
    _check_slope(stats_slope)
    return y, _statistics(F.leaky_relu(y.to(wide), stats_slope))


def _product(x: Tensor, filter: Tensor, bias: Tensor | None, stride: int, pads: Pads) -> Tensor:
    rounded = None if bias is None else bias.to(x.dtype)
    return channels_last(product(x, filter, rounded, stride, pads))


def _statistics(values: Tensor) -> Tensor:
    """Mean, squared deviations from it and count of each channel, (3, 1, K)."""
    count = values.numel() // max(values.shape[1], 1)
    mean = values.mean((0, 2, 3))
    squares = (values - mean.view(-1, 1, 1)).square().sum((0, 2, 3))
    return torch.stack([mean, squares, torch.full_like(mean, count)]).unsqueeze(1)


def _conv_bias_act_pool(x, filter, bias, *rest):  # type: ignore[no-untyped-def]
    *block, slope, stride, pads, _, _ = rest
    pending = Pending(x, *block)
    _check_product(pending, filter, bias, stride, pads)
    if has_kernels(x, filter.shape, stride, pads):
        return _ops.conv3x3_bias_act_pool(x, filter, bias, *rest)
    y = _product(pending.applied(), filter, None, stride, pads)
    return _ops.bias_act_pool(y, bias, slope, *POOL)


def _conv_affine_act(  # type: ignore[no-untyped-def]
    x, filter, bias, scale, shift, residual, pre_slope, post_slope, stride, pads, pool
):
    _check_product(Pending(x), filter, bias, stride, pads)
    if has_kernels(x, filter.shape, stride, pads):
        rest = (pre_slope, post_slope, stride, pads, pool)
        return _ops.conv3x3_affine_act(x, filter, bias, scale, shift, residual, *rest)
    y = _product(x, filter, bias, stride, pads)
    _require(residual is None or not pool, "residual: expected none with a pool")
    zeros, ones = torch.zeros_like(tracing.per_channel(y)), torch.ones_like(tracing.per_channel(y))
    affine = (zeros, ones, ones if scale is None else scale, zeros if shift is None else shift)
    if pool:
        return _ops.bn_act_pool(y, *affine, False, pre_slope, post_slope, *POOL)[0]
    return _ops.bn_act(y, *affine, residual, False, pre_slope, post_slope)


def _conv_data_gradient(dy, filter, x, *rest):  # type: ignore[no-untyped-def]
    *block, stride, pads = rest
    pending = Pending(x, *block)
    _check_product(pending, filter, None, stride, pads)
    _check_gradient(dy, x, result_shape(x, filter, stride, pads))
    if has_kernels(x, filter.shape, stride, pads):
        return _ops.conv3x3_data_gradient(dy, filter, x, *rest)
    activated = pending.applied() if pending.mean is None else x
    dz, _ = vendor_gradients(dy, activated, filter, stride, pads, (True, False))
    return gradients_of_pending(dz, pending, activated)


def _conv_weight_gradient(dy, x, *rest):  # type: ignore[no-untyped-def]
    *block, r, s, stride, pads = rest
    _require(dy.dim() == 4, f"dy: expected (N, K, P, Q), got {list(dy.shape)}")
    pending = Pending(x, *block)
    # its values are not read
    shape = (dy.shape[1], x.shape[1], r, s)
    filter = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
    _check_product(pending, filter, None, stride, pads)
    _check_gradient(dy, x, result_shape(x, filter, stride, pads))
    if has_kernels(x, shape, stride, pads):
        return _ops.conv3x3_weight_gradient(dy, x, *rest)
    return vendor_gradients(dy, pending.applied(), filter, stride, pads, (False, True))[1]


# checks, in the words of csrc/bindings_conv.cpp


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(message)


def _check_product(
    pending: Pending, filter: Tensor, bias: Tensor | None, stride: int, pads: Pads
) -> None:
    x = pending.x
    _check_image(x, "x", "(N, C, H, W)")
    _check_image(filter, "filter", "(K, C, R, S)")
    _require(
        filter.shape[1] == x.shape[1],
        f"filter: expected {x.shape[1]} channels, as x has, got {filter.shape[1]}",
    )
    _require(filter.dtype == x.dtype, "filter: expected the dtype of x")
    if bias is not None:
        _check_vector(bias, filter.shape[0], x, "bias")
    _check_pending(pending)
    _require(
        stride >= 1 and len(pads) == 4 and min(pads) >= 0,
        f"conv: expected a stride >= 1 and four pads >= 0, got {stride} and {list(pads)}",
    )
    top, bottom, left, right = pads
    height, width = x.shape[2] + top + bottom, x.shape[3] + left + right
    _require(
        filter.shape[2] <= height and filter.shape[3] <= width,
        f"filter: expected at most {height} x {width}, the padded image, got {filter.shape[2]} x "
        f"{filter.shape[3]}",
    )


def _check_pending(pending: Pending) -> None:
    vectors = dict(zip(("in_mean", "in_rstd", "in_weight", "in_bias"), pending[1:5], strict=True))
    for name, vector in vectors.items():
        if vector is not None:
            _check_vector(vector, pending.shape[1], pending.x, name)
    given = [vector is not None for vector in vectors.values()]
    _require(
        all(given) or not any(given[:3]),
        "in_mean, in_rstd, in_weight, in_bias: expected all of them, the bias alone or none",
    )
    _check_slope(pending.pre_slope)
    _check_slope(pending.post_slope)
    _require(
        pending.mean is not None or pending.pre_slope == 1,
        f"in_pre_slope: expected 1 without in_mean, got {pending.pre_slope:g}",
    )
    _require(
        pending.mean is not None or not pending.batch_stats,
        "in_batch_stats: expected false without in_mean",
    )


def _check_gradient(dy: Tensor, x: Tensor, shape: tuple[int, ...]) -> None:
    _require(tuple(dy.shape) == shape, f"dy: expected shape {list(shape)}, got {list(dy.shape)}")
    _require(dy.dtype == x.dtype, "dy: expected the dtype of x")
    _check_layout(dy, "dy")


def _check_image(x: Tensor, name: str, form: str) -> None:
    _require(x.dim() == 4, f"{name}: expected {form}, got {list(x.shape)}")
    _require(
        x.dtype in DTYPES["cpu"],
        f"{name}: expected float32, bfloat16 or float64 on the CPU, got {str(x.dtype)[6:]}; "
        "use backend torch",
    )
    _check_layout(x, name)


def _check_layout(x: Tensor, name: str) -> None:
    expected = 1
    for d in (1, 3, 2, 0) if x.numel() else ():
        _require(
            x.shape[d] == 1 or x.stride(d) == expected,
            f"{name}: expected channels-last memory, got stride {x.stride(d)} in dimension {d} "
            f"(expected {expected}); use .contiguous(memory_format=torch.channels_last)",
        )
        expected *= x.shape[d]


def _check_vector(vector: Tensor, length: int, x: Tensor, name: str) -> None:
    _require(
        vector.dim() == 1 and vector.shape[0] == length and vector.is_contiguous(),
        f"{name}: expected contiguous [{length}], got {list(vector.shape)}",
    )
    _require(
        vector.dtype == tracing.parameter_dtype(x),
        f"{name}: expected float32 (float64 where x is)",
    )


def _check_slope(slope: float) -> None:
    _require(slope >= 0, f"slope: expected >= 0, got {slope:g}")


def register() -> None:
    """Make these the library's ops for the CPU."""
    composites = {
        "conv": _conv,
        "conv_bias_act_pool": _conv_bias_act_pool,
        "conv_affine_act": _conv_affine_act,
        "conv_data_gradient": _conv_data_gradient,
        "conv_weight_gradient": _conv_weight_gradient,
    }
    for name, composite in composites.items():
        schemas.impl(name, composite, "CPU")
