"""Cases of the public ops, and one way to run a case through any module that has them."""

from dataclasses import dataclass

import pytest
import torch
from conftest import POOLS, SHAPES

from fastcnn import ops

# not the defaults, which a kernel might have for constants
MOMENTUM, EPS = 0.3, 1e-3
SLOPES = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.01, 1.0), (0.2, 0.1)]

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
ON_EACH = [
    pytest.param(d, t, marks=[pytest.mark.cuda] if d == "cuda" else [], id=f"{d}-{str(t)[6:]}")
    for d, dtypes in ops.DTYPES.items()
    for t in dtypes
]
SAME_BITS = {"rtol": 0, "atol": 0, "equal_nan": True}


@dataclass(frozen=True)
class Case:
    """A call of the op that its fields make: with or without norm, residual, pool."""

    shape: tuple[int, ...]
    norm: bool = True
    training: bool = True
    residual: bool = False
    pool: tuple[int, int, int] | None = None
    pre_slope: float = 1.0
    post_slope: float = 0.0

    def __str__(self):
        words = ["x".join(map(str, self.shape)), f"{self.pre_slope:g}-{self.post_slope:g}"]
        words += ["bn" if self.norm else "bias"] + ["eval"] * (self.norm and not self.training)
        words += ["residual"] * self.residual
        words += ["pool" + "".join(map(str, self.pool))] if self.pool else []
        return "-".join(words)


def kinds(shape, pre_slope, post_slope):
    """Every op on one shape and pair of slopes, each pool that fits."""
    slopes = {"pre_slope": pre_slope, "post_slope": post_slope}
    bias_slopes = {"post_slope": post_slope}
    yield Case(shape, **slopes)
    yield Case(shape, residual=True, **slopes)
    yield Case(shape, training=False, residual=True, **slopes)
    yield Case(shape, training=False, **slopes)
    yield Case(shape, norm=False, **bias_slopes)
    yield Case(shape, norm=False, residual=True, **bias_slopes)
    for pool in POOLS:
        if len(shape) == 4 and min(shape[2:]) + 2 * pool[2] >= pool[0]:
            yield Case(shape, pool=pool, **slopes)
            yield Case(shape, pool=pool, training=False, **slopes)
            yield Case(shape, norm=False, pool=pool, **bias_slopes)


CASES = [case for shape in [*SHAPES, (5, 3), (7, 100)] for case in kinds(shape, 0.2, 0.1)]
CASES += [case for slopes in SLOPES for case in kinds((3, 32, 7, 5), *slopes)]
CASES = list(dict.fromkeys(CASES))  # a bias has no pre_slope


def wide(dtype):
    """The dtype of parameters beside activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors_of(case, dtype, device="cpu", seed=0):
    """x, residual, parameters, running statistics and dy by name, drawn in fp64 and rounded."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return drawn.to(device, dtype, memory_format=form)

    channels = case.shape[1]
    found = {"x": draw(*case.shape), "bias": draw(channels).to(wide(dtype))}
    if case.norm:
        found["weight"] = draw(channels).to(wide(dtype))
        found["running_mean"] = draw(channels).to(wide(dtype))
        found["running_var"] = draw(channels).to(wide(dtype)).abs() + 0.5
    if case.residual:
        found["residual"] = draw(*case.shape)
    found["dy"] = draw(*output_shape(case))
    return found


def output_shape(case):
    if case.pool is None:
        return case.shape
    window, stride, padding = case.pool
    pixels = [(size + 2 * padding - window) // stride + 1 for size in case.shape[2:]]
    return (*case.shape[:2], *pixels)


def call(module, case, t):
    """The op of `module` that the case describes, on tensors by name."""
    if not case.norm:
        if case.pool:
            return module.bias_act_pool(t["x"], t["bias"], case.post_slope, case.pool)
        return module.bias_act(t["x"], t["bias"], case.post_slope, t.get("residual"))
    arguments = [t[name] for name in ("x", "weight", "bias", "running_mean", "running_var")]
    rest = (case.training, MOMENTUM, EPS, case.pre_slope, case.post_slope)
    if case.pool:
        return module.bn_act_pool(*arguments, *rest, case.pool)
    return module.bn_act(*arguments, *rest, t.get("residual"))


def run(module, case, tensors, call=call):
    """Forward and backward on copies: y, the running statistics after it, and every gradient."""
    keep = torch.preserve_format
    t = {name: value.clone(memory_format=keep) for name, value in tensors.items()}
    differentiable = [n for n in ("x", "weight", "bias", "residual") if n in t]
    for name in differentiable:
        t[name].requires_grad_()
    y = call(module, case, t)
    y.backward(t["dy"])
    results = {"y": y.detach()} | {f"d{name}": t[name].grad for name in differentiable}
    return results | {n: t[n] for n in ("running_mean", "running_var") if n in t}
