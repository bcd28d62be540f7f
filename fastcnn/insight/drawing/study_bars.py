"""Bars of published and measured figures side by side, and histograms of two groups of values."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcnn.insight.drawing.figures import FAINT, INK, VAL, new_figure, plain
from fastcnn.insight.drawing.study_frame import (
    WIDE,
    Paths,
    add_legend,
    entitle,
    finite,
    named,
    save_both,
    wrapped,
)
from fastcnn.insight.drawing.study_lines import PALETTE

PUBLISHED, ABSENT = "#aab2c0", "#6b7484"
THICK = 0.36  # of a bar, where a group's place is 1
BINS = 40


@dataclass(frozen=True)
class Bar:
    """A group of a bar chart. ours: the mean; interval: its 95 % interval; points: single runs;
    published_range: least and greatest published. None leaves a bar's place empty."""

    label: str
    ours: float | None
    interval: tuple[float, float] | None = None
    points: tuple[float, ...] = ()
    published: float | None = None
    published_range: tuple[float, float] | None = None

    @property
    def is_published(self) -> bool:
        return finite(self.published) is not None or self.published_range is not None

    @property
    def top(self) -> float:
        given = (self.ours, self.published, *(self.interval or ()), *(self.published_range or ()))
        return max([v for v in (*given, *self.points) if finite(v) is not None], default=0.0)


def draw_bars(
    folder: Path, name: str, title: str, bars: Sequence[Bar], unit: str = "top-1, %"
) -> Paths:
    """Draw two bars a group, published above ours, from 0. Without anything published: ours."""
    compared = any(bar.is_published for bar in bars)
    shift = THICK / 2 + 0.02 if compared else 0.0
    height = 0.9 + len(bars) * (0.56 if compared else 0.36)
    figure, (axis,) = new_figure(1, 1, (WIDE, height))
    most = max((bar.top for bar in bars), default=0.0) or 1.0
    for at, bar in enumerate(bars):
        if compared:
            _draw_published(axis, at - shift, bar, most)
        _draw_ours(axis, at + shift, bar, most, THICK if compared else 0.6)
    axis.set_yticks(range(len(bars)), [wrapped(bar.label, 27, 2) for bar in bars], fontsize=9)
    axis.set_ylim(len(bars) - 0.45, -0.55)  # the first group on top
    axis.set_xlim(0, 1.1 * most)
    axis.set_xlabel(plain(unit), fontsize=9, color=INK)
    _dress(axis, "x")
    axis.tick_params(axis="y", length=0)
    entitle(figure, title)
    add_legend(figure, _bar_keys(bars, compared))
    return save_both(figure, folder, name)


def _draw_published(axis: Any, at: float, bar: Bar, most: float) -> None:
    if not bar.is_published:
        _write(axis, at, 0, most, "not published", ABSENT)
        return
    value, span = finite(bar.published), bar.published_range
    if value is not None:
        axis.barh(at, value, height=THICK, color=PUBLISHED)
    if span:
        _draw_whisker(axis, at, span)
    # as it is printed
    text = f"{value:g}" if value is not None else "–".join(f"{end:g}" for end in span or ())
    _write(axis, at, max(value or 0, *(span or (0, 0))), most, text)


def _draw_ours(axis: Any, at: float, bar: Bar, most: float, height: float) -> None:
    value = finite(bar.ours)
    if value is None:
        _write(axis, at, 0, most, "not run", ABSENT)
        return
    axis.barh(at, value, height=height, color=VAL)
    dots = [point for point in bar.points if math.isfinite(point)]
    # below the whisker, which would hide them
    places = [at + height / 4.5] * len(dots)
    axis.scatter(dots, places, s=10, color="white", edgecolor=INK, linewidth=0.7, zorder=4)
    if bar.interval:
        _draw_whisker(axis, at - height / 6, bar.interval)
    _write(axis, at, max(value, *(bar.interval or (0, 0)), *dots), most, _number(value))


def _draw_whisker(axis: Any, at: float, span: tuple[float, float]) -> None:
    middle, error = sum(span) / 2, abs(span[1] - span[0]) / 2
    axis.errorbar(middle, at, xerr=error, fmt="none", ecolor=INK, elinewidth=1.1, capsize=2.5)


def _write(axis: Any, at: float, end: float, most: float, text: str, color: str = INK) -> None:
    axis.text(end + 0.012 * most, at, text, va="center", fontsize=8.5, color=color)


def _number(value: float) -> str:
    return (
        f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if value < 1 else f"{value:.1f}"
    )


def _bar_keys(bars: Sequence[Bar], compared: bool) -> list[Any]:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys: list[Any] = []
    if compared:
        ranges = any(bar.published_range for bar in bars)
        keys.append(Patch(color=PUBLISHED, label="published" + ", line: range" * ranges))
    intervals = any(bar.interval for bar in bars)
    keys.append(Patch(color=VAL, label="ours" + ", line: 95 % interval" * intervals))
    if any(bar.points for bar in bars):
        dot: dict[str, Any] = {"markersize": 3.5, "mfc": "white", "mec": INK}
        keys.append(Line2D([], [], linestyle="", marker="o", label="single runs", **dot))
    return keys


def draw_histogram(
    folder: Path,
    name: str,
    title: str,
    groups: Mapping[str, Sequence[float]],
    threshold: float | None,
    unit: str = "score",
) -> Paths:
    """Draw each group's values as shares of that group, in the same bins, and the threshold."""
    kept = {label: [v for v in values if math.isfinite(v)] for label, values in groups.items()}
    everything = [value for values in kept.values() for value in values]
    figure, (axis,) = new_figure(1, 1, (WIDE, 3.8))
    cut = finite(threshold)
    edges = _edges(everything)
    keys: list[Any] = []
    for (label, values), color in zip(kept.items(), PALETTE, strict=False):
        share = [100 / max(1, len(values))] * len(values)
        look = {"histtype": "stepfilled", "facecolor": f"{color}55", "edgecolor": color}
        *_, (patch,) = axis.hist(values, edges, weights=share, linewidth=1.3, **look)
        patch.set_label(f"{named(label)}, n = {len(values):,}")
        keys.append(patch)
    if cut is not None:
        text = f"threshold {cut:.4g}"
        keys.append(axis.axvline(cut, color=INK, linestyle="--", linewidth=1.3, label=text))
    axis.set_xlabel(plain(unit), fontsize=9, color=INK)
    axis.set_ylabel("share of the group, %", fontsize=9, color=INK)
    _dress(axis, "y")
    entitle(figure, title)
    add_legend(figure, keys)
    return save_both(figure, folder, name)


def _edges(values: Sequence[float]) -> list[float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return [low + (high - low) * i / BINS for i in range(BINS)] + [high]


def _dress(axis: Any, grid: str) -> None:
    axis.grid(color=FAINT, linewidth=0.6, axis=grid)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
    axis.tick_params(axis="y", labelsize=9)
