"""The convolution as ops of the library: schemas, shapes for tracing, gradients.

A convolution here multiplies post(affine(pre(x))), which is made while x is loaded: the activated
and normalised tensor of the layer before is neither written nor kept for the backward, and the
statistics of the result come out of the product, so that a chain of layers costs no pass of its
own. "in_*" are what is done to x: all None and both slopes 1 is x itself. csrc/arguments.h has the
semantics, csrc/bindings_conv.cpp the kernels. On the CPU they are for 3x3 filters with stride 1
alone, the ops conv3x3*; conv_composites.py has the other shapes, made of torch's own operations.

Sizes: x (N, C, H, W), filter (K, C, R, S), result (N, K, P, Q), all in channels-last memory and of
one dtype. Vectors are fp32 (fp64 where x is). pads: top, bottom, left, right. stride: both ways.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcnn.ops import tracing
from fastcnn.ops.loading import define, schemas
from fastcnn.ops.reference import split_pads

Pads = tuple[int, int, int, int]
POOL = (2, 2, 0)
"""The only pool that a convolution's own kernel has."""

_ops = torch.ops.fastcnn
_INPUT = (
    "Tensor? in_mean, Tensor? in_rstd, Tensor? in_weight, Tensor? in_bias, bool in_batch_stats, "
    "float in_pre_slope, float in_post_slope"
)


class Pending(NamedTuple):
    """A tensor and what is still to be done to it: post((pre(x) - mean) · rstd · weight + bias).

    x: (N, C, H, W) channels-last, the product of the layer before. mean, rstd, weight, bias: (C,),
    fp32 (fp64 where x is); of a layer without norm only a bias or none of them. batch_stats: mean
    and rstd are those of pre(x), and the gradient counts what it does through them.
    """

    x: Tensor
    mean: Tensor | None = None
    rstd: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    batch_stats: bool = False
    pre_slope: float = 1.0
    post_slope: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether nothing is to be done."""
        vectors = self[1:5]
        return all(v is None for v in vectors) and self.pre_slope == self.post_slope == 1

    def applied(self) -> Tensor:
        """Return what is pending of it, in x's dtype; differentiable."""
        if self.is_plain:
            return self.x
        if self.mean is None:
            return _ops.bias_act(self.x, self.bias, None, self.post_slope)
        return _ops.bn_act(*self[:5], None, *self[5:])

    @property
    def shape(self) -> torch.Size:
        return self.x.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device


def result_shape(x: Tensor, filter: Tensor, stride: int, pads: Pads) -> tuple[int, int, int, int]:
    """Return N, K, P, Q."""
    top, bottom, left, right = pads
    p = (x.shape[2] + top + bottom - filter.shape[2]) // stride + 1
    q = (x.shape[3] + left + right - filter.shape[3]) // stride + 1
    return x.shape[0], filter.shape[0], p, q


# conv: conv2d(input, filter) + bias; and, unless stats_slope is None, partial statistics (3, rows,
# K) of its activation for bn_stats_merge: mean, squared deviations from it, count. own_...: whether
# that gradient is the library's or torch's


def _define(name: str, schema: str) -> None:
    """An op, and the CPU's kernel of it for 3x3 filters, which only that op calls."""
    define(name, schema)
    define(name.replace("conv", "conv3x3", 1), schema)


_define(
    "conv",
    f"(Tensor x, Tensor filter, Tensor? bias, {_INPUT}, int stride, int[] pads, "
    "float? stats_slope, bool own_data_gradient, bool own_weight_gradient) "
    "-> (Tensor y, Tensor partials)",
)
_define(
    "conv_data_gradient",
    f"(Tensor dy, Tensor filter, Tensor x, {_INPUT}, int stride, int[] pads) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
)
_define(
    "conv_weight_gradient",
    f"(Tensor dy, Tensor x, {_INPUT}, int r, int s, int stride, int[] pads) -> Tensor",
)


@torch.library.register_fake("fastcnn::conv", lib=schemas)
def _(x, filter, bias, *rest):  # type: ignore
    *_, stride, pads, stats_slope, _, _ = rest
    shape = result_shape(x, filter, stride, pads)
    rows = 0 if stats_slope is None else _partial_rows(x)
    partials = x.new_empty((3, rows, shape[1]), dtype=tracing.parameter_dtype(x))
    return tracing.image(x, shape, x.dtype), partials


