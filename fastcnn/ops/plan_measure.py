"""How long a convolution layer takes from the vendor and fused, on random tensors of its shapes.

Each part of a layer (forward, gradient of the input, gradient of the filter) is called once with
every implementation, the results are compared, and only then are they timed, in turn. The vendor's
gradient of the filter is timed twice for a pending input: "vendor" has the input at hand, as after
the vendor's forward; "recomputed" makes it again, as it must after the fused one.

Sizes: x (N, C, H, W), filter (K, C, R, S), result (N, K, P, Q), channels-last.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ROUNDS = 7  # each of which times every implementation; medians are told
WARM_UP = 3
ROUND_S = 1e-3  # of calls that follow one another without a gap, at most MOST_CALLS of them
MOST_CALLS = 20
CYCLES_PER_S = 2e9  # of the GPU's clock, which is slower: the wait is longer
# Two ways to sum the same products differ by some roundings of the result; a wrong tap of a
# filter by a tenth and more. Norm of the difference over norm of the vendor's result, in roundings.
MOST_ROUNDINGS = 4
MOMENTUM, EPS, SLOPE = 0.1, 1e-5, 0.0

Call = Callable[[], Any]
Variants = dict[str, dict[str, Call]]  # by part and implementation
Times = dict[str, dict[str, float]]  # seconds a call, by part and implementation
Clock = Callable[[Call, int], float]  # seconds a call, of so many calls


class ConvLayer(NamedTuple):
    """What a measurement depends on beside the device and the library; see `plans.plan_for`."""

    dtype: torch.dtype
    n: int
    h: int
    w: int
    c: int
    k: int
    r: int
    s: int
    stride: int
    pads: tuple[int, int, int, int]  # top, bottom, left, right
    kind: str
    pending: bool
    training: bool
    wants_data_gradient: bool
    with_bias: bool

    def __str__(self) -> str:
        """All of it, in a line that is the same in every version of Python."""
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"{self.n}x{self.h}x{self.w}x{self.c} by {self.k}x{self.r}x{self.s}"
        words = [dtype, shape, f"stride {self.stride}", "pads " + ",".join(map(str, self.pads))]
        words += [self.kind, "training" if self.training else "evaluation"]
        words += ["pending"] * self.pending + ["bias"] * self.with_bias
        words += ["no data gradient"] * (not self.wants_data_gradient)
        return " ".join(words)

    @property
    def pixels(self) -> tuple[int, int]:
        """P, Q."""
        top, bottom, left, right = self.pads
        p = (self.h + top + bottom - self.r) // self.stride + 1
        return p, (self.w + left + right - self.s) // self.stride + 1

    @property
    def has_norm(self) -> bool:
        return self.kind == "bn"


@dataclass(frozen=True)
class Measured:
    """Seconds a call, or why there are none."""

    times: Times = field(default_factory=dict)
    note: str = ""


def measure(layer: ConvLayer, device: torch.device, clock: Clock | None = None) -> Measured:
    """Compare and time the implementations of a layer.

    The results of the fused kernels must be finite and those of the vendor up to roundings; a note
    says if they are not, if memory does not suffice, or if a kernel refuses the layer. All memory
    is given back, and torch's random generators stay as they are.
    """
    try:
        with _alone(device):
            return _measured(layer, device, clock or clock_of(device))
    except torch.OutOfMemoryError:
        return Measured(note="too little memory to measure it in")
    except RuntimeError as error:
        return Measured(note=f"cannot be measured: {str(error).splitlines()[0][:200]}")
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the tensors of one layer fit no other's


def _measured(layer: ConvLayer, device: torch.device, clock: Clock) -> Measured:
    variants = variants_of(layer, draw(layer, device))
    if reason := disagreement(variants, layer.dtype):
        return Measured(note=reason)
    return Measured(timed(variants, clock))


@contextmanager
def _alone(device: torch.device) -> Iterator[None]:
    """No gradient and no cast is made, and the vendor may choose its best algorithm."""
    cast = torch.autocast(device.type, enabled=False)
    algorithms = torch.backends.cudnn.flags(enabled=True, benchmark=True, deterministic=False)
    with torch.no_grad(), cast, algorithms:
        yield


# tensors


class Tensors(NamedTuple):
    """Of a layer. affine: mean, rstd, weight, bias of the pending input, (C,) or None."""

    x: Tensor
    filter: Tensor
    bias: Tensor
    dy: Tensor
    affine: tuple[Tensor | None, ...]
    running: tuple[Tensor, Tensor]


def draw(layer: ConvLayer, device: torch.device) -> Tensors:
    """Random tensors of a layer, from a generator of their own."""
    generator = torch.Generator(device).manual_seed(0)

    def image(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device)
        return values.to(layer.dtype, memory_format=torch.channels_last)

    def vector(size: int, mean: float, spread: float) -> Tensor:
        return mean + spread * torch.rand(size, generator=generator, device=device)

    def affine() -> tuple[Tensor | None, ...]:
        if not layer.pending:
            return (None,) * 4
        shift = vector(layer.c, -0.1, 0.2)
        if not layer.has_norm:
            return None, None, None, shift
        mean, rstd, weight = (vector(layer.c, low, 0.2) for low in (-0.1, 0.9, 0.9))
        return mean, rstd, weight, shift

    taps = layer.c * layer.r * layer.s
    return Tensors(
        image(layer.n, layer.c, layer.h, layer.w),
        image(layer.k, layer.c, layer.r, layer.s) / math.sqrt(taps),
        vector(layer.k, -0.1, 0.2),
        image(layer.n, layer.k, *layer.pixels),
        affine(),
        (torch.zeros(layer.k, device=device), torch.ones(layer.k, device=device)),
    )


# implementations


def variants_of(layer: ConvLayer, tensors: Tensors) -> Variants:
    """Return the calls that are compared, by part and implementation."""
    vendor, fused = Vendor(layer, tensors), Fused(layer, tensors)
    found: Variants = {"forward": {"vendor": vendor.forward, "fused": fused.forward}}
    if not layer.training:
        return found
    if layer.wants_data_gradient:
        found["data_gradient"] = {"vendor": vendor.data_gradient, "fused": fused.data_gradient}
    weight = {"vendor": vendor.weight_gradient, "fused": fused.weight_gradient}
    if layer.pending:
        weight["recomputed"] = vendor.weight_gradient_recomputed
    found["weight_gradient"] = weight
    return found


class Vendor:
    """The vendor's convolution and the ops before and behind it."""

    def __init__(self, layer: ConvLayer, tensors: Tensors):
        self.layer, self.t = layer, tensors
        self._input: Tensor | None = None  # of the product, made once

    def forward(self) -> tuple[Tensor, ...]:
        layer, t, ops = self.layer, self.t, torch.ops.fastcnn
        x, padding = self._padded(self._applied())
        bias = t.bias.to(layer.dtype) if layer.with_bias else None
        y = F.conv2d(x, t.filter, bias, layer.stride, padding)
        if layer.has_norm and layer.training:
            return (y, *ops.bn_stats(y, *t.running, True, MOMENTUM, EPS, 1.0))
        if layer.kind in ("bias-pool", "inference-pool"):
            return (ops.bias_act_pool(y, t.bias, SLOPE, 2, 2, 0)[0],)
        if layer.kind == "inference":
            return (ops.bias_act(y, t.bias, None, SLOPE),)
        return (y,)

    def data_gradient(self) -> tuple[Tensor, ...]:
        layer, t, ops = self.layer, self.t, torch.ops.fastcnn
        x, padding = self._padded(self._kept_input())
        dx = self._backward(x, padding, [True, False, False])[0]
        dx = dx[:, :, : layer.h, : layer.w].contiguous(memory_format=torch.channels_last)
        if not layer.pending:
            return (dx,)
        if layer.has_norm:
            mean, rstd, weight, bias = t.affine
            rest = (None, mean, rstd, weight, bias, True, 1.0, SLOPE)
            return tuple(ops.bn_act_backward(dx, t.x, *rest)[:3])
        dx, dbias = ops.bias_act_backward(dx, self._kept_input(), True, SLOPE)
        return dx, dbias

    def weight_gradient(self) -> tuple[Tensor, ...]:
        x, padding = self._padded(self._kept_input())
        return (self._backward(x, padding, [False, True, False])[1],)

    def weight_gradient_recomputed(self) -> tuple[Tensor, ...]:
        x, padding = self._padded(self._applied())
        return (self._backward(x, padding, [False, True, False])[1],)

    def _kept_input(self) -> Tensor:
        if self._input is None:
            self._input = self._applied()
        return self._input

    def _applied(self) -> Tensor:
        t, ops = self.t, torch.ops.fastcnn
        mean, rstd, weight, bias = t.affine
        if not self.layer.pending:
            return t.x
        if self.layer.has_norm:
            batch_stats = self.layer.training
            return ops.bn_act(t.x, mean, rstd, weight, bias, None, batch_stats, 1.0, SLOPE)
        return ops.bias_act(t.x, bias, None, SLOPE)

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """A convolution pads both sides alike; what is more at the end comes before it."""
        top, bottom, left, right = self.layer.pads
        extra = (0, right - left, 0, bottom - top)
        return (F.pad(x, extra) if any(extra) else x), (top, left)

    def _backward(self, x: Tensor, padding: tuple[int, int], wanted: list[bool]) -> Any:
        stride = (self.layer.stride, self.layer.stride)
        rest = (stride, padding, (1, 1), False, (0, 0), 1, wanted)
        return torch.ops.aten.convolution_backward(self.t.dy, x, self.t.filter, None, *rest)


