"""The convolution layers of a network in half precision: every implementation of each, and which
of them a run takes.

Three views of a layer:

    conv ...     what the plan of a layer rests on (ops.conv_autotune): the product with its
                 statistics or its pool, and its two gradients, from the vendor and fused; what is
                 pending of the input is applied by either. "recomputed": the vendor's gradient of
                 the filter behind a fused forward
    layer ...    the layer as a module, its input plain and its result applied: eager torch,
                 torch.compile, fastcnn with the vendor's convolution and with its own
    inference    without gradients: the layer as a module of eager torch and torch.compile, and
                 with batch norm folded into the filter: the vendor's convolution and an op for
                 bias, activation and pool; cuDNN's own convolution + bias + ReLU; fused

One set of inputs, as a plan is measured: those of a small batch stay in a GPU's cache.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcnn.archs.build import build
from fastcnn.archs.layers import ConvNormAct
from fastcnn.archs.spec import Network
from fastcnn.bench.kernels.interleaved import WARMUP_ROUNDS
from fastcnn.bench.rivals.correctness import reason_of
from fastcnn.bench.timing import Phases, sets_and_calls
from fastcnn.ops import conv_autotune
from fastcnn.ops.conv_autotune import Decision
from fastcnn.ops.conv_autotune import measurement as plan_measure
from fastcnn.ops.conv_autotune.measurement import ConvLayer, Tensors, Variants
from fastcnn.ops.conv_library import POOL
from fastcnn.ops.gpu_faults import require_alive
from fastcnn.ops.reference import split_pads
from fastcnn.train.numerics.half import half_network

Seconds = dict[str, list[float]]  # a round each, by variant
Wrong = dict[str, str]  # why a variant was not timed
PARTS = {
    "forward": "conv forward",
    "data_gradient": "conv data gradient",
    "weight_gradient": "conv weight gradient",
}
RIVALS = ("eager", "compile")
PLAIN = (*RIVALS, "cudnn")  # what is not ours; one that raises is named, and the others go on


class Met(NamedTuple):
    """A convolution layer as a network meets it in training and inference. x, residual: shapes."""

    name: str
    x: tuple[int, ...]
    residual: tuple[int, ...] | None
    training: ConvLayer
    inference: ConvLayer


def met_layers(network: Network, batch: int, dtype: torch.dtype) -> list[Met]:
    """Return the convolution layers of a network, in order, at its first image size."""
    training, inference = (_asked(network, batch, dtype, mode) for mode in (True, False))
    return [
        Met(name, x, residual, layer, inference[name][2])
        for name, (x, residual, layer) in training.items()
    ]


def _asked(
    network: Network, batch: int, dtype: torch.dtype, training: bool
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, ConvLayer]]:
    """What each layer asks a plan for, taken from a call of the network without memory."""
    found: dict[str, Any] = {}
    under_way: list[tuple[str, Any]] = []

    def plan_for(*arguments: Any) -> conv_autotune.Plan:
        layer = conv_autotune.layer_of(*arguments)._replace(dtype=dtype)
        name, shapes = under_way[-1]
        found[name] = (*shapes, layer)
        return conv_autotune.VENDOR

    def enter(name: str, _: nn.Module, given: tuple[Any, ...]) -> None:
        residual = given[1] if len(given) > 1 else None
        shape = None if residual is None else tuple(residual.shape)
        under_way.append((name, (tuple(given[0].shape), shape)))

    size = network.image_sizes[0]
    asking = mock.patch.object(conv_autotune, "plan_for", plan_for)
    deferring = mock.patch.object(conv_autotune, "may_defer", return_value=training)
    with asking, deferring, torch.device("meta"), torch.set_grad_enabled(training):
        model = build(network, size, network.classes, "fused").train(training)
        for name, module in model.named_modules():
            if isinstance(module, ConvNormAct):
                module.register_forward_pre_hook(partial(enter, name))
        model(torch.empty(batch, 3, size, size))
    return found


class Modules:
    """The layers of a network on a device, under plain torch and under this library's ops."""

    def __init__(self, network: Network, dtype: torch.dtype, device: torch.device):
        size = network.image_sizes[0]
        self.torch, self.own = (
            half_network(build(network, size, network.classes, name).to(device), dtype)[0]
            for name in ("torch", "fused")
        )
        for model in (self.torch, self.own):
            for module in model.modules():
                if isinstance(module, ConvNormAct):
                    module.defers = False

    def variants(self, name: str, rivals: tuple[str, ...]) -> dict[str, Callable[..., Tensor]]:
        """Return a layer as a function of x and, if it takes one, a residual."""
        plain, own = self.torch.get_submodule(name), self.own.get_submodule(name)
        calls: dict[str, Callable[..., Tensor]] = {}
        if "eager" in rivals:
            calls["eager"] = plain
        if "compile" in rivals:
            calls["compile"] = _compiled(plain)
        for mode in ("vendor", "fused"):
            calls[mode] = partial(_under, mode, own)
        return calls


