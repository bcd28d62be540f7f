"""Which implementation a convolution layer gets: the vendor's convolution with the ops that follow
it, or the fused convolution of this library.

Which of them is faster depends on the machine, the shapes and the libraries. So a layer is measured
the first time that it is met (plan_measure.py), and what was found is kept in memory and in the
cache folder (plan_cache.py), for this GPU or this CPU and number of threads, this library and this
torch. The kernels are half precision's on a GPU, and on the CPU those of 3x3 filters with stride 1
in fp32 and fp64; other layers are the vendor's without being measured. So is every layer in torch's
deterministic mode: a choice by timings can differ between two runs, and with it their bits. And so
is, unless `--conv fused` asks for the kernels, every layer in fp64, which is for checks, and every
layer on a GPU until the kernels have passed on one (MEASURED_ON_GPU).
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fastcnn.cache import cache_dir
from fastcnn.errors import DataError
from fastcnn.ops.conv_autotune import plan_cache
from fastcnn.ops.conv_autotune.measurement import ConvLayer, Measured, Times, measure
from fastcnn.ops.conv_library import Pads
from fastcnn.ops.loading import load
from fastcnn.ops.native.toolchain import cpu_name

log = logging.getLogger(__name__)

Choice = Literal["vendor", "fused"]
Mode = Literal["auto", "fused", "vendor"]
Kind = Literal["bn", "bias", "bias-pool", "inference", "inference-pool"]
MODES: tuple[Mode, ...] = ("auto", "fused", "vendor")
HALVES = (torch.bfloat16, torch.float16)
DTYPES = {"cpu": (torch.float32, torch.float64), "cuda": HALVES}  # of the fused kernels
OLDEST_GPU = (8, 0)  # compute capability; the kernels' matrix instructions
# Whether `auto` measures, and so runs, the fused kernels on a GPU. Make it True in the commit that
# adds the JSON of a gpu_check that has passed to benchmarks/results. A first measurement on a
# machine then belongs in a child process: an illegal access costs a process its GPU
# (gpu_faults.py), and what fails in a child is the vendor's while the run goes on.
MEASURED_ON_GPU = False
MARGIN = 0.03  # of the vendor's time that fused must save, lest noise decides


class Plan(NamedTuple):
    """Who computes what of a convolution. forward "vendor": everything is the vendor's."""

    forward: Choice
    data_gradient: Choice
    weight_gradient: Choice


VENDOR = Plan("vendor", "vendor", "vendor")
FUSED = Plan("fused", "fused", "fused")


@dataclass(frozen=True)
class Decision:
    """A plan, the seconds that it rests on by part and implementation, and why it is so."""

    plan: Plan
    times: Times = field(default_factory=dict)
    reason: str = "measured"


_mode: Mode = "auto"


def set_mode(new: Mode) -> None:
    """Decide for this process: "auto" by measurement, "fused" wherever there are such kernels,
    "vendor" nowhere. Raises ValueError for another word."""
    global _mode
    if new not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {new!r}")
    _mode = new


def mode() -> Mode:
    """Return what `set_mode` has set."""
    return _mode


def why_vendor(device: torch.device, dtype: torch.dtype) -> str:
    """Return why no layer on this device and in this dtype can be fused; "" if one can.

    The library must be loaded.
    """
    if device.type not in DTYPES:
        return f"no kernels: {device.type}"
    if dtype not in DTYPES[device.type]:
        takes = "half precision's" if device.type == "cuda" else "float32's on the CPU"
        return f"{str(dtype).removeprefix('torch.')}: the fused kernels are {takes}"
    if device.type == "cpu":
        return ""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("fastcnn::conv", "CUDA"):
        return "the native library has no CUDA kernels; `fastcnn doctor` says why"
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST_GPU:
        return f"compute capability {capability[0]}.{capability[1]}: the fused kernels need 8.0"
    return ""


