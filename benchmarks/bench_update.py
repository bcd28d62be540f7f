"""The updates of whole networks: the fused kernel, torch's fused optimisers, plain torch.

    pytest benchmarks/bench_update.py --benchmark-enable

A case is a network, a rule and what goes with it: "fp32" weights and gradients alone, "half" with
half-precision gradients and copies of the weights, "half+average" with a running average as well.
Every variant does the whole of it. Torch's fused optimisers take gradients in the weights' dtype:
what they lack (gradients widened, copies, average) they are given as foreach operations. Each
variant has tensors of its own; one step of each is compared before they are timed, in turn. On a
GPU the table tells device times, bytes/s and the share of the device's copy bandwidth; on a CPU
ratios and shares alone. Bytes are those that must move, each array read and written once.

Options: FASTCNN_BENCH_DEVICE, NETWORKS (vgg16 unless given), ROUNDS (at least 7, 15 unless given),
THREADS, QUICK (1: the networks' SGD in fp32 alone, 7 rounds), JSON (the file to write).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from report import Report, option, switched_on
from torch import Tensor

from fastcnn import ops
from fastcnn.archs import get_network
from fastcnn.archs.build import build
from fastcnn.bench.environment import environment
from fastcnn.bench.timing import Phases, cache_bytes, copy_bandwidth, ratios, spread
from fastcnn.ops import reference

DEVICE = torch.device(option("DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
QUICK = switched_on("QUICK", False)
ROUNDS = max(7, int(option("ROUNDS", "7" if QUICK else "15")))
WARMUP_ROUNDS = 3
HALF = torch.bfloat16
LR, DECAY, RATE = 1e-6, 5e-4, 1e-3  # so small that the weights stay as they are
SGD = {"momentum": 0.9, "nesterov": True, "decoupled": False}
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "decoupled": True}
MOST_ERROR = 1e-6  # of a weight, over its network's largest


@dataclass(frozen=True)
class Case:
    network: str
    rule: str = "sgd"
    half: bool = False
    average: bool = False

    def __str__(self) -> str:
        words = ("half" if self.half else "fp32") + "+average" * self.average
        return f"{self.network}-{self.rule}-{words}"

    def bytes_of(self, values: int) -> int:
        """Bytes that must move for so many parameters: states, gradient, copy, average."""
        state = 16 if self.rule == "sgd" else 24
        return values * (state + (2 + 2 if self.half else 4) + 8 * self.average)


def chosen_cases() -> list[Case]:
    networks = option("NETWORKS", "vgg16").split(",")
    if QUICK:
        return [Case(name) for name in networks]
    kinds = [(False, False), (True, False), (True, True)]
    return [Case(n, rule, *kind) for n in networks for rule in ("sgd", "adamw") for kind in kinds]


def shapes_of(name: str) -> list[tuple[int, ...]]:
    network = get_network(name)
    with torch.device("meta"):
        model = build(network, network.image_sizes[0], network.classes, "torch")
    return [tuple(p.shape) for p in model.parameters()]


class State:
    """Tensors of one variant, the same for all of a case: weights, gradients, moments, …"""

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        shapes = shapes_of(case.network)
        self.case = case
        self.params = [self._draw(shape, device) for shape in shapes]
        grads = [self._draw(shape, device) * 0.01 for shape in shapes]
        self.grads = [g.to(HALF) if case.half else g for g in grads]
        self.first = [torch.zeros_like(p) for p in self.params]
        self.second = [torch.zeros_like(p) for p in self.params] if case.rule != "sgd" else []
        self.copies = [p.to(HALF) for p in self.params] if case.half else []
        self.averages = [p.clone() for p in self.params] if case.average else []
        self.rates = torch.tensor([LR, RATE], device=device)
        self.steps = torch.tensor(1.0, device=device)

    def _draw(self, shape: tuple[int, ...], device: torch.device) -> Tensor:
        drawn = torch.randn(shape, device=device) * 0.05
        return drawn.to(memory_format=torch.channels_last) if len(shape) == 4 else drawn

    @property
    def values(self) -> int:
        return sum(p.numel() for p in self.params)

    def update(self, module: Any) -> Callable[[], None]:
        """A step of `module`'s sgd_ or adam_."""
        rest = (self.copies, self.averages, self.rates)
        if self.case.rule == "sgd":
            arguments = (self.params, self.grads, self.first, *rest)
            return partial(module.sgd_, *arguments, decay=DECAY, **SGD)
        moments = (self.first, self.second)
        arguments = (self.params, self.grads, *moments, *rest, self.steps)
        return partial(module.adam_, *arguments, decay=DECAY, **ADAM)

    def torchs(self) -> Callable[[], None]:
        """A step of torch's fused optimiser, and what it lacks."""
        masters = [torch.empty_like(p) if self.case.half else g for p, g in self._pairs()]
        for param, grad in zip(self.params, masters, strict=True):
            param.requires_grad_().grad = grad
        common: dict[str, Any] = {"lr": LR, "weight_decay": DECAY, "fused": True}
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(self.params, momentum=0.9, nesterov=True, **common)
            if self.case.rule == "sgd"
            else torch.optim.AdamW(self.params, **common)
        )

        @torch.no_grad()
        def step() -> None:
            if self.case.half:
                torch._foreach_copy_(masters, self.grads)
            optimizer.step()
            if self.copies:
                torch._foreach_copy_(self.copies, self.params)
            if self.averages:
                torch._foreach_lerp_(self.averages, self.params, RATE)

        return step

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.params, self.grads, strict=True))


