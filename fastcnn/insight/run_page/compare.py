"""Several runs side by side: results, the options in which they differ, curves in one chart."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcnn.errors import UsageError
from fastcnn.insight.html import document
from fastcnn.insight.html.document import Facts, Page, Section
from fastcnn.insight.html.table import Table
from fastcnn.insight.run_page.curves import overlaid_charts
from fastcnn.insight.run_page.run_files import RunFiles, read_run, shown
from fastcnn.train.progress import format_seconds
from fastcnn.train.rundir import check_no_file_of_a_run

HEADER = (
    "run",
    "test top-1",
    "test top-5",
    "test loss",
    "parameters",
    "epochs",
    "train time",
    "images/s",
    "device",
    "precision",
    "seed",
)
NUMBERS = frozenset({1, 2, 3, 4, 5, 6, 7, 9, 10})
TITLE = "Comparison: "
MARKS = (b'<meta name="generator" content="fastcnn">', f"<title>{TITLE}".encode())
HEAD = 1000  # bytes of a page within which these stand


@dataclass(frozen=True)
class Comparison:
    """runs and labels in the order given; results, differing: tables of texts, a row a run and a
    row an option; same: options that all runs share; notes: what a reader must know of them."""

    runs: tuple[RunFiles, ...]
    labels: tuple[str, ...]
    results: Table
    differing: Table
    same: Facts
    notes: tuple[str, ...]


def compare(folders: Sequence[Path]) -> Comparison:
    """Read the runs; raises CheckpointError for one that is none or damaged."""
    runs = tuple(read_run(folder) for folder in folders)
    labels = tuple(labels_of(folders))
    marked = [
        label if run.summary else f"{label} (not finished)"
        for label, run in zip(labels, runs, strict=True)
    ]
    rows = tuple(
        (label, *result_texts(result_of(run))) for label, run in zip(marked, runs, strict=True)
    )
    options = differing_options(runs)
    differing = Table(
        ("option", *labels),
        tuple((name, *map(shown, values)) for name, values in options.items()),
    )
    same = tuple((k, shown(v)) for k, v in runs[0].options.items() if k not in options)
    table = Table(HEADER, rows, NUMBERS)
    return Comparison(runs, labels, table, differing, same, tuple(_notes(runs, labels)))


def labels_of(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of the path before them as tells them apart."""
    paths = [folder.resolve().parts for folder in folders]
    found = []
    for path in paths:
        others = [other for other in paths if other != path]
        length = next(
            n
            for n in range(1, len(path) + 1)
            if n == len(path) or all(other[-n:] != path[-n:] for other in others)
        )
        found.append("/".join(path[-length:]))
    return found


def result_of(run: RunFiles) -> dict[str, Any]:
    """What a run reached, by the columns' names of summary.json; None: not known (yet)."""
    summary = run.summary or {}
    return {
        **{name: summary.get(name) for name in ("test_top1", "test_top5", "test_loss")},
        "parameters": summary.get("parameters"),
        "epochs": run.epochs or summary.get("epochs", 0),
        "train_seconds": run.seconds,
        "images_per_s": run.images_per_s,
        "device": summary.get("device"),
        "precision": summary.get("precision"),
        "seed": run.options["seed"],
    }


def result_texts(result: dict[str, Any]) -> tuple[str, ...]:
    """The cells of a row beside its label."""
    forms = {
        "test_top1": "{:.2%}",
        "test_top5": "{:.2%}",
        "test_loss": "{:.4f}",
        "parameters": "{:,}",
        "epochs": "{:,}",
        "images_per_s": "{:,.0f}",
    }
    texts = result | {"train_seconds": format_seconds(result["train_seconds"])}
    return tuple(
        "–" if value is None else forms.get(name, "{}").format(value)
        for name, value in texts.items()
    )


def differing_options(runs: Sequence[RunFiles]) -> dict[str, list[Any]]:
    """The options that not all runs share, with the value of each run."""
    found = {name: [run.options[name] for run in runs] for name in runs[0].options}
    return {k: values for k, values in found.items() if any(v != values[0] for v in values)}


def _notes(runs: Sequence[RunFiles], labels: Sequence[str]) -> list[str]:
    first, found = runs[0], []
    for run, label in zip(runs[1:], labels[1:], strict=True):
        if reason := other_images(first, run):
            found.append(f"{label} and {labels[0]} are not comparable: {reason}.")
    for run, label in zip(runs, labels, strict=True):
        if run.summary is None:
            wanted = run.options["epochs"]
            found.append(f"{label} is not finished: {run.epochs:,} of {wanted:,} epochs.")
    return found


def other_images(first: RunFiles, other: RunFiles) -> str:
    """How the test images of two runs differ, as far as their files say; "" if they are the same.

    A subset, and the part of the images that is held out, are drawn by the seed.
    """
    if first.summary is None or other.summary is None:
        names = [Path(run.options["data"]).name for run in (first, other)]
    else:
        names = [first.data, other.data]
    if names[0] != names[1]:
        return f"they were tested on other images, {names[1]} and {names[0]}"
    counts = [(run.summary or {}).get("images", {}).get("test") for run in (first, other)]
    if None not in counts and counts[0] != counts[1]:
        return f"they were tested on {counts[1]:,} and {counts[0]:,} images"
    same_seed = first.options["seed"] == other.options["seed"]
    subsets = [run.options["test_subset"] for run in (first, other)]
    if subsets[0] != subsets[1] or (subsets[0] is not None and not same_seed):
        return "their test images are other subsets of the data, drawn by the seed"
    return ""


def as_plain(found: Comparison) -> dict[str, Any]:
    """The comparison as plain values: accuracies are fractions of 1, None stands for no number."""
    runs = [
        {"run": label, "folder": str(run.folder), "finished": run.summary is not None}
        | {name: _finite(value) for name, value in result_of(run).items()}
        for run, label in zip(found.runs, found.labels, strict=True)
    ]
    return {
        "runs": runs,
        "differing": differing_options(found.runs),
        "same": {name: found.runs[0].options[name] for name, _ in found.same},
        "notes": list(found.notes),
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_output(path: Path) -> None:
    """Raise UsageError where a page cannot be written, or something else than a comparison lies."""
    if not path.parent.is_dir():
        raise UsageError(f"--output: there is no folder {path.parent}")
    check_no_file_of_a_run(path)
    if not path.exists():
        return
    if path.is_dir():
        raise UsageError(f"--output: {path} is a folder; give the name of a page")
    with path.open("rb") as file:
        head = file.read(HEAD)
    if not all(mark in head for mark in MARKS):
        raise UsageError(f"--output: {path} exists and is no earlier comparison; give another")


def write_comparison(found: Comparison, path: Path) -> Path:
    """Write the page; raises CheckpointError where the disk refuses."""
    data = dict.fromkeys(run.data for run in found.runs)
    lead = f"{len(found.runs)} runs on {', '.join(data)}, in the order given."
    title = " and ".join(found.labels) if len(found.labels) == 2 else f"{len(found.runs)} runs"
    differ = found.differing.rows
    none = () if differ else ("The runs have the same options.",)
    same = f"{len(found.same)} options are the same in all"
    charts = overlaid_charts(found.runs, found.labels)
    sections = [
        Section("Results", "results", found.notes, found.results),
        Section("Curves", "curves", (), Table((), ()), charts=charts),
        Section(
            "Options in which they differ",
            "options",
            none,
            found.differing,
            folded=((same, found.same),),
        ),
    ]
    if not any(run.epochs for run in found.runs):
        del sections[1]
    return document.write_page(path, Page(f"{TITLE}{title}", lead, tuple(sections), wide=True))