class Fused:
    """This library's kernels."""

    def __init__(self, layer: ConvLayer, tensors: Tensors):
        self.layer, self.t = layer, tensors
        slopes = (1.0, SLOPE) if layer.pending else (1.0, 1.0)
        batch_stats = layer.pending and layer.has_norm and layer.training
        self.block = (*tensors.affine, batch_stats, *slopes)
        self.geometry = (layer.stride, list(layer.pads))

    def forward(self) -> tuple[Tensor, ...]:
        layer, t, ops = self.layer, self.t, torch.ops.fastcnn
        rest: tuple[Any, ...]
        if layer.kind in ("inference", "inference-pool"):
            rest = (None, None, None, 1.0, SLOPE, *self.geometry, layer.kind == "inference-pool")
            return (ops.conv_affine_act(t.x, t.filter, t.bias, *rest),)
        if layer.kind == "bias-pool":
            rest = (*self.block, SLOPE, *self.geometry, True, True)
            return (ops.conv_bias_act_pool(t.x, t.filter, t.bias, *rest)[0],)
        bias = t.bias if layer.with_bias else None
        statistics = layer.has_norm and layer.training
        rest = (*self.block, *self.geometry, 1.0 if statistics else None, True, True)
        y, partials = ops.conv(t.x, t.filter, bias, *rest)
        if not statistics:
            return (y,)
        count = y.numel() // layer.k
        return (y, *ops.bn_stats_merge(partials, count, *t.running, MOMENTUM, EPS))

    def data_gradient(self) -> tuple[Tensor, ...]:
        t, ops = self.t, torch.ops.fastcnn
        found = ops.conv_data_gradient(t.dy, t.filter, t.x, *self.block, *self.geometry)
        if not self.layer.pending:
            return (found[0],)
        return tuple(found) if self.layer.has_norm else (found[0], found[2])

    def weight_gradient(self) -> tuple[Tensor, ...]:
        t, layer, ops = self.t, self.layer, torch.ops.fastcnn
        rest = (*self.block, layer.r, layer.s, *self.geometry)
        return (ops.conv_weight_gradient(t.dy, t.x, *rest),)


