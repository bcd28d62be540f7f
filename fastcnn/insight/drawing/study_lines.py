"""Lines of several runs over their epochs: their mean, their band, their axes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastcnn.insight.drawing.figures import FAINT, INK, LOG_FROM, TOP5, TRAIN, VAL

PALETTE = (VAL, TRAIN, TOP5, "#8b4fb0", "#b8901c", "#14919b", "#c23b6b", "#6b7280")
DASHES = ("-", "--", ":", "-.")  # the next one each time the colours are used up
BAND = 0.18  # opacity

Measure = Literal["loss", "top1", "top5"]


@dataclass(frozen=True)
class Measured:
    """A panel's quantity: its title, its columns of metrics.csv, and what turns them into it."""

    title: str
    train: str | None
    val: str
    factor: float

    def shown(self, value: float) -> str:
        """Return a value (in the panel's unit) as text."""
        if not math.isfinite(value):
            return "not finite"
        if self.factor == 100:
            return f"{value:.1f}"
        return f"{value:.3f}" if 0.001 <= abs(value) < 100 else f"{value:.2g}"


MEASURES: Mapping[str, Measured] = {
    "loss": Measured("loss", "train_loss", "val_loss", 1),
    "top1": Measured("top-1, %", "train_top1", "val_top1", 100),
    "top5": Measured("top-5, %", None, "val_top5", 100),
}


@dataclass(frozen=True)
class Spread:
    """A column of several runs by epoch: mean, least and greatest of the runs that got there and
    are finite (nan where none is). lost: epoch and value before a run first was not finite.
    last: mean of the runs' last values, not finite where one of them is not.
    """

    epochs: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    lost: tuple[tuple[float, float], ...]
    last: float
    runs: int


def spread(
    histories: Iterable[Mapping[str, Sequence[float]]], column: str, factor: float = 1
) -> Spread | None:
    """Return a column of the runs that have it, times `factor`; None where no run does."""
    runs = [
        [(epoch, value * factor) for epoch, value in zip(h["epoch"], h[column], strict=True)]
        for h in histories
        if h.get(column)
    ]
    if not runs:
        return None
    found: dict[float, list[float]] = {}
    for run in runs:
        for epoch, value in run:
            found.setdefault(epoch, []).extend([value] if math.isfinite(value) else [])
    epochs = tuple(sorted(found))
    return Spread(
        epochs=epochs,
        mean=tuple(_over(found[epoch], _mean) for epoch in epochs),
        low=tuple(_over(found[epoch], min) for epoch in epochs),
        high=tuple(_over(found[epoch], max) for epoch in epochs),
        lost=tuple(point for run in runs if (point := _lost(run))),
        last=_mean([run[-1][1] for run in runs]),
        runs=len(runs),
    )


def _over(values: list[float], summary: Any) -> float:
    return float(summary(values)) if values else math.nan


def _mean(values: Sequence[float]) -> float:
    # divided before they are added, so that huge losses do not overflow
    return sum(value / len(values) for value in values)


def _lost(run: list[tuple[float, float]]) -> tuple[float, float] | None:
    for before, (_, value) in zip([None, *run], run, strict=False):
        if not math.isfinite(value):
            return before
    return None


def draw(axis: Any, found: Spread | None, color: str, band: float = BAND, **look: Any) -> None:
    """Draw the mean as a line, min to max as a band, an × where a run's values end."""
    if found is None:
        return
    marker = "o" if len(found.epochs) < 3 else None
    look = {"linewidth": 1.6, "markersize": 4} | look
    axis.plot(found.epochs, found.mean, color=color, marker=marker, **look)
    if found.runs > 1 and band:
        axis.fill_between(found.epochs, found.low, found.high, color=color, alpha=band, linewidth=0)
        if marker:  # a band from an epoch to itself has no area
            axis.vlines(found.epochs, found.low, found.high, color=color, alpha=2 * band)
    for epoch, value in found.lost:
        axis.plot([epoch], [value], "x", color=color, markersize=6, markeredgewidth=1.6)


def styles(count: int) -> list[tuple[str, str]]:
    """Return a colour and a dash pattern for each of `count` lines."""
    return [
        (PALETTE[i % len(PALETTE)], DASHES[i // len(PALETTE) % len(DASHES)]) for i in range(count)
    ]


def dress(axis: Any) -> None:
    """Give an axis over the epochs its grid and ticks, once its lines are drawn."""
    axis.grid(color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
    axis.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1, nbins=6)
    axis.yaxis.set_major_formatter("{x:g}")


def scale(axes: Sequence[Any], drawn: Iterable[Spread | None]) -> None:
    """Give losses that differ by more than LOG_FROM a logarithmic axis."""
    values = [
        value
        for found in drawn
        if found
        for value in (*found.low, *found.high)
        if math.isfinite(value)
    ]
    if values and min(values) > 0 and max(values) > LOG_FROM * min(values):
        from matplotlib import ticker

        decades = math.log10(max(values) / min(values))
        for axis in axes:
            axis.set_yscale("log")
            steps = (1, 2, 5) if decades < 2.5 else (1,)
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=steps, numticks=8))
            axis.yaxis.set_minor_locator(ticker.NullLocator())
            axis.yaxis.set_major_formatter("{x:g}")
