"""PNG figures of a data set: images of every class, and samples with the names of their classes."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from fastcnn.insight.drawing import figures

SPLIT_COLORS = {"train": figures.TRAIN, "val": figures.TOP5, "test": figures.VAL}
NAMED_CLASSES = 200  # more bars than this leave no room for their names
PANEL_CLASSES = 50  # of the named bars, one below the other
COLUMNS = 10  # of the grid of samples
SHOWN = 18  # characters of a class name above a sample


def draw_histogram(folder: Path, name: str, classes: dict[str, dict[str, int]]) -> Path:
    """Draw classes.png: images by class and split, from {class: {split: images}}.

    Up to NAMED_CLASSES classes have a named bar each; more are sorted by their images.
    """
    names = list(classes)
    splits = list(next(iter(classes.values())))
    counts = {split: np.array([classes[n][split] for n in names]) for split in splits}
    if len(names) > NAMED_CLASSES:
        figure, axes = figures.new_figure(1, 1, (10, 4.2))
        _sorted_steps(axes[0], names, counts)
    else:
        panels = math.ceil(len(names) / PANEL_CLASSES)
        longest = min(len(names), PANEL_CLASSES)
        width = 8.0 if panels == 1 else 4.5 * panels
        figure, axes = figures.new_figure(1, panels, (width, 1.4 + 0.22 * longest))
        most = np.sum(list(counts.values()), axis=0).max() * 1.05
        for start, axis in zip(range(0, len(names), PANEL_CLASSES), axes, strict=True):
            part = slice(start, start + PANEL_CLASSES)
            _named_bars(axis, names[part], {s: found[part] for s, found in counts.items()})
            axis.set_xlim(0, most)
            axis.set_ylim(longest - 0.4, -0.6)  # the first class on top
    total = sum(int(found.sum()) for found in counts.values())
    axes[0].set_title(
        figures.plain(f"{figures.shortened(name)}: {total:,} images in {len(names):,} classes"),
        loc="left",
        fontsize=11,
        color=figures.INK,
    )
    axes[-1].legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    return figures.save(figure, folder / "classes.png")


def _named_bars(axis: Any, names: list[str], counts: dict[str, np.ndarray]) -> None:
    """One bar a class, the splits one behind the other."""
    left = np.zeros(len(names))
    for split, values in counts.items():
        axis.barh(range(len(names)), values, left=left, label=split, color=SPLIT_COLORS[split])
        left += values
    axis.set_yticks(
        range(len(names)),
        [figures.plain(figures.shortened(name)) for name in names],
        fontsize=9,
    )
    axis.set_xlabel("images")
    axis.grid(color=figures.FAINT, linewidth=0.6, axis="x")


def _sorted_steps(axis: Any, names: list[str], counts: dict[str, np.ndarray]) -> None:
    """All classes side by side from many training images to few, the splits one upon the other."""
    order = np.argsort(-counts["train"], kind="stable")
    bottom = np.zeros(len(names))
    for split, values in counts.items():
        color = SPLIT_COLORS[split]
        axis.bar(
            range(len(names)), values[order], width=1.0, bottom=bottom, label=split, color=color
        )
        bottom += values[order]
    ends = (f"{figures.shortened(names[i])} ({counts['train'][i]:,})" for i in order[[0, -1]])
    axis.set_xlabel(figures.plain("classes by their training images: " + " … ".join(ends)))
    axis.set_xticks([])
    axis.set_ylabel("images")
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.grid(color=figures.FAINT, linewidth=0.6, axis="y")


def draw_samples(
    folder: Path, name: str, pixels: np.ndarray, labels: np.ndarray, classes: list[str]
) -> Path:
    """Draw samples.png: a grid of images uint8 (n, H, W, 3) with the names of their classes,
    `labels` int64 (n,) into `classes`."""
    columns = min(COLUMNS, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    aspect = pixels.shape[1] / pixels.shape[2]
    figure, axes = figures.new_figure(
        rows, columns, (max(5, 1.35 * columns), (1.3 * aspect + 0.3) * rows)
    )
    for axis in axes:
        axis.set_axis_off()
    for axis, image, label in zip(axes, pixels, labels.tolist(), strict=False):
        # pixels as they are: small images are enlarged without making up what lies between
        axis.imshow(image, interpolation="nearest")
        axis.set_title(figures.plain(figures.shortened(classes[label], SHOWN)), fontsize=7, pad=2)
    shown = len(set(labels.tolist()))
    which = "all" if shown == len(classes) else f"{shown} of {len(classes):,}"
    title = f"{figures.shortened(name)}: {len(pixels)} training images, drawn from {which} classes"
    figure.suptitle(figures.plain(title), x=0.01, ha="left", fontsize=11, color=figures.INK)
    return figures.save(figure, folder / "samples.png")
