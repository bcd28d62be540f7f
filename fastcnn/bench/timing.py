"""Timing on a CPU or a GPU, and what is told of it: medians, spreads, ratios."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}
# of the results that a round keeps from its forward to its backward phase, and of all input sets
ROUND_BYTES = {"cpu": 2**25, "cuda": 2**31}
SET_BYTES = {"cpu": 2**31, "cuda": 2**34}
MOST_CALLS = {"cpu": 8, "cuda": 24}  # a round; more launches than these fill the GPU's queue
MOST_SETS = 256
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}
# of the GPU's clock, a second: that of the fastest ones is below it
CYCLES_PER_S = 2e9


class Time(NamedTuple):
    """Seconds a call: forward, backward, and what the host took to launch both on a GPU."""

    forward: float
    backward: float
    host: float = 0.0

    @property
    def both(self) -> float:
        return self.forward + self.backward


class Phases:
    """Times a forward and a backward phase, each of several calls.

    On a GPU with device events, the device held back until everything is launched: the time is
    the device's own, without the gaps of an idle host. On a CPU with perf_counter.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._hold_s = 0.01
        self.held = True  # whether the last round was launched before the device began it

    def time(self, forward: Callable[[], Any], backward: Callable[[Any], Any], calls: int) -> Time:
        """forward's result is backward's argument; `calls` is what one of each stands for."""
        if self.device.type == "cpu":
            return _on_the_cpu(forward, backward, calls)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
        torch.cuda.synchronize()
        events[0].record()
        torch.cuda._sleep(int(self._hold_s * CYCLES_PER_S))
        start = time.perf_counter()
        events[1].record()
        results = forward()
        events[2].record()
        backward(results)
        events[3].record()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        self.held = events[0].elapsed_time(events[1]) / 1e3 >= host
        if not self.held:
            self._hold_s = min(2 * host, 0.2)
        spent = [events[i].elapsed_time(events[i + 1]) / 1e3 / calls for i in (1, 2)]
        return Time(spent[0], spent[1], host / calls)


def _on_the_cpu(forward: Callable[[], Any], backward: Callable[[Any], Any], calls: int) -> Time:
    start = time.perf_counter()
    results = forward()
    middle = time.perf_counter()
    backward(results)
    return Time((middle - start) / calls, (time.perf_counter() - middle) / calls)


def spread(samples: Sequence[float], scale: float = 1.0, digits: int = 4) -> dict[str, float]:
    """Median, smallest and largest, times `scale`, to so many significant digits."""
    found = (statistics.median(samples), min(samples), max(samples))
    rounded = (float(f"{scale * value:.{digits}g}") for value in found)
    return dict(zip(("median", "min", "max"), rounded, strict=True))


def ratios(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times as fast: the ratio of the medians, and the extremes of the single rounds,
    whose two times were taken one after the other."""
    rounds = [a / b for a, b in zip(slow, fast, strict=True)]
    found = spread(rounds)
    found["median"] = float(f"{statistics.median(slow) / statistics.median(fast):.4g}")
    return found


def copy_bandwidth(device: torch.device, rounds: int = 9) -> float:
    """Bytes/s of a large copy in this device's memory, read + write counted, median."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    phases = Phases(device)
    times = [
        phases.time(lambda: target.copy_(source), lambda _: None, 1).forward
        for _ in range(rounds + 2)
    ]
    return 2 * source.nbytes / statistics.median(times[2:])


def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int = 9) -> float:
    """FLOP/s of a large dense matrix product in `dtype`, 2 a multiply-add, median."""
    side = MATMUL_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    phases, result = Phases(device), torch.empty_like(a)
    times = [
        phases.time(lambda: torch.mm(a, b, out=result), lambda _: None, 1).forward
        for _ in range(rounds + 2)
    ]
    return 2 * side**3 / statistics.median(times[2:])


def sets_and_calls(x_bytes: int, device: str, cache: int) -> tuple[int, int]:
    """Return the number of input sets and of calls a round; x_bytes: of an input.

    There are at least three sets, and enough for the inputs of all to be four times as large as the
    cache, as far as memory goes and up to MOST_SETS. A round calls often enough to be long, and no
    more often than memory and the launch queue take.
    """
    most = max(3, SET_BYTES[device] // (3 * x_bytes))
    sets = min(max(3, math.ceil(4 * cache / x_bytes)), most, MOST_SETS)
    calls = min(max(1, ROUND_BYTES[device] // (5 * x_bytes)), MOST_CALLS[device])
    return sets, calls


def cache_bytes(device: torch.device) -> int:
    """Bytes of the last cache before memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    sizes = {"K": 2**10, "M": 2**20}
    try:
        text = path.read_text().strip()
        return int(text[:-1]) * sizes[text[-1]]
    except (OSError, ValueError, KeyError):
        return 32 * 2**20
