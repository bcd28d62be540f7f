"""PNG figures made of images: predictions, Grad-CAM overlays, feature maps, filters.

Images are shown as their pixels are, small ones enlarged without making up what lies between.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcnn.insight.drawing.figures import INK, plain, save
from fastcnn.insight.drawing.study_frame import WIDE, wrapped

DPI = 130  # of figures.save
MARGIN, GAP, LINE = 0.12, 0.22, 0.16  # inches: around all, between cells, of a line of text
MAPS_SHOWN = 64  # of a layer


@dataclass(frozen=True)
class Cell:
    """Images beside each other, with lines of text above them.

    panels: (pixels, text below) each; pixels uint8 (H, W, 3), or float (H, W) in [0, 1], shown in
    grey. lines: (text, colour) each.
    """

    panels: Sequence[tuple[np.ndarray, str]]
    lines: Sequence[tuple[str, str]] = ()


def draw_cells(
    path: Path, cells: Sequence[Cell], columns: int, title: str, width: float = WIDE
) -> Path:
    """Draw cells of the same make in rows of `columns`, below a title; width in inches."""
    from matplotlib.figure import Figure

    first, shape = cells[0], cells[0].panels[0][0].shape
    text = wrapped(title, int(width * 11.2), 3).split("\n")
    count = len(first.panels)
    below = LINE if any(under for _, under in first.panels) else 0
    gap = GAP if first.lines or below else 0.06
    room = (width - 2 * MARGIN + gap) / columns - gap
    side = _fitting((room - 0.05 * (count - 1)) / count, shape[1])
    tall = side * shape[0] / shape[1]
    step = LINE * len(first.lines) + tall + below + gap
    top = MARGIN + 0.2 * len(text) + 0.1
    height = top + step * math.ceil(len(cells) / columns)
    figure = Figure(figsize=(width, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.text(MARGIN, MARGIN, "\n".join(text), va="top", fontsize=11, color=INK)
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        x, y = MARGIN + column * (room + gap), top + row * step
        _draw_cell(axis, cell, x, y, side, tall)
    # inches from the upper left corner
    axis.set_xlim(0, width)
    axis.set_ylim(height, 0)
    return save(figure, path)


def _fitting(room: float, pixels: int) -> float:
    """The side in inches that is at most `room` and, of a small image, whole dots a pixel."""
    dots = int(room * DPI) // pixels
    return room if dots == 0 else dots * pixels / DPI


def _draw_cell(axis: Any, cell: Cell, x: float, y: float, side: float, tall: float) -> None:
    for text, color in cell.lines:
        axis.text(x, y, plain(text), va="top", fontsize=8, color=color)
        y += LINE
    for pixels, under in cell.panels:
        extent = (x, x + side, y + tall, y)
        limits = {} if pixels.ndim == 3 else {"cmap": "gray", "vmin": 0, "vmax": 1}
        small = pixels.shape[1] <= side * DPI
        axis.imshow(
            pixels,
            extent=extent,
            aspect="auto",
            interpolation="nearest" if small else "antialiased",
            **limits,
        )
        if under:
            axis.text(x, y + tall + 0.02, plain(under), va="top", fontsize=7, color=INK)
        x += side + 0.05


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a map (H, W), 0 or more, over an image uint8 (H, W, 3), whose colours give way to the
    map's: dark where it is 0, bright at its own largest value. A map of zeros stays dark."""
    from matplotlib import colormaps

    top = heat.max()
    colors = colormaps["inferno"](heat / top if top > 0 else heat)[..., :3]
    grey = (image / 255) @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601
    mixed = 0.45 * grey[..., None] + 0.55 * colors
    return np.asarray((255 * mixed).round(), dtype=np.uint8)


def draw_maps(
    path: Path, maps: Sequence[tuple[str, np.ndarray]], image: np.ndarray, title: str
) -> Path:
    """Draw feature maps (K, P, Q) of one or two operations, by name, one block a name, the image
    uint8 (H, W, 3) before them; at most MAPS_SHOWN of each, each from its own smallest value
    (black) to its largest (white)."""
    from matplotlib.figure import Figure

    from fastcnn.insight.analysis.feature_maps import scaled

    columns = 8
    shown = [(name, scaled(values[:MAPS_SHOWN])) for name, values in maps]
    rows = max(math.ceil(len(values) / columns) for _, values in shown)
    text = wrapped(title, int(WIDE * 11.2), 3).split("\n")
    picture = 0.9
    blocks = (WIDE - 2 * MARGIN - picture - GAP * len(shown)) / len(shown)
    side = min(0.62, blocks / columns)
    top = MARGIN + 0.2 * len(text) + 0.1 + LINE
    height = top + max(rows * side, picture) + MARGIN
    figure = Figure(figsize=(WIDE, height))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set_axis_off()
    axis.text(MARGIN, MARGIN, "\n".join(text), va="top", fontsize=11, color=INK)
    tall = picture * image.shape[0] / image.shape[1]
    _draw_cell(axis, Cell([(image, "")], [("image", INK)]), MARGIN, top - LINE, picture, tall)
    x = MARGIN + picture + GAP
    for name, values in shown:
        axis.text(x, top - LINE, plain(name), va="top", fontsize=8, color=INK)
        for number, one in enumerate(values):
            row, column = divmod(number, columns)
            place = (x + column * side, top + row * side)
            inner = side - 0.03
            _draw_cell(axis, Cell([(one, "")]), *place, inner, inner)
        x += columns * side + GAP
    axis.set_xlim(0, WIDE)
    axis.set_ylim(height, 0)
    return save(figure, path)


def draw_filters(path: Path, filters: np.ndarray, title: str) -> Path:
    """Draw filters (K, R, S, 3) in [0, 1] as images."""
    cells = [Cell([((255 * one).round().astype(np.uint8), "")]) for one in filters]
    return draw_cells(path, cells, 16, title)
