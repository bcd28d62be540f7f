"""Each layer of a network by itself: its product, the gradients of it, and what follows.

A product (convolution or linear layer) of torch is timed once; what follows it is timed under eager
torch and fused. The parts are timed in turn over inputs larger together than the cache; repeated
layers are measured once. Where a convolution may be fused with what is around it, its
implementations are compared as well (conv_layers.py).
"""

import math
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastcnn import ops
from fastcnn.archs import get_network
from fastcnn.bench.kernels.cases import Layer, backward_bytes, forward_bytes, function_of, layers_of
from fastcnn.bench.kernels.conv_layers import RIVALS, rows_of_convolutions
from fastcnn.bench.kernels.interleaved import WARMUP_ROUNDS, Turns, check
from fastcnn.bench.timing import Phases, Time, cache_bytes, ratios, sets_and_calls, spread
from fastcnn.ops import conv_autotune, reference

Row = dict[str, Any]
Seconds = dict[str, list[float]]  # a round each, by variant
PRODUCTS = ("product", "data gradient", "weight gradient")
CHAINS = ("chain forward", "chain backward")
TORCH = "torch"  # the variant of a product


def rows_of_network(
    name: str,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    rounds: int,
    limits: Mapping[str, float],
    rivals: tuple[str, ...] = RIVALS,
) -> list[Row]:
    """Measure every layer; a row for each part of each. limits: see Run.limits; rivals: of the
    fused convolutions."""
    layers = layers_of(get_network(name), batch)
    measured: dict[Any, tuple[dict[str, Seconds], dict[str, str]]] = {}
    rows, times = [], []
    for layer in layers:
        first = layer is layers[0]
        key = (layer.x, layer.weight, layer.stride, layer.padding, layer.case, first)
        if key not in measured:
            measured[key] = _measured(layer, first, dtype, device, rounds)
        parts, wrong = measured[key]
        for part, seconds in parts.items():
            row = {"network": name, "batch": batch, "layer": layer.name, "part": part, "n": rounds}
            rows.append(row | _figures(layer, part, seconds, dtype, limits))
            times.append(seconds)
        rows += [
            {"network": name, "batch": batch, "layer": layer.name, "backend": v, "why": why}
            for v, why in wrong.items()
        ]
    _add_shares([row for row in rows if "part" in row], times)
    if why := conv_autotune.why_vendor(device, dtype):
        convolutions = {layer.name for layer in layers if len(layer.x) == 4}
        for row in rows:
            if row["layer"] in convolutions and row.get("part") in PRODUCTS:
                row |= {"plan": list(conv_autotune.VENDOR), "plan_reason": why}
        return rows
    figures = partial(_figures_of_part, limits=limits)
    return rows + rows_of_convolutions(
        get_network(name), batch, dtype, device, rounds, figures, rivals
    )


def _measured(
    layer: Layer, first: bool, dtype: torch.dtype, device: torch.device, rounds: int
) -> tuple[dict[str, Seconds], dict[str, str]]:
    parts = _time_products(layer, first, dtype, device, rounds)
    if layer.case.does_nothing:
        return parts, {}
    variants = {
        "eager": function_of(layer.case, reference),
        "fused": function_of(layer.case, ops),
    }
    wrong = check(layer.case, variants, dtype, device)
    right = {n: f for n, f in variants.items() if n not in wrong}
    turns = Turns(layer.case, right, dtype, device)
    for _ in range(WARMUP_ROUNDS + rounds):
        turns()
    kept = {variant: found[-rounds:] for variant, found in turns.times.items()}
    parts["chain forward"] = {v: [t.forward for t in found] for v, found in kept.items()}
    parts["chain backward"] = {v: [t.backward for t in found] for v, found in kept.items()}
    return parts, wrong