def _why_vendor_layer(layer: ConvLayer, device: torch.device) -> str:
    """Why there are no fused kernels for a layer; "" if there are."""
    if reason := why_vendor(device, layer.dtype):
        return reason
    filters = (layer.k, layer.c, layer.r, layer.s)
    if not _takes(device, filters, layer.stride, layer.pads):
        return "the CPU's fused kernels are those of 3x3 filters with stride 1"
    return ""


def _ruled(device: torch.device) -> Decision | None:
    """The decision for every layer on a device that can be fused, where there is one without
    measuring."""
    if _mode == "fused":
        return Decision(FUSED, reason="--conv fused")
    if _mode == "vendor":
        return Decision(VENDOR, reason="--conv vendor")
    if torch.are_deterministic_algorithms_enabled():
        return Decision(VENDOR, reason="deterministic mode: nothing is chosen by timings")
    if not _measures(device):
        return Decision(VENDOR, reason="not yet proven on a GPU; --conv fused takes the library's")
    return None


def _measures(device: torch.device) -> bool:
    """Whether `auto` measures layers on a device."""
    return device.type != "cuda" or MEASURED_ON_GPU


def may_defer(x: Tensor) -> bool:
    """Whether a layer may leave its normalisation and activation of x to the next convolution."""
    if not _can_be_fused(x):
        return False
    # in plain words, which torch.compile can trace
    if _mode != "auto":
        return _mode == "fused"
    measured = _measures(x.device) and x.dtype != torch.float64
    return measured and not torch.are_deterministic_algorithms_enabled()


def plan_for(
    x: Tensor,
    filters: Tensor,
    stride: int,
    pads: tuple[int, int, int, int],
    kind: Kind,
    pending: bool,
    training: bool,
    wants_data_gradient: bool = True,
    with_bias: bool = False,
) -> Plan:
    """Return who computes a convolution layer.

    x: (N, C, H, W), of a pending input the tensor in it; filters: (K, C, R, S); neither is read.
    pads: top, bottom, left, right, in pixels.
    kind: what follows the product: "bn" statistics (and then an op that is the same under every
    plan), "bias" nothing or such an op, "bias-pool" bias, activation and 2x2 pool in the product's
    own kernel; "inference", "inference-pool": `conv_affine_act` without or with its pool.
    pending: the input is still to be normalised or activated. training: gradients are wanted, and
    statistics are the batch's. wants_data_gradient: not for images. with_bias: the convolution adds
    a bias itself.

    Nothing is measured while torch.compile traces or a CUDA graph is captured: what is not known by
    then is the vendor's.
    """
    if not _can_be_fused(x) or not _takes(x.device, filters.shape, stride, pads):
        return VENDOR
    asked = (stride, pads, kind, pending, training, wants_data_gradient, with_bias)
    if torch.compiler.is_compiling():
        return _plan_while_tracing(x, filters, asked)
    plan = decision_for(layer_of(x, filters, *asked), x.device).plan
    for taken in _noting:
        taken.append(plan)
    return plan


def layer_of(
    x: Tensor,
    filters: Tensor,
    stride: int,
    pads: tuple[int, int, int, int],
    kind: Kind,
    pending: bool,
    training: bool,
    wants_data_gradient: bool,
    with_bias: bool,
) -> ConvLayer:
    """Return what is measured for the arguments of `plan_for`."""
    n, c, h, w = x.shape
    k, _, r, s = filters.shape
    # for inference what is pending is applied first, whoever goes on
    pending = pending and kind in ("bn", "bias", "bias-pool")
    sizes = (n, h, w, c, k, r, s)
    return ConvLayer(
        x.dtype, *sizes, stride, pads, kind, pending, training, wants_data_gradient, with_bias
    )


def _can_be_fused(x: Tensor) -> bool:
    # in this order: the first two answer for nearly all that cannot, and cost nothing
    device = x.device.type
    if device not in DTYPES or x.dtype not in DTYPES[device] or x.dim() != 4 or not x.numel():
        return False
    return _has_kernels(x.device, x.dtype)


