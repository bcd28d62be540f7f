"""The convolution's launchers on torch tensors, and what they compute in plain torch.

Tensors are NHWC, filters (K, R, S, C), contiguous.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from simt.chain import EPS, MOMENTUM, Chain, nchw, nhwc


class Shape(NamedTuple):
    n: int
    h: int
    w: int
    c: int
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)  # top, bottom, left, right

    @property
    def p(self) -> int:
        return (self.h + sum(self.pads[:2]) - self.kernel[0]) // self.stride + 1

    @property
    def q(self) -> int:
        return (self.w + sum(self.pads[2:]) - self.kernel[1]) // self.stride + 1

    @property
    def fields(self) -> tuple[int, ...]:
        """Those of ConvShape, in their order."""
        return (*self[:5], *self.kernel, self.stride, *self.pads[::2], self.p, self.q)


class Pending(NamedTuple):
    """How a convolution makes its input: post(affine(pre(x))); all False and 1: it is x."""

    norm: bool = False
    bias: bool = False
    pre_slope: float = 1.0
    post_slope: float = 1.0


class Epilogue(NamedTuple):
    """What follows the product."""

    bias: bool = False
    affine: bool = False  # scale and shift
    residual: bool = False
    pre_slope: float = 1.0
    post_slope: float = 1.0
    pool: bool = False
    code: bool = False
    stats_slope: float | None = None


class Data(NamedTuple):
    """`images` in half precision; `of_input` (C,) and `of_result` (K,) vectors in fp32, by the
    names of the launchers' fields."""

    x: Tensor
    filter: Tensor
    residual: Tensor
    dy: Tensor
    of_input: dict[str, Tensor]
    of_result: dict[str, Tensor]


def activate(t: Tensor, slope: float) -> Tensor:
    if slope == 1:
        return t
    return F.leaky_relu(t, slope) if slope else F.relu(t)


def make(shape: Shape, dtype: torch.dtype, pending: Pending, epilogue: Epilogue) -> Data:
    """Random tensors, such that all results are of the size of 1; the pending normalisation is that
    of x itself wherever there are two pixels or more."""
    x = (torch.randn(shape.n, shape.h, shape.w, shape.c) + torch.randn(shape.c)).to(dtype)
    taps = shape.kernel[0] * shape.kernel[1] * shape.c
    filters = (torch.randn(shape.k, *shape.kernel, shape.c) * taps**-0.5).to(dtype)
    result = (shape.n, shape.p, shape.q, shape.k)
    residual, dy = (torch.randn(result).to(dtype) for _ in range(2))
    of_input: dict[str, Tensor] = {}
    if pending.norm:
        rows = activate(x.double(), pending.pre_slope).flatten(0, 2)
        var = rows.var(0, correction=0) if len(rows) > 1 else torch.ones(shape.c).double()
        of_input = {"in_mean": rows.mean(0), "in_rstd": (var + EPS).rsqrt()}
        of_input["in_weight"] = torch.rand(shape.c) + 0.5
    if pending.bias:
        of_input["in_bias"] = torch.randn(shape.c)
    of_result: dict[str, Tensor] = {}
    if epilogue.bias:
        of_result["bias"] = torch.randn(shape.k)
    if epilogue.affine:
        of_result |= {"scale": torch.rand(shape.k) + 0.5, "shift": torch.randn(shape.k)}
    return Data(
        x,
        filters,
        residual,
        dy,
        {name: t.float() for name, t in of_input.items()},
        {name: t.float() for name, t in of_result.items()},
    )


# ------------------------------------------------------------------------------- plain torch


def product(made: Tensor, filters: Tensor, shape: Shape) -> Tensor:
    top, bottom, left, right = shape.pads
    padded = F.pad(nchw(made), (left, right, top, bottom))
    return nhwc(F.conv2d(padded, nchw(filters), stride=shape.stride))


