"""PNG figures of a run: learning curves and the confusion matrix, from its CSV files."""

import contextlib
import csv
import io
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastcnn.errors import CheckpointError
from fastcnn.files import check_regular, replace_bytes
from fastcnn.text import first_line, shown

log = logging.getLogger(__name__)

INK, FAINT = "#1f2430", "#d5d9e0"
TRAIN, VAL, TOP5 = "#c2571a", "#1f5fa8", "#3b8f5a"
LOG_FROM = 30  # spread of the losses above which a linear axis would hide the small ones
NUMBERED_CLASSES = 20  # more cells than this leave no room for their figures
NAMED = 24  # characters of a name beside or above axes; longer ones leave these no room
MISSING = re.compile(r"Glyph (\d+) .*missing from font\(s\) (.*)\.")  # Matplotlib's warning
LETTERS = 20  # of those that are named
_noted: set[str] = set()


def read_metrics(folder: Path) -> dict[str, list[float]]:
    """metrics.csv by column; every list has one value an epoch. Raises CheckpointError where it is
    damaged."""
    path = folder / "metrics.csv"
    check_regular(path)
    with path.open(newline="", encoding="utf-8") as file, _damage(path):
        rows = list(csv.DictReader(file))
        return {name: [float(row[name]) for row in rows] for name in (rows[0] if rows else {})}


def read_confusion(folder: Path) -> tuple[list[str], list[list[int]]]:
    """Class names and counts (rows true, columns predicted) of confusion_matrix.csv. Raises
    CheckpointError where it is damaged."""
    path = folder / "confusion_matrix.csv"
    check_regular(path)
    with path.open(newline="", encoding="utf-8") as file, _damage(path):
        header, *rows = csv.reader(file)
        counts = [[int(count) for count in row[1:]] for row in rows]
        if {len(row) for row in counts} != {len(rows)} or len(header) != len(rows) + 1:
            raise ValueError("not as many rows as columns")
        return header[1:], counts


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, csv.Error) as error:
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}); remove it, and resume the run"
        ) from error


def draw_curves(folder: Path) -> Path | None:
    """Draw curves.png: loss, accuracy and learning rate over the epochs; None without metrics."""
    metrics = read_metrics(folder)
    if not metrics:
        return None
    figure, axes = new_figure(1, 3, (12, 3.6))
    epochs = metrics["epoch"]
    _lines(
        axes[0],
        epochs,
        [("train", metrics["train_loss"], TRAIN), ("val", metrics["val_loss"], VAL)],
    )
    _lines(
        axes[1],
        epochs,
        [
            ("train top-1", _percent(metrics["train_top1"]), TRAIN),
            ("val top-1", _percent(metrics["val_top1"]), VAL),
            ("val top-5", _percent(metrics["val_top5"]), TOP5),
        ],
    )
    losses = metrics["train_loss"] + metrics["val_loss"]
    if min(losses) > 0 and max(losses) > LOG_FROM * min(losses):
        axes[0].set_yscale("log")
    _lines(axes[2], epochs, [("learning rate", metrics["lr"], INK)])
    for axis, title in zip(axes, ("loss", "accuracy, %", "learning rate"), strict=True):
        axis.set_title(title, loc="left", fontsize=11, color=INK)
        axis.set_xlabel("epoch")
    axes[2].get_legend().remove()
    return save(figure, folder / "curves.png")


def draw_confusion(folder: Path) -> Path:
    """Draw confusion_matrix.png: share of each true class (row) predicted as each class."""
    classes, counts = read_confusion(folder)
    rates = [[count / max(1, sum(row)) for count in row] for row in counts]
    side = min(14.0, 3.0 + 0.45 * len(classes))
    figure, axes = new_figure(1, 1, (side + 0.8, side))
    axis = axes[0]
    image = axis.imshow(rates, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, fraction=0.046, label="share of the true class")
    if len(classes) <= NUMBERED_CLASSES:
        names = [plain(shortened(name)) for name in classes]
        axis.set_xticks(range(len(classes)), names, rotation=45, ha="right")
        axis.set_yticks(range(len(classes)), names)
        _number_cells(axis, counts, rates)
    axis.set_xlabel("predicted")
    axis.set_ylabel("true")
    axis.grid(False)
    return save(figure, folder / "confusion_matrix.png")


def _number_cells(axis: Any, counts: list[list[int]], rates: list[list[float]]) -> None:
    for row, (values, shares) in enumerate(zip(counts, rates, strict=True)):
        for column, (value, share) in enumerate(zip(values, shares, strict=True)):
            if value:
                color = "white" if share > 0.5 else INK
                axis.text(column, row, value, ha="center", va="center", fontsize=8, color=color)


def _percent(values: list[float]) -> list[float]:
    return [100 * value for value in values]


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """Return a figure of `size` in inches and its axes, row by row."""
    # the figure class alone, without pyplot, needs no display and keeps no global list of figures
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def _lines(axis: Any, epochs: list[float], curves: list[tuple[str, list[float], str]]) -> None:
    marker = "o" if len(epochs) < 3 else None
    for label, values, color in curves:
        axis.plot(epochs, values, label=label, color=color, marker=marker, linewidth=1.6)
    axis.legend(frameon=False, fontsize=9)
    axis.grid(color=FAINT, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.xaxis.get_major_locator().set_params(integer=True)


def plain(name: str) -> str:
    """Return a class name as Matplotlib shall write it: a pair of $ would be a formula."""
    return name.replace("$", r"\$")


def shortened(name: str, length: int = NAMED) -> str:
    """Return a name in one line of at most `length` characters, its end replaced by … where it is
    longer."""
    name = shown(name)
    return name if len(name) <= length else f"{name[: length - 1]}…"


def save(figure: Any, path: Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write a figure in the format that the path names; raises DiskError where the disk refuses."""
    drawn = io.BytesIO()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", message=MISSING.pattern)
        figure.savefig(drawn, format=path.suffix[1:], dpi=130, metadata=metadata)
    _note_boxes([found for one in caught if (found := MISSING.match(str(one.message)))])
    for one in caught:
        if not MISSING.match(str(one.message)):
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return replace_bytes(path, drawn.getvalue())


def _note_boxes(missing: list[re.Match[str]]) -> None:
    """Say, the first time in this process, which letters the font lacks."""
    letters = dict.fromkeys(shown(chr(int(found[1]))) for found in missing)
    if letters and not _noted:
        _noted.update(letters)
        log.warning(
            "note: figures: letters that %s lacks are drawn as boxes: %s; tables have them",
            missing[0][2],
            " ".join([*letters][:LETTERS]) + (" …" if len(letters) > LETTERS else ""),
        )