def _compiled(module: nn.Module) -> Callable[..., Tensor]:
    """The module by torch.compile, made at the first call: what it raises is the call's."""

    @cache
    def made() -> Callable[..., Tensor]:
        torch._dynamo.reset()  # its limit of compilations is that of a module's code
        return torch.compile(module, dynamic=False)

    return lambda *given: made()(*given)


def _under(mode: conv_autotune.Mode, module: nn.Module, *given: Tensor) -> Tensor:
    with choosing(mode):
        return module(*given)


@contextmanager
def choosing(mode: conv_autotune.Mode) -> Iterator[None]:
    """Plans by another mode than the process has."""
    before = conv_autotune.mode()
    conv_autotune.set_mode(mode)
    try:
        yield
    finally:
        conv_autotune.set_mode(before)


def measured_parts(
    met: Met,
    modules: Modules,
    device: torch.device,
    rounds: int,
    rivals: tuple[str, ...] = RIVALS,
) -> tuple[dict[str, Seconds], dict[str, Decision], list[dict[str, str]]]:
    """Return the seconds of each part by variant, the decisions of training and inference, and what
    was not timed: a rival ("backend", in a "view") or a view as a whole ("backend"), and "why"."""
    decisions = {
        "training": conv_autotune.decision_for(met.training, device),
        "inference": conv_autotune.decision_for(met.inference, device),
    }
    parts: dict[str, Seconds] = {}
    wrong: list[dict[str, str]] = []
    for measuring in (_plan_parts, _module_parts, _inference_part):
        view = measuring.__name__.removeprefix("_")
        try:
            found, refused = measuring(met, modules, device, rounds, rivals)
        except Exception as error:  # too little memory, numbers that are off: the others go on
            require_alive(device, error, f"{met.name}, {view}")
            wrong.append({"backend": view, "why": reason_of(error)})
        else:
            parts |= found
            wrong += [{"backend": n, "view": view, "why": why} for n, why in refused.items()]
    return parts, decisions, wrong


def _refused(
    calls: dict[str, Callable[..., Any]], trial: Callable[[str], Any], device: torch.device
) -> Wrong:
    """Try each rival by itself; take those that raise out of the calls and return why."""
    wrong: Wrong = {}
    for name in [name for name in calls if name in PLAIN]:
        try:
            trial(name)
        except Exception as error:  # a missing compiler, a shape that is not taken
            require_alive(device, error, name)
            del calls[name]
            wrong[name] = reason_of(error)
    return wrong


def _plan_parts(
    met: Met, _: Modules, device: torch.device, rounds: int, __: tuple[str, ...]
) -> tuple[dict[str, Seconds], Wrong]:
    with plan_measure.alone(device):
        variants = plan_measure.variants_of(met.training, plan_measure.draw(met.training, device))
        _require_agreement(variants, met.training.dtype)
        found = plan_measure.samples_of(variants, plan_measure.clock_of(device), rounds)
    return {PARTS[part]: seconds for part, seconds in found.items()}, {}


def _require_agreement(variants: Variants, dtype: torch.dtype) -> None:
    if reason := plan_measure.disagreement(variants, dtype):
        raise ArithmeticError(reason)


def _module_parts(
    met: Met, modules: Modules, device: torch.device, rounds: int, rivals: tuple[str, ...]
) -> tuple[dict[str, Seconds], Wrong]:
    calls = modules.variants(met.name, rivals)
    given = _inputs(met, device)
    dy = torch.randn_like(calls["vendor"](*given))
    own = [t for t in given if t.requires_grad]
    wanted = {name: [*own, *_parameters(modules, met.name, name)] for name in calls}

    def trial(name: str) -> None:
        _backward(wanted[name], dy, _forward(calls[name], given, 1))

    wrong = _refused(calls, trial, device)
    per_round = sets_and_calls(max(t.nbytes for t in (*given, dy)), device.type, 1)[1]
    phases = Phases(device)
    found: dict[str, Seconds] = {"layer forward": {}, "layer backward": {}}
    for at in range(WARMUP_ROUNDS + rounds):
        for name, call in calls.items():
            forward = partial(_forward, call, given, per_round)
            time = phases.time(forward, partial(_backward, wanted[name], dy), per_round)
            if at >= WARMUP_ROUNDS:
                found["layer forward"].setdefault(name, []).append(time.forward)
                found["layer backward"].setdefault(name, []).append(time.backward)
    return found, wrong


def _parameters(modules: Modules, name: str, variant: str) -> list[nn.Parameter]:
    model = modules.torch if variant in RIVALS else modules.own
    return list(model.get_submodule(name).parameters())


def _forward(call: Callable[..., Tensor], given: list[Tensor], calls: int) -> list[Tensor]:
    return [call(*given) for _ in range(calls)]


def _backward(wanted: list[Tensor], dy: Tensor, results: list[Tensor]) -> None:
    while results:
        torch.autograd.grad(results.pop(0), wanted, dy)


