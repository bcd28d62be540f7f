"""The launchers on torch tensors, with poisoned outputs; and the same ops by the oracle.

Tensors are NHWC, (N, P, Q, K), contiguous, unless said otherwise.
"""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastcnn.ops import reference
from fastcnn.ops.reference import augmentation as reference_augment

EPS, MOMENTUM = 1e-5, 0.1
GUARD = 64  # bytes before and after every buffer


class Case(NamedTuple):
    """What a chain computes: normalisation by batch or running statistics, or a bias alone."""

    pre_slope: float = 1.0
    post_slope: float = 1.0
    residual: bool = False
    mask: str = "x"  # where the backward takes the sign from: "x", or "y"
    statistics: str = "batch"  # "batch", "running", "none"
    pool: tuple[int, int, int] | None = None


class Inputs(NamedTuple):
    x: Tensor
    residual: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor


def nchw(t: Tensor) -> Tensor:
    return t.permute(0, 3, 1, 2)


def nhwc(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1)


def pooled(shape, pool):
    """(N, K, P', Q') of (N, K, P, Q)."""
    if pool is None:
        return shape
    window, stride, padding = pool
    return (*shape[:2], *((s + 2 * padding - window) // stride + 1 for s in shape[2:]))


def inputs(shape, dtype, case: Case) -> Inputs:
    """Random tensors for x of (N, K, P, Q); the channels' means are up to ten deviations off 0."""
    n, k, p, q = shape
    x = torch.randn(n, p, q, k) + torch.randn(k) * (4 if case.statistics == "batch" else 1)
    dy = torch.randn(nhwc(torch.empty(pooled(shape, case.pool), device="meta")).shape)
    parameters = torch.rand(k) + 0.5, torch.randn(k), torch.randn(k), torch.rand(k) + 0.5
    residual = torch.randn(n, p, q, k).to(dtype)
    return Inputs(x.to(dtype), residual, dy.to(dtype), *parameters)


def oracle(data: Inputs, case: Case, dtype) -> dict[str, Tensor]:
    """y, dx, dresidual, dweight, dbias, running statistics in `dtype` by fastcnn.ops.reference."""
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    x, residual = (nchw(t).to(dtype).detach().requires_grad_() for t in data[:2])
    weight, bias = (t.to(parameter, copy=True).requires_grad_() for t in data[3:5])
    mean, var = (t.to(parameter, copy=True) for t in data[5:])
    pool = () if case.pool is None else (case.pool,)
    added = residual if case.residual else None
    if case.statistics == "none":
        bias_act = reference.bias_act_pool if pool else reference.bias_act
        y = bias_act(x, bias, case.post_slope, *(pool or (added,)))
    else:
        bn_act = reference.bn_act_pool if pool else reference.bn_act
        training = case.statistics == "batch"
        slopes = case.pre_slope, case.post_slope
        settings = training, MOMENTUM, EPS, *slopes, *(pool or (added,))
        y = bn_act(x, weight, bias, mean, var, *settings)
    y.backward(nchw(data.dy).to(dtype))
    found = {"y": nhwc(y).detach(), "dx": nhwc(x.grad), "dbias": bias.grad}
    if case.residual:
        found["dresidual"] = nhwc(residual.grad)
    if case.statistics != "none":
        found["dweight"] = weight.grad
    if case.statistics == "batch":
        found |= {"running_mean": mean, "running_var": var}
    return found


class Chain:
    """Calls of the launchers, whose outputs and workspace hold NaN before and are fenced."""

    def __init__(self, kernels: ModuleType, misaligned: bool = False) -> None:
        self.kernels = kernels
        self.misaligned = misaligned
        self._fenced: list[tuple[Tensor, int, int]] = []

    def buffer(self, shape, dtype, fill: Tensor | None = None, workspace: bool = False) -> Tensor:
        """A fenced tensor of 0xff bytes, or of `fill`; off 16 bytes if the chain is misaligned."""
        size = dtype.itemsize * torch.Size(shape).numel()
        start = GUARD + (dtype.itemsize if self.misaligned and not workspace else 0)
        raw = torch.full((start + size + GUARD,), 0xFF, dtype=torch.uint8)
        self._fenced.append((raw, start, start + size))
        tensor = raw[start : start + size].view(dtype).view(shape)
        return tensor if fill is None else tensor.copy_(fill)

    def check_fences(self) -> None:
        for raw, start, end in self._fenced:
            assert (raw[:start] == 0xFF).all()
            assert (raw[end:] == 0xFF).all()

    def call(self, op: str, like: Tensor, /, **arguments) -> None:
        self.launch(op, like.dtype, sizes=tuple(like.shape), **arguments)

    def launch(self, op: str, dtype: torch.dtype, **arguments) -> None:
        plain = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        given = {k: v for k, v in plain.items() if v is not None}
        status = getattr(self.kernels, op)(dtype=str(dtype).removeprefix("torch."), **given)
        assert status == 0, f"{op}: cudaError {status}"

    def augment(self, images, labels, order, at, count, scale, bias, fill, *, dtype, **options):
        """The op with the arguments of fastcnn.ops.augment; its tensors are fenced as well."""
        _, height, width, _ = images.shape
        named = {"images": images, "labels": labels, "order": order, "at": at}
        named |= {"scale": scale, "bias": bias, "fill": fill}
        fenced = {
            name: self.buffer(t.shape, t.dtype, t, workspace=True) for name, t in named.items()
        }
        x = self.buffer((count, height, width, 3), dtype)
        y = self.buffer((count,), torch.int64, workspace=True)
        options["flip"] = reference_augment.FLIPS.index(options["flip"])
        sizes = {"count": count, "h": height, "w": width, "length": len(order)}
        pixels = {"bias_of_pixels": bias.dim() == 3}
        self.launch("augment", dtype, **fenced, **sizes, **pixels, **options, x=x, y=y)
        self.check_fences()
        return nchw(x), y

    def statistics(self, x: Tensor, data: Inputs, training: bool, pre_slope: float):
        """mean, rstd, running mean, running variance."""
        sizes = x.shape
        running = [self.buffer(t.shape, t.dtype, t) for t in data[5:]]
        mean, rstd = (self.buffer(t.shape, t.dtype) for t in data[5:])
        workspace = self.kernels.bn_stats_workspace(*sizes) if training else 0
        self.call(
            "bn_stats",
            x,
            x=x if training else None,
            training=training,
            momentum=MOMENTUM,
            eps=EPS,
            pre_slope=pre_slope,
            running_mean=running[0],
            running_var=running[1],
            mean=mean,
            rstd=rstd,
            workspace=self.buffer((workspace,), torch.uint8, workspace=True),
        )
        return mean, rstd, *running

    def run(
        self, data: Inputs, case: Case, wanted=("dresidual", "dweight", "dbias"), in_parts=False
    ):
        """Forward and backward; the same names as `oracle`, and code after a pool. in_parts: the
        backward as of several processes, the sums before the rest."""
        x, residual, dy = (self.buffer(t.shape, t.dtype, t) for t in data[:3])
        found: dict[str, Tensor] = {}
        affine = {"bias": data.bias}
        if case.statistics != "none":
            batch = case.statistics == "batch"
            mean, rstd, *running = self.statistics(x, data, batch, case.pre_slope)
            affine |= {"mean": mean, "rstd": rstd, "weight": data.weight}
            found |= {"mean": mean, "rstd": rstd}
            found |= dict(zip(("running_mean", "running_var"), running, strict=True))
        common = {**affine, "pre_slope": case.pre_slope, "post_slope": case.post_slope}
        y = found["y"] = self.buffer(dy.shape, x.dtype)
        outputs = {"dx": self.buffer(x.shape, x.dtype)}
        if "dbias" in wanted:
            outputs["dbias"] = self.buffer(data.bias.shape, data.bias.dtype)
        if "dweight" in wanted and case.statistics != "none":
            outputs["dweight"] = self.buffer(data.bias.shape, data.bias.dtype)
        batch_stats = case.statistics == "batch"
        workspace = self.kernels.bn_act_backward_workspace(*x.shape)
        common_backward = {
            **common,
            "dy": dy,
            "batch_stats": batch_stats,
            "workspace": self.buffer((workspace,), torch.uint8, workspace=True),
        }
        if case.pool is None:
            added = residual if case.residual else None
            self.call("bn_act", x, x=x, residual=added, y=y, **common)
            if case.residual and "dresidual" in wanted:
                outputs["dresidual"] = self.buffer(x.shape, x.dtype)
            # a layer without normalisation whose mask comes from y keeps no x
            needs_x = case.mask == "x" or case.statistics != "none"
            given = {"x": x if needs_x else None, "y": y if case.mask == "y" else None}
            self.backward("bn_act_backward", x, {**given, **common_backward}, outputs, in_parts)
        else:
            code = found["code"] = self.buffer(dy.shape, torch.uint8)
            pool = {"pool": case.pool, "code": code}
            self.call("bn_act_pool", x, x=x, y=y, **pool, **common)
            given = {"x": x if case.statistics != "none" else None}
            given |= pool | common_backward
            self.backward("bn_act_pool_backward", x, given, outputs, in_parts)
        self.check_fences()
        return found | outputs

    def backward(self, op: str, x: Tensor, given: dict, outputs: dict, in_parts: bool) -> None:
        if not in_parts:
            return self.call(op, x, **given, **outputs)
        sums = {name: outputs[name] for name in ("dweight", "dbias")}
        self.call(op, x, part="sums", **given, **sums)
        self.call(op, x, part="apply", **given | {"workspace": None}, **outputs)
