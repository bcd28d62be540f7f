"""The files of an analysis: tables as CSV, figures as PNG, the main numbers as JSON."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcnn.data.progress import progress_bar
from fastcnn.errors import CheckpointError
from fastcnn.files import replace_text
from fastcnn.insight.analysis import analysis_figures
from fastcnn.insight.analysis.classes import accuracy, rates, top_confusions
from fastcnn.insight.analysis.findings import Findings, Picked, name_of
from fastcnn.insight.drawing import image_figures
from fastcnn.insight.drawing.figures import INK, shortened
from fastcnn.insight.drawing.image_figures import Cell, overlay
from fastcnn.insight.html.table import as_csv
from fastcnn.insight.run_page.saved_sections import saved_sections
from fastcnn.train.rundir import RunFolder

KEY = "analysis"  # the folder in a run, and the file in it that its page reads
GRID_COLUMNS, CAM_COLUMNS = 4, {"wrong": 2, "right": 3}
TOP = 10  # confusions that are told
SHOWN, SHOWN_BELOW = 22, 14  # characters of a class name above an image, below a map
TITLES = {
    "wrong": "Wrong predictions, the most confident first",
    "right": "Right predictions, the least confident first",
    "random": "Predictions drawn at random",
}
CAM_TITLES = {
    "wrong": "Grad-CAM of the most confident wrong predictions",
    "right": "Grad-CAM of right predictions drawn at random",
}


def write_files(folder: Path, found: Findings) -> list[Path]:
    """Write all files of an analysis into `folder`; raises CheckpointError where the disk refuses.

    Figures that an earlier analysis drew, and this one does not, are removed.
    """
    former = _former_figures(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = _write_tables(folder, found)
        wanted = _figures(folder, found)
        for path in former - wanted.keys():
            path.unlink()
        with progress_bar("drawing", len(wanted), announce=False) as advance:
            for path, draw in wanted.items():
                files.append(draw(path))
                advance(1)
    except OSError as error:
        raise CheckpointError(f"cannot write into {folder}: {error.strerror or error}") from error
    return files


def _former_figures(folder: Path) -> set[Path]:
    try:
        sections = saved_sections(folder, KEY)
    except CheckpointError:  # what it names may be anybody's
        return set()
    return {figure.path for section in sections for figure in section.figures}


def summary(found: Findings) -> dict[str, Any]:
    """The main figures as plain values; accuracies and the like are fractions of 1."""
    seen, calibration = found.seen, found.calibration
    macro, weighted = found.figures.macro(), found.figures.weighted()
    classes = seen.trained.classes
    confusions = [
        {
            "true": classes[pair.true],
            "predicted": classes[pair.predicted],
            "images": pair.count,
            "share": pair.share,
        }
        for pair in top_confusions(found.counts, TOP)
    ]
    return {
        "arch": seen.trained.config.model.arch,
        "checkpoint": str(seen.trained.path),
        "data": seen.dataset.name,
        "split": seen.split,
        "images": len(seen.labels),
        "top1": accuracy(found.counts),
        **{f"macro_{name}": value for name, value in macro.items()},
        **{f"weighted_{name}": value for name, value in weighted.items()},
        "ece": calibration.ece,
        "mce": calibration.mce,
        "brier": calibration.brier,
        "nll": calibration.nll,
        "confidence": calibration.confidence,
        "grad_cam": found.operation,
        "confusions": confusions,
    }


def _write_tables(folder: Path, found: Findings) -> list[Path]:
    classes = tuple(found.seen.trained.classes)
    RunFolder(folder).write_confusion(torch.from_numpy(found.counts), classes)
    tables = {
        "confusion_rates.csv": _rate_rows(found, classes),
        "classes.csv": _class_rows(found, classes),
        "confusions.csv": _confusion_rows(found, classes),
        "calibration.csv": _bin_rows(found),
        "predictions.csv": _prediction_rows(found, classes),
    }
    written = [folder / "confusion_matrix.csv"]
    for name, rows in tables.items():
        written.append(replace_text(folder / name, as_csv(rows)))
    text = json.dumps(summary(found), indent=2, ensure_ascii=False) + "\n"
    return [*written, replace_text(folder / "summary.json", text)]


def _rate_rows(found: Findings, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    return [
        {"true \\ predicted": name, **{c: _short(v) for c, v in zip(classes, row, strict=True)}}
        for name, row in zip(classes, rates(found.counts), strict=True)
    ]


def _class_rows(found: Findings, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    figures = found.figures
    return [
        {
            "number": number,
            "class": name,
            "images": int(figures.support[number]),
            "predicted": int(figures.predicted[number]),
            "precision": _short(figures.precision[number]),
            "recall": _short(figures.recall[number]),
            "f1": _short(figures.f1[number]),
        }
        for number, name in enumerate(classes)
    ]


def _confusion_rows(found: Findings, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = [
        {
            "true": classes[pair.true],
            "predicted": classes[pair.predicted],
            "images": pair.count,
            "share_of_true": _short(pair.share),
        }
        for pair in top_confusions(found.counts)
    ]
    return rows


def _bin_rows(found: Findings) -> list[dict[str, Any]]:
    bins = found.calibration
    return [
        {
            "above": _short(bins.edges[number]),
            "up_to": _short(bins.edges[number + 1]),
            "images": int(count),
            "accuracy": _short(bins.accuracies[number]) if count else None,
            "confidence": _short(bins.confidences[number]) if count else None,
        }
        for number, count in enumerate(bins.counts)
    ]


def _prediction_rows(found: Findings, classes: tuple[str, ...]) -> list[dict[str, Any]]:
    seen = found.seen
    predicted, probabilities = seen.predicted, seen.probabilities
    return [
        {
            "image": name_of(seen, place),
            "true": classes[label],
            "predicted": classes[predicted[place]],
            "probability": _short(found.confidence[place]),
            "true_probability": _short(probabilities[place, label]),
        }
        for place, label in enumerate(seen.labels.tolist())
    ]


def _short(value: float) -> str:
    return f"{value:.6g}"


def _figures(folder: Path, found: Findings) -> dict[Path, Callable[[Path], Path]]:
    """What draws each figure, by its file."""
    counts, classes = found.counts, found.seen.trained.classes
    drawn: dict[str, Callable[[Path], Path]] = {
        "confusion_counts.png": lambda path: analysis_figures.draw_counts(path, counts, classes),
        "confusion_rates.png": lambda path: analysis_figures.draw_rates(path, counts, classes),
        "class_f1.png": lambda path: analysis_figures.draw_f1(path, found.figures, classes),
        "reliability.png": lambda path: analysis_figures.draw_reliability(path, found.calibration),
        "filters.png": lambda path: image_figures.draw_filters(
            path, found.filters, f"The {len(found.filters)} filters of the first convolution"
        ),
    }
    for name, picked in found.grids.items():
        if len(picked.places):
            drawn[f"predictions_{name}.png"] = partial(_draw_grid, found, name, picked)
    for name in found.cams:
        drawn[f"gradcam_{name}.png"] = partial(_draw_cams, found, name)
    for maps in found.maps:
        drawn[maps_file(maps[0][0])] = partial(_draw_maps, found, maps)
    return {folder / name: draw for name, draw in drawn.items()}


def maps_file(operation: str) -> str:
    """The file of the feature maps that begin with those of this operation."""
    return f"feature_maps_{operation.lower().replace('-', '_')}.png"


def _draw_grid(found: Findings, name: str, picked: Picked, path: Path) -> Path:
    cells = [
        Cell([(pixels, "")], labels_of(found, place))
        for place, pixels in zip(picked.places, picked.pixels, strict=True)
    ]
    return image_figures.draw_cells(path, cells, GRID_COLUMNS, TITLES[name])


def labels_of(found: Findings, place: int) -> list[tuple[str, str]]:
    """True and predicted label of an image, their probabilities, and the colour of each line."""
    seen = found.seen
    label, predicted = int(seen.labels[place]), int(seen.predicted[place])
    right = label == predicted
    odds = _percent(found.confidence[place])
    if not right:
        odds += f", true class {_percent(seen.probabilities[place, label])}"
    color = analysis_figures.RIGHT if right else analysis_figures.WRONG
    said = f"predicted {_named(found, predicted)}"
    return [(f"true {_named(found, label)}", INK), (said, color), (odds, INK)]


def _named(found: Findings, label: int, length: int = SHOWN) -> str:
    return shortened(found.seen.trained.classes[label], length)


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _draw_cams(found: Findings, name: str, path: Path) -> Path:
    picked, for_predicted, for_true = found.cams[name]
    cells = []
    for number, (place, pixels) in enumerate(zip(picked.places, picked.pixels, strict=True)):
        predicted = _named(found, int(found.seen.predicted[place]), SHOWN_BELOW)
        panels = [(pixels, ""), (overlay(pixels, for_predicted[number]), f"for {predicted}")]
        if name == "wrong":
            true = _named(found, int(found.seen.labels[place]), SHOWN_BELOW)
            panels.append((overlay(pixels, for_true[number]), f"for {true}"))
        cells.append(Cell(panels, labels_of(found, place)))
    title = f"{CAM_TITLES[name]}, at {found.operation}"
    return image_figures.draw_cells(path, cells, CAM_COLUMNS[name], title)


def _draw_maps(found: Findings, maps: list[tuple[str, np.ndarray]], path: Path) -> Path:
    label = _named(found, int(found.seen.labels[found.shown.places[0]]))
    channels = len(maps[0][1])
    most = image_figures.MAPS_SHOWN
    part = f", {most} of {channels}," if channels > most else ""
    title = f"Feature maps{part} of one {found.seen.split} image: {label}"
    named = [(told(maps, number), values) for number, (_, values) in enumerate(maps)]
    return image_figures.draw_maps(path, named, found.shown.pixels[0], title)


def told(maps: list[tuple[str, np.ndarray]], number: int) -> str:
    """What the maps of an operation are called beside those of the other one, if there is one."""
    name = maps[number][0]
    if len(maps) == 1:
        return name
    what = "normalisation" if maps[1][0].startswith("BatchNorm") else "activation"
    return f"{'after' if number else 'before'} {what} ({name})"