def _inputs(met: Met, device: torch.device) -> list[Tensor]:
    """x, and the residual of a layer that takes one."""
    generator = torch.Generator(device).manual_seed(0)
    layer, found = met.training, []
    for shape in (met.x, met.residual):
        if shape is not None:
            values = torch.randn(*shape, generator=generator, device=device)
            found.append(values.to(layer.dtype, memory_format=torch.channels_last))
    found[0].requires_grad_(layer.wants_data_gradient)
    for residual in found[1:]:
        residual.requires_grad_()
    return found


def _inference_part(
    met: Met, modules: Modules, device: torch.device, rounds: int, rivals: tuple[str, ...]
) -> tuple[dict[str, Seconds], Wrong]:
    layer = met.inference
    with torch.no_grad(), plan_measure.alone(device):
        tensors = plan_measure.draw(layer, device)
        calls = plan_measure.variants_of(layer, tensors)["forward"]
        _require_agreement({"forward": calls}, layer.dtype)
        if device.type == "cuda":
            calls["cudnn"] = partial(_cudnn, layer, tensors)
        given = [t.detach() for t in _inputs(met, device)]
        for name, call in modules.variants(met.name, rivals).items():
            if name in rivals:
                calls[name] = partial(call, *given)
        models = (modules.torch, modules.own)
        for model in models:
            model.eval()
        try:
            wrong = _refused(calls, lambda name: calls[name](), device)
            clock = plan_measure.clock_of(device)
            found = plan_measure.samples_of({"inference": calls}, clock, rounds)
        finally:
            for model in models:
                model.train()
    return found, wrong


def _cudnn(layer: ConvLayer, t: Tensors) -> Tensor:
    """cuDNN's own fusion of convolution, bias and ReLU, and a pool by torch."""
    common, extra = split_pads(layer.pads)
    x = F.pad(t.pending.x, extra) if any(extra) else t.pending.x
    bias, both = t.bias.to(layer.dtype), [layer.stride] * 2
    y = torch.cudnn_convolution_relu(x, t.filter, bias, both, list(common), [1, 1], 1)
    return F.max_pool2d(y, POOL[0]) if layer.kind == "inference-pool" else y


def bytes_and_flop(met: Met, part: str) -> tuple[int, int]:
    """Return what a part must move and compute for a batch: every tensor that it takes or gives
    once, and the FLOP of its products. No statistics, which the product has at hand; backward of
    a layer: x, dy (twice behind a norm, whose sums come first), dx and both products."""
    layer = met.inference if part == "inference" else met.training
    p, q = layer.pixels
    x, y = layer.n * layer.h * layer.w * layer.c, layer.n * p * q * layer.k
    taps = layer.c * layer.r * layer.s * layer.k
    flop = 2 * layer.n * p * q * taps
    pooled = layer.n * (p // 2) * (q // 2) * layer.k
    result = pooled if layer.kind in ("bias-pool", "inference-pool") else y
    residual = math.prod(met.residual) if met.residual and part != PARTS["forward"] else 0
    products = 1 + layer.wants_data_gradient
    moved = {
        "conv forward": x + taps + result,
        "conv data gradient": y + taps + x * (1 + layer.pending),
        "conv weight gradient": y + taps + x,
        "layer forward": x + taps + residual + result + (y + y if layer.has_norm else 0),
        "layer backward": x * products + taps * products + y * (3 if layer.has_norm else 1),
        "inference": x + taps + residual + result,
    }[part]
    of_part = products if part == "layer backward" else 1
    return moved * layer.dtype.itemsize, flop * of_part


def rows_of_convolutions(
    network: Network,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    figures: Callable[[int, int, Seconds], Mapping[str, Any]],
    rivals: tuple[str, ...] = RIVALS,
) -> list[dict[str, Any]]:
    """Measure every convolution layer: a row for each part of each, with the plan of its kind.

    figures: of the bytes, the FLOP and the seconds of a part. Repeated layers are measured once.
    """
    modules = Modules(network, dtype, device)
    known: dict[Any, Any] = {}
    rows: list[dict[str, Any]] = []
    for met in met_layers(network, batch, dtype):
        key = (*met[1:], _kind_of(modules, met.name))
        if key not in known:
            known[key] = measured_parts(met, modules, device, rounds, rivals)
        parts, decisions, wrong = known[key]
        named = {"network": network.name, "batch": batch, "layer": met.name}
        for part, seconds in parts.items():
            decision = decisions["inference" if part == "inference" else "training"]
            row = {**named, "part": part, "n": rounds, **plan_entries(decision)}
            rows.append(row | dict(figures(*bytes_and_flop(met, part), seconds)))
        rows += [{**named, **one} for one in wrong]
    return rows


def _kind_of(modules: Modules, name: str) -> tuple[Any, ...]:
    """What of a layer its shapes do not say."""
    module: Any = modules.own.get_submodule(name)
    return module.norm is None, module.pre_slope, module.post_slope, module.pool


def plan_entries(decision: Decision) -> dict[str, Any]:
    """What a row says of the plan of its layer."""
    return {"plan": list(decision.plan), "plan_reason": decision.reason}