def variants_of(case: Case, device: torch.device) -> dict[str, tuple[State, Callable[[], None]]]:
    """Return each variant's tensors and step, in the order in which they take turns."""
    fused, torchs, plain = (State(case, device) for _ in range(3))
    return {
        "fused": (fused, fused.update(ops)),
        "torch": (torchs, torchs.torchs()),
        "foreach": (plain, plain.update(reference)),
    }


def wrong_ones(variants: dict[str, tuple[State, Callable[[], None]]]) -> dict[str, str]:
    """Take a step of each; return those whose weights, copies or averages are not plain torch's."""
    for _, step in variants.values():
        step()
    wrong = {}
    truth = variants["foreach"][0]
    for name, (state, _) in variants.items():
        for what in ("params", "averages", "copies"):
            for got, true in zip(getattr(state, what), getattr(truth, what), strict=True):
                error = ((got.double() - true.double()).abs().max() / true.abs().max()).item()
                allowed = MOST_ERROR if what != "copies" else 2**-8
                if not error <= allowed:  # a NaN is not
                    wrong[name] = f"{what} differ by {error:.3g}, allowed is {allowed:.3g}"
    return wrong


class Turns:
    """One round of every variant after the other; `seconds` and `held` by variant."""

    def __init__(self, steps: dict[str, Callable[[], None]], calls: int):
        self.steps, self.calls, self.phases = steps, calls, Phases(DEVICE)
        self.seconds: dict[str, list[float]] = {name: [] for name in steps}
        self.held = True

    def __call__(self) -> None:
        for name, step in self.steps.items():
            time = self.phases.time(partial(self._repeat, step), lambda _: None, self.calls)
            self.seconds[name].append(time.forward)
            self.held &= self.phases.held or len(self.seconds[name]) <= WARMUP_ROUNDS

    def _repeat(self, step: Callable[[], None]) -> None:
        for _ in range(self.calls):
            step()


def row_of(
    case: Case, values: int, seconds: dict[str, list[float]], copy: float, absolute: bool
) -> dict[str, Any]:
    """Return medians and extremes. copy: bytes/s; absolute: whether times may be told (GPU)."""
    moved = case.bytes_of(values)
    row: dict[str, Any] = {"case": str(case), "bytes": moved, "variants": {}}
    for name, samples in seconds.items():
        rate = moved / spread(samples, digits=9)["median"]
        figures: dict[str, Any] = {"share_of_copy": round(rate / copy, 3)}
        if absolute:
            figures |= {"time_us": spread(samples, 1e6), "gb_per_s": round(rate / 1e9, 1)}
        row["variants"][name] = figures
    rivals = [name for name in seconds if name != "fused" and "fused" in seconds]
    row["times_as_fast_as"] = {r: ratios(seconds[r], seconds["fused"]) for r in rivals}
    return row


def table(content: dict[str, Any]) -> list[str]:
    """Return a line for each row."""
    gpu = content["machine"]["gpu"]
    lines = [
        f"{gpu or content['machine']['cpu']}, torch {content['torch']}, commit "
        f"{content['commit']}, {content['date']}; {content['rounds']} rounds; x: how many times "
        "as fast as, the ratio of medians (extremes of the rounds)"
    ]
    for row in content["rows"]:
        words = f"{row['case']:<28}"
        if fused := row["variants"].get("fused"):
            if gpu:
                words += f"{fused['time_us']['median']:>9.1f} us {fused['gb_per_s']:>7,.0f} GB/s"
            words += f"{fused['share_of_copy']:>8.0%} of copy"
        for rival, r in row["times_as_fast_as"].items():
            words += f"  x {rival} {r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"
        lines.append(words)
    return lines + [f"not timed: {one}" for one in content["refused"]]


@pytest.fixture(scope="module")
def copy_rate():
    """Bytes/s of a large copy."""
    if option("THREADS"):
        torch.set_num_threads(int(option("THREADS")))
    return copy_bandwidth(DEVICE)


@pytest.fixture(scope="module")
def report(request, copy_rate):
    content = {**environment(DEVICE), "rounds": ROUNDS, "library_sources": ops.load().sources}
    content["copy_gb_per_s"] = round(copy_rate / 1e9, 1) if DEVICE.type == "cuda" else None
    found = Report("bench_update", content | {"rows": [], "refused": []}, table)
    request.config.pluginmanager.register(found)
    return found


@pytest.mark.parametrize("case", chosen_cases(), ids=str)
def test_update(benchmark, report, copy_rate, case):
    variants = variants_of(case, DEVICE)
    wrong = wrong_ones(variants)
    values = variants["fused"][0].values
    steps = {name: step for name, (_, step) in variants.items() if name not in wrong}
    # a small network's tensors stay in the cache, from step to step as between its backward and it
    turns = Turns(steps, calls=4 if DEVICE.type == "cuda" else 1)
    benchmark.pedantic(turns, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    if benchmark.stats is not None:
        seconds = {name: found[-ROUNDS:] for name, found in turns.seconds.items()}
        row = row_of(case, values, seconds, copy_rate, DEVICE.type == "cuda")
        row |= {"parameters": values, "launched_ahead": turns.held}
        row["bytes_over_cache"] = round(row["bytes"] / cache_bytes(DEVICE), 2)
        benchmark.extra_info["row"] = row
        report.add("rows", row)
    report.add("refused", *[f"{case}: {name}: {why}" for name, why in wrong.items()])
    assert not wrong, wrong
