"""Figures of a study, each as PNG and SVG: bars, curves, panels of variants, histograms.

Every function writes <folder>/<name>.png and .svg and returns both paths.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcnn.insight.drawing import study_lines as lines
from fastcnn.insight.drawing.figures import INK, TRAIN, VAL, new_figure
from fastcnn.insight.drawing.study_bars import Bar, draw_bars, draw_histogram
from fastcnn.insight.drawing.study_frame import (
    WIDE,
    Paths,
    add_legend,
    entitle,
    named,
    save_both,
    wrapped,
)
from fastcnn.insight.drawing.study_lines import MEASURES, Measure, Measured, Spread, spread

__all__ = [
    "Bar",
    "Curves",
    "draw_bars",
    "draw_curves",
    "draw_histogram",
    "draw_losses",
    "draw_panels",
]

TWO = (("training", TRAIN, "-"), ("validation", VAL, "-"))
Key = tuple[str, str, Any]  # text, colour, dash


@dataclass(frozen=True)
class Curves:
    """A variant's runs: each one's metrics.csv by column, fractions of 1, as long as they are."""

    label: str
    histories: tuple[Mapping[str, Sequence[float]], ...]


def draw_curves(
    folder: Path,
    name: str,
    title: str,
    series: Sequence[Curves],
    what: Sequence[Measure] = ("loss", "top1", "top5"),
) -> Paths:
    """Draw a panel for each of `what`. One variant: training and validation in two colours;
    several: a colour each, training thin and pale. Top-5 is measured in validation only."""
    figure, axes = new_figure(1, len(what), (max(4.6, WIDE / 3 * len(what)), 3.0))
    single = len(series) == 1
    thin: dict[str, Any] = {} if single else {"linewidth": 0.9, "alpha": 0.6, "band": 0}
    every: list[Spread | None] = []
    for axis, measure in zip(axes, what, strict=True):
        here: list[Spread | None] = []
        for one, (color, dash) in zip(series, lines.styles(len(series)), strict=True):
            train, val = _both(one, MEASURES[measure])
            lines.draw(axis, train, TRAIN if single else color, linestyle=dash, **thin)
            lines.draw(axis, val, VAL if single else color, linestyle=dash)
            here += [train, val]
        _dress(axis, MEASURES[measure].title)
        if measure == "loss":
            lines.scale([axis], here)
        every += here
    note = "" if single else "thick: validation, thin: training"
    _finish(figure, title, TWO if single else _keys(series), every, note)
    return save_both(figure, folder, name)


def draw_losses(folder: Path, name: str, title: str, series: Sequence[Curves]) -> Paths:
    """Draw the training losses of several variants in one axis."""
    figure, (axis,) = new_figure(1, 1, (WIDE, 4.0))
    drawn = [spread(one.histories, "train_loss") for one in series]
    for found, (color, dash) in zip(drawn, lines.styles(len(series)), strict=True):
        lines.draw(axis, found, color, linestyle=dash)
    _dress(axis, "training loss")
    lines.scale([axis], drawn)
    _finish(figure, title, _keys(series), drawn)
    return save_both(figure, folder, name)


def draw_panels(
    folder: Path, name: str, title: str, panels: Sequence[Curves], figure: Measure
) -> Paths:
    """Draw a small panel a variant, on shared axes: training and validation, last values above."""
    columns = _columns(len(panels))
    rows = -(-len(panels) // columns)
    drawing, axes = new_figure(rows, columns, (max(4.6, 2.15 * columns), 0.7 + 1.9 * rows))
    every: list[Spread | None] = []
    for axis, one in zip(axes, panels, strict=False):
        every += _draw_panel(axis, one, MEASURES[figure])
    for axis in axes[len(panels) :]:
        axis.remove()
    axes = axes[: len(panels)]
    if figure == "loss":
        lines.scale(axes, every)
    _share(axes, columns)
    note = f"{MEASURES[figure].title}, and its value after the last epoch"
    _finish(drawing, title, TWO, every, note)
    return save_both(drawing, folder, name)


def _draw_panel(axis: Any, one: Curves, measured: Measured) -> tuple[Spread | None, Spread | None]:
    pair = _both(one, measured)
    axis.set_title(wrapped(one.label, 26, 2), loc="left", fontsize=9, color=INK, pad=15)
    for found, color, place in zip(pair, (TRAIN, VAL), ("left", "right"), strict=True):
        lines.draw(axis, found, color)
        if found:
            axis.annotate(
                measured.shown(found.last),
                (0.0 if place == "left" else 1.0, 1.0),
                (0, 3),
                "axes fraction",
                "offset points",
                ha=place,
                fontsize=8.5,
                color=color,
            )
    lines.dress(axis)
    return pair


def _columns(count: int) -> int:
    for most, columns in ((4, count), (6, 3), (16, 4)):
        if count <= most:
            return columns
    return 5


def _share(axes: Sequence[Any], columns: int) -> None:
    """Give panels the same axes, with figures beside the outer ones alone."""
    for at, axis in enumerate(axes):
        if at:
            axis.sharex(axes[0])
            axis.sharey(axes[0])
    axes[0].autoscale()  # over all of them
    for at, axis in enumerate(axes):
        below = at + columns < len(axes)
        axis.tick_params(labelbottom=not below, labelleft=at % columns == 0)
        if not below:
            axis.set_xlabel("epoch", fontsize=8.5, color=INK)


def _both(one: Curves, measured: Measured) -> tuple[Spread | None, Spread | None]:
    train, val, factor = measured.train, measured.val, measured.factor
    return spread(one.histories, train, factor) if train else None, spread(
        one.histories, val, factor
    )


def _keys(series: Sequence[Curves]) -> list[Key]:
    styles = lines.styles(len(series))
    return [(one.label, *style) for one, style in zip(series, styles, strict=True)]


def _dress(axis: Any, title: str) -> None:
    lines.dress(axis)
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.set_xlabel("epoch", fontsize=9, color=INK)


def _finish(
    figure: Any, title: str, keys: Sequence[Key], drawn: Sequence[Spread | None], note: str = ""
) -> None:
    """Write title and legend, with what the marks mean that were drawn."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    found = [one for one in drawn if one]
    handles: list[Any] = [
        Line2D([], [], color=color, linestyle=dash, label=named(text)) for text, color, dash in keys
    ]
    if any(one.runs > 1 for one in found):
        label = "line: mean of the runs, band: min to max"
        handles.append(Patch(color=INK, alpha=lines.BAND, linewidth=0, label=label))
    if any(one.lost for one in found):
        look: dict[str, Any] = {"linestyle": "", "marker": "x", "color": INK, "markersize": 5}
        handles.append(Line2D([], [], label="a run's last finite value", **look))
    if note:
        handles.append(Line2D([], [], linestyle="", label=note))
    entitle(figure, title)
    add_legend(figure, handles)
