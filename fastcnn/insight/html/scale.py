"""Axes: which numbers stand beside one, and where a value lies on it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LARGEST = 1e100  # of what is drawn; beyond it lies what no axis can hold
FLAT = 1e-7  # relative spread below which values count as one


@dataclass(frozen=True)
class Scale:
    """low, high: the ends of an axis; ticks: values within them; log: base 10."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where `value` lies between low (0) and high (1)."""
        if self.log:
            return math.log10(value / self.low) / math.log10(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def drawable(value: float, log: bool = False) -> bool:
    """Whether an axis has a place for a value: finite, on a logarithmic one positive."""
    return math.isfinite(value) and abs(value) < LARGEST and (not log or value > 1 / LARGEST)


def linear(values: Sequence[float], zero: bool = False) -> Scale:
    """A scale from tick to tick around `values`; zero: from 0 on at the latest."""
    low, high = _spread([*values, 0.0] if zero else values)
    step = _step((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(k * step for k in range(first, last + 1))
    return Scale(ticks[0], ticks[-1], ticks)


def counted(values: Sequence[float]) -> Scale:
    """A scale of whole numbers, such as epochs, from the smallest to the largest."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        return Scale(low - 0.5, high + 0.5, (low,))
    step = max(1.0, _step((high - low) / 5))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return Scale(low, high, tuple(k * step for k in range(first, last + 1)))


def logarithmic(values: Sequence[float]) -> Scale:
    """A scale between 1, 2 or 5 times powers of ten around positive `values`."""
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    start, end = math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1
    steps = [m * 10.0**k for k in range(start, end + 1) for m in (1, 2, 5)]
    bottom = max(step for step in steps if step <= low * (1 + FLAT))
    top = min(step for step in steps if step >= high * (1 - FLAT) and step > bottom)
    within = [step for step in steps if bottom <= step <= top]
    if top / bottom > 100:
        within = [10.0**k for k in range(start, end + 1) if bottom <= 10.0**k <= top]
        within = within[:: math.ceil(len(within) / 6)]
    return Scale(bottom, top, tuple(within), log=True)


def _spread(values: Sequence[float]) -> tuple[float, float]:
    """Smallest and largest; moved apart where they are one."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    largest = max(abs(low), abs(high))
    if largest < 1 / LARGEST:
        return 0.0, 1.0
    if high - low > FLAT * largest:
        return low, high
    return low - largest / 2, high + largest / 2


def _step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * (1 - 1e-9))


def number(value: float) -> str:
    """A tick's text: 0.05, 1,000, 1e-5."""
    if value == 0 or 1e-4 <= abs(value) < 1e7:
        return f"{value:,.9g}"
    mantissa, exponent = f"{value:.3g}".split("e") if "e" in f"{value:.3g}" else (f"{value:g}", "")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa
