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

from fastcnn.ops.conv_library import POOL, Pending, gradients_of_pending, vendor_gradients
from fastcnn.ops.gpu_faults import require_alive
from fastcnn.ops.reference import product
from fastcnn.text import first_line

ROUNDS = 7  # each of which times every implementation; medians are told
LEAST_ROUNDS = 2  # on a CPU, of a layer whose rounds take longer than
ROUNDS_S = 0.2  # in all: a first step there is not to wait for long
WARM_UP = 3  # calls; on a CPU none, where nothing is tuned by them
ROUND_S = 1e-3  # of calls that follow one another without a gap, at most MOST_CALLS of them
MOST_CALLS = 20
CYCLES_PER_S = 2e9  # of the GPU's clock, which is slower: the wait is longer
# Two ways to sum the same products differ by some roundings of the result, those of F(4x4, 3x3) in
# fp32 by more (csrc/cpu/winograd.h); a wrong tap of a filter by a tenth and more. Norm of the
# difference over norm of the vendor's result.
MOST_ROUNDINGS = 4
BOUNDS = {torch.float32: 5e-5}  # else MOST_ROUNDINGS
MOMENTUM, EPS, SLOPE = 0.1, 1e-5, 0.0

Call = Callable[[], Any]
Variants = dict[str, dict[str, Call]]  # by part and implementation
Times = dict[str, dict[str, float]]  # seconds a call, by part and implementation
Clock = Callable[[Call, int], float]  # seconds a call, of so many calls


class ConvLayer(NamedTuple):
    """What a measurement depends on beside device and library; see `conv_autotune.plan_for`."""

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

    @property
    def adds_bias_itself(self) -> bool:
        """Whether the op behind the vendor's product adds the bias."""
        return self.kind not in ("bn", "bias")


@dataclass(frozen=True)
class Measured:
    """Seconds a call, or why there are none."""

    times: Times = field(default_factory=dict)
    note: str = ""


def measure(layer: ConvLayer, device: torch.device, clock: Clock | None = None) -> Measured:
    """Compare and time the implementations of a layer.

    The results of the fused kernels must be finite and those of the vendor up to roundings; a note
    says if they are not, if memory does not suffice, or if a kernel refuses the layer. All memory
    is given back, and torch's random generators stay as they are. Raises GpuError, which names the
    layer, where a kernel has failed in a way that costs the process its GPU.
    """
    measured = _tried(layer, device, clock or clock_of(device))
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the tensors of one layer fit no other's
    return measured


def _tried(layer: ConvLayer, device: torch.device, clock: Clock) -> Measured:
    try:
        with alone(device):
            return _measured(layer, device, clock)
    except torch.OutOfMemoryError:
        return Measured(note="too little memory to measure it in")
    except RuntimeError as error:
        require_alive(device, error, f"measuring convolution {layer}", "--conv vendor")
        return Measured(note=f"cannot be measured: {first_line(error)}")


