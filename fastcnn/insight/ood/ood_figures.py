"""Figures of out-of-distribution detection: a score's histogram, AUROC over the layers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcnn.insight.drawing.figures import FAINT, INK, TOP5, TRAIN, VAL, new_figure
from fastcnn.insight.drawing.study_bars import draw_histogram
from fastcnn.insight.drawing.study_frame import WIDE, Paths, add_legend, entitle, save_both
from fastcnn.insight.ood.ood import Detection, Result
from fastcnn.insight.ood.ood_scores import ENERGY, PROBABILITY, called

BASELINES = {PROBABILITY: (TRAIN, "--"), ENERGY: (TOP5, "-.")}
CHANCE = 50.0  # %
ROOM = 9  # names of layers side by side; more are turned


def draw_scores(folder: Path, name: str, result: Result) -> Paths:
    """Draw the histogram of the score shown, of both sets, with its threshold."""
    shown = result.shown
    inside, outside = (one.name for one in result.sets[1:])
    groups = {
        f"in distribution: {inside}": result.held_in.by_name()[shown].tolist(),
        f"out of distribution: {outside}": result.held_out.by_name()[shown].tolist(),
    }
    title = f"{called(shown)}: {inside} and {outside}"
    return draw_histogram(folder, name, title, groups, result.rows[shown].threshold, called(shown))


def draw_layers(folder: Path, name: str, title: str, rows: Mapping[str, Detection]) -> Paths:
    """Draw the AUROC of each layer's mean activation in forward order, the baselines as lines."""
    layers = [layer for layer in rows if layer not in BASELINES]
    auroc = {score: 100 * row.auroc for score, row in rows.items()}
    figure, (axis,) = new_figure(1, 1, (WIDE, 4.0))
    places, heights = range(len(layers)), [auroc[layer] for layer in layers]
    keys = axis.plot(places, heights, "o-", color=VAL, markersize=5, label="mean activation")
    for score, (color, dashes) in BASELINES.items():
        label = f"{score}, {auroc[score]:.1f}%"
        keys.append(axis.axhline(auroc[score], color=color, linestyle=dashes, label=label))
    keys.append(axis.axhline(CHANCE, color=INK, linestyle=":", linewidth=1, label="chance"))
    for place, height in zip(places, heights, strict=True):
        _write(axis, place, height)
    turned = {"rotation": 45, "ha": "right"} if len(layers) > ROOM else {}
    axis.set_xticks(places, layers, fontsize=8.5, **turned)
    axis.set_xlim(-0.5, len(layers) - 0.5)
    low = min(CHANCE, *auroc.values())
    axis.set_ylim(max(-2.0, low - 8), 105)
    axis.set_ylabel("AUROC, %", fontsize=9, color=INK)
    axis.set_xlabel("activation, in forward order", fontsize=9, color=INK)
    axis.grid(color=FAINT, linewidth=0.6, axis="y")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8.5, color=FAINT, labelcolor=INK)
    entitle(figure, title)
    add_legend(figure, keys)
    return save_both(figure, folder, name)


def _write(axis: Any, place: float, height: float) -> None:
    offset, side = ((0, 6), "bottom") if height < 97 else ((0, -7), "top")
    axis.annotate(
        f"{height:.1f}",
        (place, height),
        offset,
        textcoords="offset points",
        ha="center",
        va=side,
        fontsize=8,
        color=INK,
        # a line may pass behind it
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
    )
