"""Timing on a CPU or a GPU, and what is told of it: medians, spreads, ratios."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

COPY_BYTES = {"cuda": 2**31, "cpu": 2**28}
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
        return Time(*spent, host / calls)


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
