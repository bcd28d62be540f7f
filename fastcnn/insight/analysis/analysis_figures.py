"""PNG figures of a network's predictions as numbers: confusion matrix, F1 of the classes,
calibration."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastcnn.insight.analysis.calibration import Calibration
from fastcnn.insight.analysis.classes import ClassFigures, rates
from fastcnn.insight.drawing.figures import (
    FAINT,
    INK,
    NUMBERED_CLASSES,
    TRAIN,
    VAL,
    new_figure,
    plain,
    save,
    shortened,
)

BARS = 50  # classes with a bar each; of more the worst and the best are shown
ENDS = 10  # as many worst, as many best
RIGHT, WRONG = VAL, TRAIN


def draw_counts(path: Path, counts: np.ndarray, classes: Sequence[str]) -> Path:
    """Draw the confusion matrix (rows true) by numbers of images."""
    label = "images"
    return _draw_matrix(
        path, counts, classes, label, [[f"{n:,}" if n else "" for n in row] for row in counts]
    )


def draw_rates(path: Path, counts: np.ndarray, classes: Sequence[str]) -> Path:
    """Draw the confusion matrix (rows true) by shares of each true class, in percent."""
    shares = 100 * rates(counts)
    texts = [[_share(share) for share in row] for row in shares]
    return _draw_matrix(path, shares, classes, "% of the true class", texts)


def _share(percent: float) -> str:
    return "" if percent == 0 else "<1" if percent < 0.5 else f"{percent:.0f}"


def _draw_matrix(
    path: Path, values: np.ndarray, classes: Sequence[str], label: str, texts: list[list[str]]
) -> Path:
    """Up to NUMBERED_CLASSES classes with names and numbers. More with their positions at the axes,
    as in classes.csv, and colours by square roots, else single confusions of many are white."""
    from matplotlib.colors import PowerNorm

    numbered = len(classes) <= NUMBERED_CLASSES
    side = min(9.0, 3.0 + 0.5 * len(classes))
    figure, (axis,) = new_figure(1, 1, (side + 0.9, side))
    figure.set_layout_engine("compressed")  # the other one cuts the label of a square's axis
    top = max(1, values.max())
    norm = PowerNorm(1.0 if numbered else 0.5, vmin=0, vmax=top)
    image = axis.imshow(values, cmap="Blues", norm=norm, interpolation="nearest")
    figure.colorbar(image, ax=axis, fraction=0.046, label=label)
    axis.set_xlabel("predicted" if numbered else "predicted class, by its number in classes.csv")
    axis.set_ylabel("true" if numbered else "true class")
    if numbered:
        names = [plain(shortened(name)) for name in classes]
        axis.set_xticks(range(len(classes)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), names)
        for (row, column), value in np.ndenumerate(values):
            color = "white" if value > 0.55 * top else INK
            text = texts[row][column]
            axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    return save(figure, path)


def draw_f1(path: Path, figures: ClassFigures, classes: Sequence[str]) -> Path:
    """Draw a bar of F1 a class, the best on top, with marks for precision and recall; of more than
    BARS classes the ENDS best and the ENDS worst."""
    order = np.argsort(-figures.f1, kind="stable")
    panels = [("", order)]
    if len(order) > BARS:
        panels = [(f"{ENDS} best classes", order[:ENDS]), (f"{ENDS} worst", order[-ENDS:])]
    rows = max(len(part) for _, part in panels)
    figure, axes = new_figure(1, len(panels), (8.6, 1.1 + 0.27 * rows))
    for axis, (title, part) in zip(axes, panels, strict=True):
        axis.set_title(title, loc="left", fontsize=11, color=INK)
        _f1_bars(axis, figures, part, [plain(shortened(classes[i])) for i in part])
    keys, names = axes[0].get_legend_handles_labels()
    figure.legend(keys, names, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    return save(figure, path)


def _f1_bars(axis: Any, figures: ClassFigures, part: np.ndarray, names: list[str]) -> None:
    places = np.arange(len(part))
    axis.barh(places, figures.f1[part], color="#a9c4e4", height=0.72, label="F1")
    axis.plot(figures.precision[part], places, "D", color=TRAIN, markersize=4, label="precision")
    axis.plot(
        *(figures.recall[part], places, "o"), color=INK, markersize=5, mfc="none", label="recall"
    )
    for place, value in zip(places, figures.f1[part], strict=True):
        # beside the axes, where no mark can be
        axis.text(1.03, place, f"{value:.2f}", va="center", fontsize=8, color=INK)
    axis.set_yticks(places, names, fontsize=9)
    axis.set_ylim(len(part) - 0.4, -0.6)
    axis.set_xlim(0, 1.02)
    axis.set_xlabel("F1, precision, recall")
    axis.grid(color=FAINT, linewidth=0.6, axis="x")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def draw_reliability(path: Path, found: Calibration) -> Path:
    """Draw accuracy over confidence in bins, and below it how many images have which confidence."""
    figure, (above, below) = new_figure(2, 1, (5.6, 6.6))
    edges, filled = found.edges, found.counts > 0
    widths = np.diff(edges)[filled]
    left = edges[:-1][filled]
    accuracies, confidences = found.accuracies[filled], found.confidences[filled]
    bars = {"align": "edge", "edgecolor": "white", "linewidth": 0.6}
    above.bar(left, accuracies, widths, color="#a9c4e4", label="accuracy", **bars)
    low, gap = np.minimum(accuracies, confidences), np.abs(accuracies - confidences)
    above.bar(
        *(left, gap, widths, low),
        color="none",
        hatch="////",
        align="edge",
        edgecolor=TRAIN,
        linewidth=0.6,
        label="gap to mean confidence",
    )
    above.plot([0, 1], [0, 1], "--", color=INK, linewidth=1, label="perfectly calibrated")
    above.set_ylabel("accuracy")
    above.set_ylim(0, 1)
    shares = 100 * found.counts / found.counts.sum()
    below.bar(edges[:-1], shares, np.diff(edges), color="#c9cfd9", **bars)
    for value, name, color, style in (
        (found.accuracy, "accuracy", VAL, "-"),
        (found.confidence, "mean confidence", TRAIN, "--"),
    ):
        text = f"{name} {value:.1%}"
        below.axvline(value, color=color, linestyle=style, linewidth=1.6, label=text)
    below.set_ylabel("images, %")
    below.set_xlabel("confidence (probability of the predicted class)")
    for axis in (above, below):
        # above the axes, where no bar can be
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.3}
        axis.legend(frameon=False, fontsize=8, ncols=3, columnspacing=1.2, **place)
        axis.set_xlim(0, 1)
        axis.grid(color=FAINT, linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return save(figure, path)