def _takes(device: torch.device, filters: Sequence[int], stride: int, pads: Pads) -> bool:
    """Whether a device's kernels take filters of this shape (K, C, R, S)."""
    if device.type == "cuda":
        return True
    return tuple(filters[2:]) == (3, 3) and stride == 1 and max(pads) <= 2


@torch.compiler.assume_constant_result
def _has_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    return not why_vendor(device, dtype)


def _plan_while_tracing(x: Tensor, filters: Tensor, asked: tuple[Any, ...]) -> Plan:
    # read here, so that compiled code is guarded by it
    if _mode != "auto":
        return FUSED if _mode == "fused" else VENDOR
    # a size may be a symbol, which a comparison turns into a number
    known = _known_sizes(x.device)
    n, h, w = (next((k for k in known if k == x.size(dim)), 0) for dim in (0, 2, 3))
    if not n * h * w:
        return VENDOR
    k, c, r, s = filters.shape
    return Plan(*_known_plan(x.device, x.dtype, n, h, w, c, k, r, s, *asked))


@torch.compiler.assume_constant_result
def _known_sizes(device: torch.device) -> tuple[int, ...]:
    return tuple(sorted(_planner_of(device).sizes()))


@torch.compiler.assume_constant_result
def _known_plan(device: torch.device, *layer: Any) -> tuple[str, ...]:
    return tuple(decision_for(ConvLayer(*layer), device, may_measure=False).plan)


def decision_for(layer: ConvLayer, device: torch.device, may_measure: bool = True) -> Decision:
    """Return the decision on a layer, measured now if it is not known and that can be done.

    The library must be loaded.
    """
    if reason := _why_vendor_layer(layer, device):
        return Decision(VENDOR, reason=reason)
    if ruled := _ruled(device):
        return ruled
    if layer.dtype == torch.float64:
        return Decision(VENDOR, reason="float64: not measured; --conv fused takes the library's")
    planner = _planner_of(device)
    known = planner.known(layer)
    if known is None and may_measure and not _is_capturing(device):
        known = planner.decide(layer)
    return known or Decision(VENDOR, reason="not measured: traced or captured first")


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


# what was measured


class Planner:
    """The decisions on the layers of one device; path: their file, None for memory alone."""

    def __init__(
        self,
        device: torch.device,
        path: Path | None,
        key: Mapping[str, Any],
        measuring: Callable[[ConvLayer, torch.device], Measured] = measure,
    ):
        self.device, self.path, self.key = device, path, key
        self._measuring = measuring
        self._decisions: dict[ConvLayer, Decision] = {}

    def known(self, layer: ConvLayer) -> Decision | None:
        """The decision on a layer if it was ever made, in this process or another."""
        if layer not in self._decisions and self.path:
            # read again each time: another process may have added to it
            entry = plan_cache.read(self.path).get(str(layer))
            if entry and (times := _times_of(entry, layer)):
                self._decisions[layer] = Decision(plan_of(times), times)
        return self._decisions.get(layer)

    def sizes(self) -> set[int]:
        """Batch sizes, heights and widths of which a layer is known."""
        layers = [(layer.n, layer.h, layer.w) for layer in self._decisions]
        if self.path:
            entries = plan_cache.read(self.path).values()
            layers += [entry["sizes"] for entry in entries if _are_sizes(entry.get("sizes"))]
        return {size for sizes in layers for size in sizes}

    def decide(self, layer: ConvLayer) -> Decision:
        """Measure a layer and keep what comes of it; not on disk if it could not be measured."""
        _say_once()
        measured = self._measuring(layer, self.device)
        # all processes go by what the first of them has measured
        if decision := self.known(layer):
            return decision
        if measured.note:
            log.warning("convolution %s: %s; it is the vendor's", layer, measured.note)
            decision = Decision(VENDOR, reason=measured.note)
        else:
            decision = Decision(plan_of(measured.times), measured.times)
            self._write(layer, decision)
        self._decisions[layer] = decision
        return decision

    def _write(self, layer: ConvLayer, decision: Decision) -> None:
        if self.path:
            entry = {
                "sizes": [layer.n, layer.h, layer.w],
                "times": decision.times,
                "plan": list(decision.plan),
            }
            written = plan_cache.add(self.path, self.key, {str(layer): entry})
            self.path = self.path if written else None