def _time_products(
    layer: Layer, first: bool, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Seconds]:
    """Time the product and its gradients in turn; the first layer has no data gradient."""
    functions = products_of(layer)
    if first:
        del functions["data gradient"]
    largest = max(math.prod(layer.x), math.prod(layer.y)) * dtype.itemsize
    sets, calls = sets_and_calls(largest, device.type, cache_bytes(device))
    inputs = [_inputs(layer, dtype, device, seed) for seed in range(sets)]
    phases, at = Phases(device), 0
    found: dict[str, list[Time]] = {name: [] for name in functions}
    for _ in range(WARMUP_ROUNDS + rounds):
        for name, function in functions.items():
            picked = [inputs[(at + i) % sets] for i in range(calls)]
            at += calls
            call = partial(_call_all, function, picked)
            found[name].append(phases.time(call, lambda _: None, calls))
    return {name: {TORCH: [t.forward for t in found[name][-rounds:]]} for name in functions}


def _call_all(function: Callable[..., Any], picked: list[tuple[Tensor, ...]]) -> None:
    for tensors in picked:
        function(*tensors)


def _inputs(
    layer: Layer, dtype: torch.dtype, device: torch.device, seed: int
) -> tuple[Tensor, ...]:
    """x, weight and dy of a layer."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        values = torch.randn(*shape, generator=generator, device=device)
        return values.to(dtype, memory_format=form)

    return draw(layer.x), draw(layer.weight), draw(layer.y)


def products_of(layer: Layer) -> dict[str, Callable[[Tensor, Tensor, Tensor], Any]]:
    """Return the product and its two gradients as functions of x, weight and dy."""
    if len(layer.x) == 2:
        return {
            "product": lambda x, w, dy: x @ w.T,
            "data gradient": lambda x, w, dy: dy @ w,
            "weight gradient": lambda x, w, dy: dy.T @ x,
        }

    def gradient(x: Tensor, w: Tensor, dy: Tensor, wanted: list[bool]) -> Any:
        geometry = (layer.stride, layer.padding, (1, 1), False, (0, 0), 1)
        return torch.ops.aten.convolution_backward(dy, x, w, None, *geometry, wanted)

    return {
        "product": lambda x, w, dy: torch.conv2d(x, w, None, layer.stride, layer.padding),
        "data gradient": partial(gradient, wanted=[True, False, False]),
        "weight gradient": partial(gradient, wanted=[False, True, False]),
    }


def bytes_and_flop(layer: Layer, part: str, itemsize: int) -> tuple[int, int]:
    """Return what a part must move and compute for a batch."""
    if part == "chain forward":
        return forward_bytes(layer.case, itemsize), 0
    if part == "chain backward":
        return backward_bytes(layer.case, itemsize), 0
    values = math.prod(layer.x) + math.prod(layer.weight) + math.prod(layer.y)
    return values * itemsize, layer.flop


def _figures(
    layer: Layer, part: str, seconds: Seconds, dtype: torch.dtype, limits: Mapping[str, float]
) -> Row:
    return _figures_of_part(*bytes_and_flop(layer, part, dtype.itemsize), seconds, limits)


def _figures_of_part(moved: int, flop: int, seconds: Seconds, limits: Mapping[str, float]) -> Row:
    row: Row = {"bytes": moved, "flop": flop, "variants": {}}
    for variant, samples in seconds.items():
        figures: dict[str, Any] = {}
        if limits:  # of a GPU
            median = statistics.median(samples)
            floor = max(moved / limits["copy_bytes_per_s"], flop / limits["flop_per_s"])
            figures["time_us"] = spread(samples, 1e6)
            figures["gb_per_s"] = round(moved / median / 1e9, 1)
            figures["tflop_per_s"] = round(flop / median / 1e12, 2)
            figures["floor_share"] = round(floor / median, 4)
        row["variants"][variant] = figures
    rivals = [variant for variant in seconds if variant != "fused"]
    if "fused" in seconds and rivals:
        own = seconds["fused"]
        row["times_as_fast_as"] = {rival: ratios(seconds[rival], own) for rival in rivals}
    return row


def _add_shares(rows: list[Row], times: list[Seconds]) -> None:
    """Add each part's share of the sum of all, under eager and under fused."""
    for backend in ("eager", "fused"):
        found = [seconds.get(TORCH) or seconds.get(backend) for seconds in times]
        if None in found:  # a part that was refused: there is no sum
            continue
        medians = [statistics.median(samples) for samples in found if samples]
        for row, median in zip(rows, medians, strict=True):
            share = round(median / sum(medians), 4)
            row.setdefault("share_of_step", {})[backend] = share
