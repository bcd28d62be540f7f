"""What `fastcnn ood` leaves in a run: tables, figures, and a section for the run's page."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcnn.errors import CheckpointError
from fastcnn.files import replace_text
from fastcnn.insight.analysis.analysis_dir import word_of
from fastcnn.insight.html.document import Figure, Section
from fastcnn.insight.html.table import Table, as_csv
from fastcnn.insight.ood.ood import Result
from fastcnn.insight.ood.ood_scores import called
from fastcnn.insight.run_page.saved_sections import save_sections

KEY = "ood"  # the file in a folder of the run that its page reads
HEADER = ("score", "accuracy, %", "balanced, %", "AUROC, %", "FPR at 95% TPR, %", "threshold")
NUMBERS = frozenset(range(1, len(HEADER)))
SHARES = ("accuracy", "balanced_accuracy", "auroc", "fpr95")
BEST = "best AUROC"
SETS = ("threshold", "in", "out")  # of images.csv


def name_of(out_data: str, in_data: str | None) -> str:
    """The folder within a run, and the anchor on its page: ood-<out>, or ood-<in>-<out>."""
    words = [word_of(data) for data in (in_data, out_data) if data is not None]
    return "-".join(["ood", *(re.sub(r"[^\w.]+", "-", word).strip("-") for word in words)])


def line(name: str, row: Mapping[str, float]) -> tuple[str, ...]:
    """A score's figures as texts, under HEADER."""
    told = [f"{100 * row[share]:.1f}" for share in SHARES]
    return (called(name), *told, f"{row['threshold']:.3g}")


def table_of(result: Result) -> Table:
    """Every score's figures, the best marked."""
    marks = {name: BEST if name == result.best else "" for name in result.rows}
    rows = tuple((*line(name, vars(row)), marks[name]) for name, row in result.rows.items())
    return Table((*HEADER, ""), rows, NUMBERS)


def plain_rows(result: Result) -> list[dict[str, Any]]:
    """The same in full: fractions of 1, thresholds in the score's unit."""
    return [
        {"score": name, "best": name == result.best, **vars(row)}
        for name, row in result.rows.items()
    ]


def sentences(result: Result) -> tuple[str, ...]:
    """What the table says, and of what."""
    names = {name: called(name) for name in result.rows}
    best, row = names[result.best], result.rows[result.best]
    found = [
        *result.words,
        f"best AUROC: {best}, {row.auroc:.1%}; it was chosen by these very images, and may be "
        "less on others",
    ]
    if backward := [names[name] for name, row in result.rows.items() if row.auroc < 0.5]:
        found.append(
            "AUROC below 50%, images out of distribution score higher than those in distribution: "
            + ", ".join(backward)
        )
    return tuple(found)


def write_tables(folder: Path, result: Result) -> None:
    """Write scores.csv, and images.csv with every image's scores.

    Raises CheckpointError where the disk refuses.
    """
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make {folder}: {error.strerror or error}") from error
    replace_text(folder / "scores.csv", as_csv(plain_rows(result)))
    replace_text(folder / "images.csv", as_csv(_image_rows(result)))


def _image_rows(result: Result) -> list[dict[str, Any]]:
    """set, data, split, image: its position in the split; class and scores of every image."""
    found = []
    for name, images, scores in zip(SETS, result.sets, _scores(result), strict=True):
        data = {"set": name, "data": images.name, "split": images.split}
        columns = {score: values.tolist() for score, values in scores.by_name().items()}
        for number, (place, label) in enumerate(
            zip(images.places.tolist(), images.classes, strict=True)
        ):
            own = {score: values[number] for score, values in columns.items()}
            found.append({**data, "image": place, "class": label, **own})
    return found


def _scores(result: Result) -> tuple[Any, ...]:
    return result.fit, result.held_in, result.held_out


def draw(folder: Path, result: Result) -> tuple[Figure, ...]:
    """Draw histogram and layers, as PNG and SVG; ImportError without matplotlib."""
    from fastcnn.insight.ood.ood_figures import draw_layers, draw_scores

    inside, outside = (one.name for one in result.sets[1:])
    shown, row = called(result.shown), result.rows[result.shown]
    histogram, _ = draw_scores(folder, "histogram", result)
    title = f"AUROC of telling {inside} from {outside}, by layer"
    layers, _ = draw_layers(folder, "layers", title, result.rows)
    best = result.rows[result.best].auroc
    return (
        Figure(
            histogram,
            f"Histogram of {shown} of images of {inside} and of {outside}, and the threshold",
            f"{shown}: {row.kept_in:.1%} of {inside} and {row.kept_out:.1%} of {outside} reach the "
            f"threshold, {row.threshold:.4g}. AUROC {row.auroc:.1%}, FPR at 95% TPR "
            f"{row.fpr95:.1%}.",
        ),
        Figure(
            layers,
            "AUROC of each layer's mean activation in forward order; maximum softmax probability "
            "and energy as lines",
            f"AUROC over the layers, as `fastcnn archs` names them; best: {called(result.best)}, "
            f"{best:.1%}.",
        ),
    )


def keep(
    folder: Path,
    result: Result,
    figures: tuple[Figure, ...],
    command: Sequence[str],
    of: Sequence[str],
) -> Path:
    """Write ood.json, the section of the run's page, of these data."""
    inside, outside = (one.name for one in result.sets[1:])
    section = Section(
        f"Out of distribution: {outside}",
        folder.name,
        (f"How well the network tells test images of {inside} from those of {outside}.",),
        table_of(result).without_empty(),
        sentences(result),
        figures,
        (("command", shlex.join(command)),),
    )
    return save_sections(folder, KEY, [section], of)