def plan_of(times: Mapping[str, Mapping[str, float]]) -> Plan:
    """Return the fastest plan: all from the vendor, or fused with each gradient by whoever is
    faster behind it. Fused must save MARGIN of the vendor's time.

    times: seconds by part and implementation, as `plan_measure.measure` has them.
    """
    choices: dict[str, Choice] = {"data_gradient": "vendor", "weight_gradient": "vendor"}
    fused = times["forward"]["fused"]
    for part in choices.keys() & times.keys():
        vendor = times[part].get("recomputed", times[part]["vendor"])
        choices[part] = "fused" if times[part]["fused"] < vendor else "vendor"
        fused += min(times[part]["fused"], vendor)
    if fused > (1 - MARGIN) * sum(part["vendor"] for part in times.values()):
        return VENDOR
    return Plan("fused", **choices)


def _times_of(entry: Mapping[str, Any], layer: ConvLayer) -> Times:
    """The seconds in an entry of a file; {} if it is not what `plan_of` needs for this layer."""
    times = entry.get("times")
    parts = {"forward", *["weight_gradient"] * layer.training}
    parts |= {"data_gradient"} if layer.training and layer.wants_data_gradient else set()
    if not isinstance(times, dict) or times.keys() != parts:
        return {}
    recomputed = "weight_gradient" if layer.training and layer.pending else ""
    for part, found in times.items():
        needed = {"vendor", "fused", *["recomputed"] * (part == recomputed)}
        if not isinstance(found, dict) or not needed <= found.keys():
            return {}
        if not all(isinstance(value, float) and value > 0 for value in found.values()):
            return {}
    return times


def _are_sizes(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(size, int) for size in found)


_planners: dict[tuple[torch.device, int], Planner] = {}


def _planner_of(device: torch.device) -> Planner:
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    if (device, threads) not in _planners:
        key = _machine(device, threads) | {
            # the folder of a build is named after all that it was made from
            "library": load().path.parent.name,
            "torch": torch.__version__,
        }
        try:
            path = plan_cache.file_of(cache_dir(), key)
        except DataError as error:
            log.warning("%s; convolutions are measured in each run", error)
            path = None
        _planners[device, threads] = Planner(device, path, key)
    return _planners[device, threads]


def _machine(device: torch.device, threads: int) -> dict[str, Any]:
    if device.type == "cpu":
        return {"device": cpu_name(), "threads": threads}
    name = torch.cuda.get_device_name(device)
    return {"device": name, "cudnn": torch.backends.cudnn.version()}


# what a run is told


_said = False


def _say_once() -> None:
    global _said
    if not _said:
        log.info("convolutions: measuring layers on this machine, once for each shape")
    _said = True


_noting: list[list[Plan]] = []


@contextmanager
def noted() -> Iterator[list[Plan]]:
    """The plans that `plan_for` returns for fusable layers while the block runs, in order."""
    taken: list[Plan] = []
    _noting.append(taken)
    try:
        yield taken
    finally:
        _noting.remove(taken)


def summary(taken: list[Plan], device: torch.device) -> str:
    """Return a line on the plans of a network's layers on a device; "" if there are none."""
    if not taken:
        return ""
    ruled = _ruled(device)
    why = ruled.reason if ruled else "measured; `fastcnn bench --layers` shows why"
    fused = sum(plan.forward == "fused" for plan in taken)
    return f"convolutions: {fused} of {len(taken)} fused ({why})"
