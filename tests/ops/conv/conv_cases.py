"""Cases of the convolution's ops, and the same in plain torch."""

from dataclasses import dataclass

import torch
from op_cases import wide
from torch.nn import functional as F

from fastcnn.ops import Pending

EPS = 1e-3
BOTH = [(data, weight) for data in (False, True) for weight in (False, True)]
"""Whether the data gradient and the weight gradient are the library's own."""


@dataclass(frozen=True)
class ConvCase:
    """x (N, C, H, W), K filters of R x S; pending: what the layer before left to be done."""

    x: tuple[int, int, int, int]
    k: int
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    pads: tuple[int, int, int, int] = (1, 1, 1, 1)
    pending: str = "plain"  # "norm" of the batch, "eval" of running statistics, "bias", "slope"

    def __str__(self):
        words = ["x".join(map(str, self.x)), "x".join(map(str, (self.k, *self.kernel)))]
        return "-".join([*words, f"s{self.stride}", "".join(map(str, self.pads)), self.pending])

    @property
    def result(self):
        """N, K, P, Q."""
        top, bottom, left, right = self.pads
        (n, _, h, w), (r, s) = self.x, self.kernel
        p, q = (h + top + bottom - r) // self.stride + 1, (w + left + right - s) // self.stride + 1
        return n, self.k, p, q


PENDING = ("plain", "norm", "eval", "bias", "slope")
GEOMETRIES = [
    ((2, 3, 6, 5), 4, (3, 3), 1, (1, 1, 1, 1)),
    ((7, 1, 1, 1), 1, (1, 1), 1, (0, 0, 0, 0)),
    ((7, 17, 3, 4), 24, (3, 3), 1, (1, 1, 1, 1)),
    ((2, 65, 5, 5), 100, (1, 1), 2, (0, 0, 0, 0)),
    ((3, 3, 7, 6), 24, (2, 2), 1, (0, 1, 0, 1)),
    ((2, 3, 5, 6), 5, (4, 3), 2, (1, 2, 0, 1)),
    ((2, 5, 6, 6), 7, (2, 1), 1, (1, 0, 2, 0)),
    ((1, 17, 9, 4), 1, (3, 3), 2, (1, 1, 1, 1)),
    ((7, 3, 5, 5), 65, (5, 5), 1, (2, 2, 2, 2)),
    # the CPU's tiles: whole images of one and of two pixels, parts of tiles, other pads
    ((3, 20, 1, 1), 17, (3, 3), 1, (1, 1, 1, 1)),
    ((3, 17, 2, 2), 70, (3, 3), 1, (1, 1, 1, 1)),
    ((2, 5, 9, 11), 33, (3, 3), 1, (0, 2, 1, 0)),
]
CASES = [ConvCase(*geometry, pending) for geometry in GEOMETRIES for pending in PENDING]


def drawn(shape, dtype, generator):
    values = torch.randn(*shape, generator=generator, dtype=torch.float64)
    form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return values.to(dtype, memory_format=form)


def tensors_of(case, dtype, seed=0):
    """x, filter, bias, in_weight, in_bias, in_mean, in_var and dy by name."""
    generator = torch.Generator().manual_seed(seed)
    channels = case.x[1]
    found = {"x": drawn(case.x, dtype, generator)}
    found["filter"] = drawn((case.k, channels, *case.kernel), dtype, generator)
    found["bias"] = drawn((case.k,), wide(dtype), generator)
    for name in ("in_weight", "in_bias", "in_mean", "in_var"):
        found[name] = drawn((channels,), wide(dtype), generator)
    found["in_var"] = found["in_var"].abs() + 0.5
    found["dy"] = drawn(case.result, dtype, generator)
    return found


def slopes_of(case):
    return {"plain": (1.0, 1.0), "bias": (1.0, 0.1), "slope": (1.0, 0.0)}.get(
        case.pending, (0.2, 0.1)
    )


def pending_of(case, t):
    """x and what is pending of it, as the library takes it."""
    pre_slope, post_slope = slopes_of(case)
    if case.pending in ("plain", "slope"):
        return Pending(t["x"], post_slope=post_slope)
    if case.pending == "bias":
        return Pending(t["x"], bias=t["in_bias"], post_slope=post_slope)
    batch = case.pending == "norm"
    mean, var = t["in_mean"], t["in_var"]
    if batch:
        values = F.leaky_relu(t["x"].detach().to(mean.dtype), pre_slope)
        mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3), correction=0)
    rstd = (var + EPS).rsqrt()
    return Pending(t["x"], mean, rstd, t["in_weight"], t["in_bias"], batch, pre_slope, post_slope)


def input_in_torch(case, t):
    """What the convolution multiplies, in plain torch."""
    (pre_slope, post_slope), x = slopes_of(case), t["x"]
    if case.pending in ("norm", "eval"):
        x = F.batch_norm(
            F.leaky_relu(x, pre_slope),
            *(t["in_mean"].clone(), t["in_var"].clone(), t["in_weight"], t["in_bias"]),
            training=case.pending == "norm",
            eps=EPS,
        )
    if case.pending == "bias":
        x = x + t["in_bias"].to(x.dtype).view(-1, 1, 1)
    return F.leaky_relu(x, post_slope)


def product_in_torch(case, t):
    top, bottom, left, right = case.pads
    padded = F.pad(input_in_torch(case, t), (left, right, top, bottom))
    return F.conv2d(padded, t["filter"], t["bias"].to(padded.dtype), case.stride)


def gradients(case, call, tensors, dy="dy"):
    """The result and the gradient of everything that has one, by name."""
    names = ["x", "filter", "bias"]
    names += ["in_weight"] * (case.pending in ("norm", "eval"))
    names += ["in_bias"] * (case.pending in ("norm", "eval", "bias"))
    t = {n: v.clone(memory_format=torch.preserve_format) for n, v in tensors.items()}
    for name in names:
        t[name].requires_grad_()
    y = call(t)
    found = torch.autograd.grad(y, [t[name] for name in names], t[dy])
    return {"y": y.detach()} | {f"d{n}": g for n, g in zip(names, found, strict=True)}


class Noted:
    """The library's ops; notes which were called."""

    def __init__(self):
        self.called = []

    def __getattr__(self, name):
        self.called.append(name)
        return getattr(torch.ops.fastcnn, name)