def _measured(layer: ConvLayer, device: torch.device, clock: Clock) -> Measured:
    variants = variants_of(layer, draw(layer, device))
    if reason := disagreement(variants, layer.dtype):
        return Measured(note=reason)
    return Measured(timed(variants, clock))


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """No gradient and no cast is made, and the vendor may look for its best algorithm."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


# tensors


class Tensors(NamedTuple):
    """Of a layer: what it multiplies, and the gradient dy of its product. running: mean and
    variance of the norm behind it."""

    pending: Pending
    filter: Tensor
    bias: Tensor
    dy: Tensor
    running: tuple[Tensor, Tensor]


def draw(layer: ConvLayer, device: torch.device) -> Tensors:
    """Random tensors of a layer, from a generator of their own."""
    generator = torch.Generator(device).manual_seed(0)

    def image(*shape: int, deviation: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, device=device) * deviation
        return values.to(layer.dtype, memory_format=torch.channels_last)

    def vector(size: int, low: float) -> Tensor:
        return low + 0.2 * torch.rand(size, generator=generator, device=device)

    def pending() -> Pending:
        x = image(layer.n, layer.c, layer.h, layer.w)
        if not layer.pending:
            return Pending(x)
        bias = vector(layer.c, -0.1)
        if not layer.has_norm:
            return Pending(x, bias=bias, post_slope=SLOPE)
        mean, rstd, weight = (vector(layer.c, low) for low in (-0.1, 0.9, 0.9))
        return Pending(x, mean, rstd, weight, bias, layer.training, post_slope=SLOPE)

    taps = layer.c * layer.r * layer.s
    return Tensors(
        pending(),
        image(layer.k, layer.c, layer.r, layer.s, deviation=taps**-0.5),
        vector(layer.k, -0.1),
        image(layer.n, layer.k, *layer.pixels),
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
        self.geometry = (layer.stride, layer.pads)
        # what a vendor's forward has left for its gradients
        self._activated = tensors.pending.applied()

    def forward(self) -> tuple[Tensor, ...]:
        layer, t, ops = self.layer, self.t, torch.ops.fastcnn
        bias = t.bias.to(layer.dtype) if layer.with_bias and not layer.adds_bias_itself else None
        y = product(t.pending.applied(), t.filter, bias, *self.geometry)
        if layer.has_norm and layer.training:
            return (y, *ops.bn_stats(y, *t.running, True, MOMENTUM, EPS, 1.0))
        if layer.kind in ("bias-pool", "inference-pool"):
            return (ops.bias_act_pool(y, t.bias, SLOPE, *POOL)[0],)
        if layer.kind == "inference":
            return (ops.bias_act(y, t.bias, None, SLOPE),)
        return (y,)

    def data_gradient(self) -> tuple[Tensor, ...]:
        dz, _ = self._gradients(self._activated, (True, False))
        return gradients_of_pending(dz, self.t.pending, self._activated)

    def weight_gradient(self) -> tuple[Tensor, ...]:
        return (self._gradients(self._activated, (False, True))[1],)

    def weight_gradient_recomputed(self) -> tuple[Tensor, ...]:
        return (self._gradients(self.t.pending.applied(), (False, True))[1],)

    def _gradients(self, x: Tensor, wanted: tuple[bool, bool]) -> Any:
        return vendor_gradients(self.t.dy, x, self.t.filter, *self.geometry, wanted)


class Fused:
    """This library's kernels."""

    def __init__(self, layer: ConvLayer, tensors: Tensors):
        self.layer, self.t = layer, tensors
        self.geometry = (layer.stride, layer.pads)

    def forward(self) -> tuple[Tensor, ...]:
        layer, t, ops = self.layer, self.t, torch.ops.fastcnn
        x, *block = t.pending
        rest: tuple[Any, ...]
        if layer.kind in ("inference", "inference-pool"):
            rest = (None, None, None, 1.0, SLOPE, *self.geometry, layer.kind == "inference-pool")
            return (ops.conv_affine_act(x, t.filter, t.bias, *rest),)
        if layer.kind == "bias-pool":
            rest = (*block, SLOPE, *self.geometry, True, True)
            return (ops.conv_bias_act_pool(x, t.filter, t.bias, *rest)[0],)
        bias = t.bias if layer.with_bias else None
        statistics = layer.has_norm and layer.training
        rest = (*block, *self.geometry, 1.0 if statistics else None, True, True)
        y, partials = ops.conv(x, t.filter, bias, *rest)
        if not statistics:
            return (y,)
        count = y.numel() // layer.k
        return (y, *ops.bn_stats_merge(partials, count, *t.running, MOMENTUM, EPS))

    def data_gradient(self) -> tuple[Tensor, ...]:
        t = self.t
        given = (t.dy, t.filter, *t.pending, *self.geometry)
        return tuple(torch.ops.fastcnn.conv_data_gradient(*given))

    def weight_gradient(self) -> tuple[Tensor, ...]:
        t, sizes = self.t, (self.layer.r, self.layer.s)
        given = (t.dy, *t.pending, *sizes, *self.geometry)
        return (torch.ops.fastcnn.conv_weight_gradient(*given),)


# numerics


def disagreement(variants: Variants, dtype: torch.dtype) -> str:
    """Return in which part the fused results are not the vendor's, and by how much; "" if in none.

    Results are compared each by the norm of the difference over that of the vendor's; a mean, which
    may be nearly 0, with the 1 that is the deviation of the tensors.
    """
    bound = BOUNDS.get(dtype, MOST_ROUNDINGS * torch.finfo(dtype).eps)
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
    """Return the median seconds of every implementation; on a CPU the fewest, as there are few
    rounds and other programs only add to them."""
    on_cpu = clock is cpu_clock
    typical = min if on_cpu else statistics.median
    found = samples_of(variants, clock, ROUNDS, ROUNDS_S if on_cpu else math.inf)
    return {
        part: {name: typical(seconds) for name, seconds in samples.items()}
        for part, samples in found.items()
    }


def samples_of(
    variants: Variants, clock: Clock, rounds: int, limit_s: float = math.inf
) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of every implementation, timed in turn, a value a round.

    limit_s: after so many seconds LEAST_ROUNDS are enough.
    """
    calls = {(part, name): f for part, found in variants.items() for name, f in found.items()}
    counts = {key: _calls_a_round(function, clock) for key, function in calls.items()}
    samples: dict[str, dict[str, list[float]]]
    samples = {part: {name: [] for name in found} for part, found in variants.items()}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= LEAST_ROUNDS and time.perf_counter() - start > limit_s:
            break
        for key, function in calls.items():
            samples[key[0]][key[1]].append(clock(function, counts[key]))
    return samples


def _calls_a_round(function: Call, clock: Clock) -> int:
    for _ in range(0 if clock is cpu_clock else WARM_UP - 1):
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