# numerics


def disagreement(variants: Variants, dtype: torch.dtype) -> str:
    """Return in which part the fused results are not the vendor's, and by how much; "" if in none.

    Results are compared each by the norm of the difference over that of the vendor's; a mean, which
    may be nearly 0, with the 1 that is the deviation of the tensors.
    """
    bound = MOST_ROUNDINGS * torch.finfo(dtype).eps
    for part, calls in variants.items():
        expected, got = calls["vendor"](), calls["fused"]()
        for index, (a, b) in enumerate(zip(expected, got, strict=True)):
            error = _distance(a, b, at_least=part == "forward" and index == 1)
            if not error <= bound:  # a NaN is not
                return f"{part}: fused is off by {error:.2g}, more than {bound:.2g}"
    return ""


def _distance(expected: Tensor, got: Tensor, at_least: bool) -> float:
    if expected.shape != got.shape:
        return math.inf
    size = _norm(expected)
    if at_least:
        size = max(size, math.sqrt(expected.numel()))
    error = _norm(got - expected)
    return error / size if size else error


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.float32))


# timing


def timed(variants: Variants, clock: Clock) -> Times:
    """Return the median seconds of every implementation, timed in turn."""
    calls = {(part, name): f for part, found in variants.items() for name, f in found.items()}
    counts = {key: _calls_a_round(function, clock) for key, function in calls.items()}
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, function in calls.items():
            samples[key].append(clock(function, counts[key]))
    return {
        part: {name: statistics.median(samples[part, name]) for name in found}
        for part, found in variants.items()
    }


def _calls_a_round(function: Call, clock: Clock) -> int:
    for _ in range(WARM_UP - 1):
        function()
    once = clock(function, 1)
    return max(1, min(MOST_CALLS, math.ceil(ROUND_S / max(once, 1e-9))))


def clock_of(device: torch.device) -> Clock:
    return DeviceClock(device) if device.type == "cuda" else cpu_clock


def cpu_clock(function: Call, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


class DeviceClock:
    """Device events around calls that the device begins after all of them were launched, so that
    the host's own time is not in them."""

    def __init__(self, device: torch.device):
        self.device = device
        self._hold_s = 1e-3

    def __call__(self, function: Call, calls: int) -> float:
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(int(self._hold_s * CYCLES_PER_S))
            start = time.perf_counter()
            begin.record()
            for _ in range(calls):
                function()
            end.record()
            launched_s = time.perf_counter() - start
            torch.cuda.synchronize()
        # of the next round: the host is as slow then
        self._hold_s = min(max(self._hold_s, 1.5 * launched_s), 0.05)
        return begin.elapsed_time(end) / 1e3 / calls