def _partial_rows(x: Tensor) -> Any:
    # on a GPU the kernels' launches decide, of which tracing knows nothing
    return torch.library.get_ctx().new_dynamic_size() if x.device.type == "cuda" else 1


@torch.library.register_fake("fastcnn::conv_data_gradient", lib=schemas)
def _(dy, filter, x, in_mean, in_rstd, in_weight, in_bias, *rest):  # type: ignore
    dweight, dbias = (
        tracing.per_channel(x) if vector is not None else tracing.per_channel(x).new_empty(0)
        for vector in (in_weight, in_bias)
    )
    return tracing.like(x), dweight, dbias


@torch.library.register_fake("fastcnn::conv_weight_gradient", lib=schemas)
def _(dy, x, *rest):  # type: ignore
    *_, r, s, _, _ = rest
    return tracing.image(x, (dy.shape[1], x.shape[1], r, s), x.dtype)


def _conv_save(ctx: Any, inputs: Any, output: Any) -> None:
    stride, pads, _, *own = inputs[10:]
    _save_product(ctx, inputs, (stride, pads), own)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _save_product(ctx: Any, inputs: Any, geometry: Any, own: list[bool], *more: Tensor) -> None:
    """What the gradients of a product need: x as it is, what is pending of it, the filter."""
    x, filter, _, *block = inputs[:10]
    ctx.save_for_backward(x, filter, *block[:4], *more)
    ctx.block, ctx.geometry, ctx.own = block[4:], geometry, own


