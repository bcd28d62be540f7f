"""The ops that follow a layer's product: variants of a call checked against fp64, timed in turn."""

import math
import zlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fastcnn.bench.kernels.cases import Case, Inputs, function_of, make_inputs
from fastcnn.bench.rivals.correctness import EAGER, errors_of, reason_of, wrong_ones
from fastcnn.bench.timing import Phases, Time, cache_bytes, sets_and_calls
from fastcnn.ops import reference
from fastcnn.ops.gpu_faults import require_alive

# mean error over mean value that a variant may have beyond twice eager's: some roundings, and a
# few windows and masks that fall the other way
SLACK = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}
WARMUP_ROUNDS = 3

Function = Callable[[dict[str, Tensor]], Tensor]


def results_of(function: Function, inputs: Inputs) -> dict[str, Tensor]:
    """Return the result, the running statistics after it and the gradients, by name."""
    inputs = inputs.copy()
    y = function(inputs.tensors)
    results = {"y": y.detach()}
    results |= {n: t for n, t in inputs.tensors.items() if n.startswith("running")}
    if wanted := inputs.differentiable:
        names = [n for n, t in inputs.tensors.items() if t.requires_grad]
        gradients = torch.autograd.grad(y, wanted, inputs.dy)
        results |= {f"d{n}": g for n, g in zip(names, gradients, strict=True)}
    return results


def check(
    case: Case, variants: dict[str, Function], dtype: torch.dtype, device: torch.device
) -> dict[str, str]:
    """Run every variant once against fp64; return those that failed or are wrong, and why."""
    inputs = make_inputs(case, dtype, device, zlib.crc32(str(case).encode()))
    truth = results_of(function_of(case, reference), inputs.to(torch.float64))
    errors, failed = {}, {}
    for name, function in variants.items():
        try:
            errors[name] = errors_of(results_of(function, inputs), truth)
        except Exception as error:  # a missing compiler, too little memory: the others go on
            require_alive(device, error, name)
            failed[name] = reason_of(error)
    return failed | (wrong_ones(errors, SLACK[dtype]) if EAGER in errors else {})


class Turns:
    """One round of every variant after the other, over input sets in turn."""

    def __init__(
        self,
        case: Case,
        variants: dict[str, Function],
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.case, self.variants = case, variants
        x_bytes, cache = math.prod(case.shape) * dtype.itemsize, cache_bytes(device)
        sets, self.calls = sets_and_calls(x_bytes, device.type, cache)
        self.sets = [make_inputs(case, dtype, device, seed) for seed in range(sets)]
        self.sets_over_cache = round(sets * x_bytes / cache, 2)
        self.phases = Phases(device)
        self.times: dict[str, list[Time]] = {name: [] for name in variants}
        self.held = True
        self._next = 0

    def __call__(self) -> None:
        for name, function in self.variants.items():
            picked = [self.sets[(self._next + i) % len(self.sets)] for i in range(self.calls)]
            self._next += self.calls
            forward = partial(self._forward, function, picked)
            backward = partial(self._backward, picked)
            self.times[name].append(self.phases.time(forward, backward, self.calls))
            self.held &= self.phases.held or len(self.times[name]) <= WARMUP_ROUNDS

    def _forward(self, function: Function, picked: list[Inputs]) -> list[Tensor]:
        with torch.set_grad_enabled(self.case.training):
            return [function(inputs.tensors) for inputs in picked]

    def _backward(self, picked: list[Inputs], results: list[Tensor]) -> None:
        if self.case.training:
            for inputs in picked:
                torch.autograd.grad(results.pop(0), inputs.differentiable, inputs.dy)