def windows(t: Tensor) -> Tensor:
    """(N, P/2, Q/2, K, 4), row after row of each window."""
    n, p, q, k = t.shape
    t = t[:, : p // 2 * 2, : q // 2 * 2].reshape(n, p // 2, 2, q // 2, 2, k)
    return t.permute(0, 1, 3, 5, 2, 4).flatten(-2)


class Plain:
    """The composition in plain torch: in fp64, or in fp32 with every tensor rounded to half that a
    network of separate ops keeps."""

    def __init__(self, shape: Shape, data: Data, pending: Pending, rounds: bool) -> None:
        self.shape, self.data, self.pending = shape, data, pending
        self.dtype = torch.float32 if rounds else torch.float64
        self.half = data.x.dtype if rounds else None

    def rounded(self, t: Tensor) -> Tensor:
        return t if self.half is None else t.to(self.half).to(self.dtype)

    def vector(self, name: str) -> Tensor | None:
        found = (self.data.of_input | self.data.of_result).get(name)
        return None if found is None else found.to(self.dtype)

    def normalised(self, x: Tensor) -> Tensor:
        """x̂ = (pre(x) - mean) · rstd."""
        x = activate(x, self.pending.pre_slope)
        return (x - self.vector("in_mean")) * self.vector("in_rstd") if self.pending.norm else x

    def affine(self, normalised: Tensor) -> Tensor:
        weight, bias = self.vector("in_weight"), self.vector("in_bias")
        z = normalised if weight is None else normalised * weight
        return z if bias is None else z + bias

    def made(self, x: Tensor) -> Tensor:
        z = self.affine(self.normalised(x))
        return self.rounded(activate(z, self.pending.post_slope))

    def before_pool(self, epilogue: Epilogue) -> tuple[Tensor, Tensor]:
        """The result before the last activation, and behind it."""
        made = self.made(self.data.x.to(self.dtype))
        y = self.rounded(product(made, self.data.filter.to(self.dtype), self.shape))
        if epilogue.bias:
            y = y + self.vector("bias")
        y = activate(y, epilogue.pre_slope)
        if epilogue.affine:
            y = y * self.vector("scale") + self.vector("shift")
        if epilogue.residual:
            y = y + self.data.residual
        return y, self.rounded(activate(y, epilogue.post_slope))

    def forward(self, epilogue: Epilogue) -> Tensor:
        _, y = self.before_pool(epilogue)
        return windows(y).amax(-1) if epilogue.pool else y

    def data_gradient(self, batch_stats: bool) -> dict[str, Tensor]:
        """dx, dweight, dbias by the formulas of ConvDataGradient."""
        x, filters, dy = (t.to(self.dtype) for t in (self.data.x, self.data.filter, self.data.dy))
        like = torch.zeros_like(x, requires_grad=True)
        product(like, filters, self.shape).backward(dy)
        normalised = self.normalised(x)
        z, g = self.affine(normalised), self.rounded(like.grad)
        g = torch.where(z > 0, g, g * self.pending.post_slope)
        dbias, dweight = g.sum((0, 1, 2)), (g * normalised).sum((0, 1, 2))
        dx = g
        if batch_stats:
            dx = g - (dbias + normalised * dweight) / (x.numel() / x.shape[-1])
        if self.pending.norm:
            dx = dx * self.vector("in_rstd") * self.vector("in_weight")
        dx = torch.where(x > 0, dx, dx * self.pending.pre_slope)
        return {"dx": self.rounded(dx), "dweight": dweight, "dbias": dbias}

    def weight_gradient(self) -> Tensor:
        made = self.made(self.data.x.to(self.dtype))
        filters = torch.zeros_like(self.data.filter, dtype=self.dtype, requires_grad=True)
        product(made, filters, self.shape).backward(self.data.dy.to(self.dtype))
        return self.rounded(filters.grad)


def gradients_by_autograd(
    shape: Shape, data: Data, pending: Pending, batch_stats: bool
) -> dict[str, Tensor]:
    """dx, dweight, dbias, dfilter in fp64: F.batch_norm and the rest, differentiated by torch."""
    x, filters = (t.double().requires_grad_() for t in (data.x, data.filter))
    given = {name: t.double() for name, t in data.of_input.items()}
    weight = given.get("in_weight", torch.ones(shape.c).double()).requires_grad_()
    bias = given.get("in_bias", torch.zeros(shape.c).double()).requires_grad_()
    z = nchw(activate(x, pending.pre_slope))
    if pending.norm:
        mean, var = given["in_mean"], given["in_rstd"] ** -2 - EPS
        z = F.batch_norm(z, mean, var, weight, bias, training=batch_stats, momentum=0, eps=EPS)
    else:
        z = z + bias.view(-1, 1, 1)
    product(nhwc(activate(z, pending.post_slope)), filters, shape).backward(data.dy.double())
    dweight = weight.grad if pending.norm else (x.detach() * 0).sum((0, 1, 2))
    return {"dx": x.grad, "dweight": dweight, "dbias": bias.grad, "dfilter": filters.grad}


# --------------------------------------------------------------------------------- launchers


class ConvChain(Chain):
    """Calls of the convolution's launchers on copies in fenced memory, outputs filled with NaN."""

    def __init__(self, kernels: ModuleType, misaligned: bool = False) -> None:
        super().__init__(kernels, misaligned)

    def of_input(self, data: Data, pending: Pending) -> dict:
        slopes = {"in_pre_slope": pending.pre_slope, "in_post_slope": pending.post_slope}
        return {"x": self.copied(data.x), **self.parameters(data.of_input), **slopes}

    def copied(self, t: Tensor) -> Tensor:
        return self.buffer(t.shape, t.dtype, t)

    def parameters(self, vectors: dict[str, Tensor]) -> dict[str, Tensor]:
        """fp32 vectors are on 4 bytes."""
        return {
            name: self.buffer(t.shape, t.dtype, t, workspace=True) for name, t in vectors.items()
        }

    def floats(self, *shape: int) -> Tensor:
        return self.buffer(shape, torch.float32, workspace=True)

    def forward(
        self, shape: Shape, data: Data, pending: Pending, epilogue: Epilogue
    ) -> dict[str, Tensor]:
        """y; code; partials, and the statistics that come of them."""
        size = 2 if epilogue.pool else 1
        result = (shape.n, shape.p // size, shape.q // size, shape.k)
        found = {"y": self.buffer(result, data.x.dtype)}
        if epilogue.code:
            found["code"] = self.buffer(result, torch.uint8)
        if epilogue.stats_slope is not None:
            found["partials"] = self.floats(
                3, self.kernels.conv_partial_rows(shape.fields), shape.k
            )
        self.launch(
            "conv",
            data.x.dtype,
            shape=shape.fields,
            **self.of_input(data, pending),
            filter=self.copied(data.filter),
            **self.parameters(data.of_result),
            residual=self.copied(data.residual) if epilogue.residual else None,
            pre_slope=epilogue.pre_slope,
            post_slope=epilogue.post_slope,
            pool=epilogue.pool,
            stats_slope=1.0 if epilogue.stats_slope is None else epilogue.stats_slope,
            **found,
        )
        if epilogue.stats_slope is not None:
            found |= self.merge(found["partials"], shape.n * shape.p * shape.q)
        self.check_fences()
        return found

    def merge(self, partials: Tensor, count: int) -> dict[str, Tensor]:
        """mean, rstd; and the running statistics, which were 0 and 1."""
        _, rows, k = partials.shape
        running = {"running_mean": torch.zeros(k), "running_var": torch.ones(k)}
        found = {"mean": self.floats(k), "rstd": self.floats(k), **self.parameters(running)}
        sizes = {"rows": rows, "k": k, "count": count, "momentum": MOMENTUM, "eps": EPS}
        self.launch("bn_merge", torch.float32, partials=partials, **sizes, **found)
        return found

    def workspace(self, op: str, shape: Shape, dtype: torch.dtype) -> Tensor:
        name = str(dtype).removeprefix("torch.")
        size = self.kernels.conv_workspace(op=op, shape=shape.fields, dtype=name)
        return self.buffer((size,), torch.uint8, workspace=True)

    def data_gradient(
        self, shape: Shape, data: Data, pending: Pending, batch_stats: bool, sums: bool = True
    ) -> dict[str, Tensor]:
        """dx; dweight and dbias of a pending input, unless they are not wanted."""
        found = {"dx": self.buffer(data.x.shape, data.x.dtype)}
        if sums and pending != Pending():
            found |= {name: self.floats(shape.c) for name in ("dweight", "dbias")}
        given = self.of_input(data, pending)
        if pending == Pending():
            del given["x"]
        self.launch(
            op := "conv_data_gradient",
            data.x.dtype,
            shape=shape.fields,
            **given,
            batch_stats=batch_stats,
            filter=self.copied(data.filter),
            dy=self.copied(data.dy),
            workspace=self.workspace(op, shape, data.x.dtype),
            **found,
        )
        self.check_fences()
        return found

    def weight_gradient(self, shape: Shape, data: Data, pending: Pending) -> Tensor:
        dfilter = self.buffer(data.filter.shape, data.filter.dtype)
        self.launch(
            op := "conv_weight_gradient",
            data.x.dtype,
            shape=shape.fields,
            **self.of_input(data, pending),
            dy=self.copied(data.dy),
            dfilter=dfilter,
            workspace=self.workspace(op, shape, data.x.dtype),
        )
        self.check_fences()
        return dfilter