def _conv_gradient(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 15
    dy = tracing.incoming(dy)
    wide = tracing.parameter_dtype(dy)
    dbias = dy.sum((0, 2, 3), dtype=wide) if ctx.needs_input_grad[2] else None
    return *_product_gradients(ctx, dy, dbias, *ctx.saved_tensors), *[None] * 5


torch.library.register_autograd(
    "fastcnn::conv", _conv_gradient, setup_context=_conv_save, lib=schemas
)


def _product_gradients(
    ctx: Any, dy: Tensor, dbias: Tensor | None, x: Tensor, filter: Tensor, *vectors: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of x, filter, bias and the block of what is pending, where they are wanted.

    dy: the gradient of the product.
    """
    pending = Pending(x, *vectors, *ctx.block)  # type: ignore[arg-type]
    wants_filter = ctx.needs_input_grad[1]
    wants_input = any(ctx.needs_input_grad[place] for place in (0, 5, 6))
    own_data, own_weight = ctx.own
    dinput = dfilter = None
    vendors = (wants_input and not own_data, wants_filter and not own_weight)
    if any(vendors):
        # a mask is read from the activated input where there is no norm to compute it from
        needs_values = vendors[1] or pending.mean is None
        activated = pending.applied() if needs_values else x
        stride, pads = ctx.geometry
        dz, dfilter = vendor_gradients(dy, activated, filter, stride, pads, vendors)
        if dz is not None:
            dinput = gradients_of_pending(dz, pending, activated)
    if wants_filter and own_weight:
        dfilter = _ops.conv_weight_gradient(dy, *pending, *filter.shape[2:], *ctx.geometry)
    if wants_input and own_data:
        dinput = _ops.conv_data_gradient(dy, filter, *pending, *ctx.geometry)
    dx, dweight, dbias_in = dinput or (None, None, None)
    dweight = dweight if pending.weight is not None else None
    dbias_in = dbias_in if pending.bias is not None else None
    return dx, dfilter, dbias, None, None, dweight, dbias_in, None, None, None


def gradients_of_pending(
    dz: Tensor, pending: Pending, activated: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias of pending.applied(), which is `activated`, for its gradient dz;
    dweight, dbias: (C,), empty where there is no such vector."""
    dweight, dbias = (dz.new_empty(0, dtype=tracing.parameter_dtype(dz)) for _ in range(2))
    if pending.is_plain:
        return dz, dweight, dbias
    if pending.mean is None:
        with_bias = pending.bias is not None
        dx, dbias = _ops.bias_act_backward(dz, activated, with_bias, pending.post_slope)
        return dx, dweight, dbias
    return _ops.bn_act_backward(dz, pending.x, None, *pending[1:])[:3]


def vendor_gradients(
    dy: Tensor, x: Tensor, filter: Tensor, stride: int, pads: Pads, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return torch's gradients of a product for x and for the filter; None: not wanted."""
    common, extra = split_pads(pads)
    padded = F.pad(x, extra) if any(extra) else x
    strides, none = [stride, stride], [0, 0]
    dx, dfilter, _ = torch.ops.aten.convolution_backward(
        dy, padded, filter, None, strides, common, [1, 1], False, none, 1, [*wanted, False]
    )
    if wanted[0] and any(extra):
        left, _, top, _ = extra
        dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return tuple(None if g is None else channels_last(g) for g in (dx, dfilter))  # type: ignore


def channels_last(result: Tensor) -> Tensor:
    """What torch's convolutions return, whose layout is their own choice, in channels-last."""
    return result.contiguous(memory_format=torch.channels_last)


# conv_bias_act_pool: max-pool(act(conv2d(input, filter) + bias)), 2x2 with stride 2; code: as
# bias_act_pool's, so that the product itself is neither written nor kept

_define(
    "conv_bias_act_pool",
    f"(Tensor x, Tensor filter, Tensor? bias, {_INPUT}, float slope, int stride, int[] pads, "
    "bool own_data_gradient, bool own_weight_gradient) -> (Tensor y, Tensor code)",
)


@torch.library.register_fake("fastcnn::conv_bias_act_pool", lib=schemas)
def _(x, filter, bias, *rest):  # type: ignore
    *_, stride, pads, _, _ = rest
    return tracing.pooled(x, result_shape(x, filter, stride, pads), POOL)


def _conv_bias_act_pool_save(ctx: Any, inputs: Any, output: Any) -> None:
    x, filter, bias, *_ = inputs
    ctx.slope, stride, pads, *own = inputs[10:]
    _save_product(ctx, inputs, (stride, pads), own, output[1])
    ctx.size, ctx.with_bias = result_shape(x, filter, stride, pads)[2:], bias is not None
    tracing.no_gradient_of_code(ctx, output[1])


def _conv_bias_act_pool_gradient(ctx: Any, dy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 15
    *saved, code = ctx.saved_tensors
    dy, dbias = _ops.bias_act_pool_backward(
        tracing.incoming(dy), code, *ctx.size, ctx.with_bias, ctx.slope, *POOL
    )
    found = _product_gradients(ctx, dy, dbias if ctx.with_bias else None, *saved)
    return *found, *[None] * 5


torch.library.register_autograd(
    "fastcnn::conv_bias_act_pool",
    _conv_bias_act_pool_gradient,
    setup_context=_conv_bias_act_pool_save,
    lib=schemas,
)


# conv_affine_act, for inference: post(pre(conv2d(x, filter) + bias) · scale + shift + residual),
# and its 2x2 max-pool with stride 2 if asked for (no residual then)

_define(
    "conv_affine_act",
    "(Tensor x, Tensor filter, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    "float pre_slope, float post_slope, int stride, int[] pads, bool pool) -> Tensor",
)


@torch.library.register_fake("fastcnn::conv_affine_act", lib=schemas)
def _(x, filter, bias, scale, shift, residual, pre_slope, post_slope, stride, pads, pool):  # type: ignore
    shape = result_shape(x, filter, stride, pads)
    return tracing.pooled(x, shape, POOL)[0] if pool else tracing.image(x, shape, x.dtype)


def _no_gradient(ctx: Any, *gradients: Any) -> None:
    raise RuntimeError(
        "fastcnn::conv_affine_act: expected no backward, this op is for inference; "
        "use fastcnn.ops.conv_bn_act"
    )


torch.library.register_autograd("fastcnn::conv_affine_act", _no_gradient, lib=schemas)


# bn_stats_merge: mean and rstd of the `count` values a channel that conv's partials are of, of as
# many as they themselves say without a count; the running statistics move towards them by momentum,
# as in bn_stats

define(
    "bn_stats_merge",
    "(Tensor partials, SymInt? count, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "float momentum, float eps) -> (Tensor mean, Tensor rstd)",
)


@torch.library.register_fake("fastcnn::bn_stats_merge", lib=schemas)
def _(partials, count, running_mean, running_var, momentum, eps):  # type: ignore
    return torch.empty_like(running_mean), torch.empty_like(running_var)
