"""index.html of a run: what it reached and how, in one file without links to anything else."""

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcnn.errors import CheckpointError
from fastcnn.insight.drawing.figures import NUMBERED_CLASSES, read_confusion
from fastcnn.insight.html import document
from fastcnn.insight.html.document import Figure, Page, Section
from fastcnn.insight.html.table import Table
from fastcnn.insight.run_page.curves import run_charts
from fastcnn.insight.run_page.run_files import RunFiles, read_json, read_run, shown
from fastcnn.insight.run_page.saved_sections import saved_sections
from fastcnn.text import first_line
from fastcnn.train.progress import format_seconds
from fastcnn.train.rundir import own_file

NO_TABLE = Table((), ())
KEPT = ("analysis", "ood")  # folders of the run, and files in them, that other commands leave
INVITATION = "fastcnn analyze {run} adds grids of images, Grad-CAM and calibration."
FIRST_OPTIONS = ("arch", "data", "recipe", "epochs", "batch_size", "optimizer", "lr", "schedule")


def write_page(folder: Path) -> Path:
    """Write index.html from the files of a run, finished or not, and what was found out about it.

    Raises CheckpointError for a file that is missing or damaged, or where the disk refuses; a page
    that was there stays then.
    """
    return document.write_page(folder / "index.html", _page(folder))


def check_page(folder: Path, renewed: Path) -> None:
    """Raise CheckpointError where `write_page` would; `renewed`, a folder of the run, is about to
    be written anew, and whatever it holds is right."""
    _page(folder, renewed)


def _page(folder: Path, without: Path | None = None) -> Page:
    run = read_run(folder)
    environment = read_json(folder, "environment.json")
    arch = run.summary["arch"] if run.summary else run.options["arch"]
    return Page(
        f"{folder.resolve().name}: {arch} on {run.data}",
        lead(run.summary) if run.summary else unfinished_lead(run),
        tuple(_sections(run, environment, without)),
        _command(environment, folder),
    )


def lead(summary: dict[str, Any]) -> str:
    """One sentence: accuracy, effort, device."""
    flipped = ", each image seen both ways," if summary.get("test_flip") else ""
    return (
        f"Test top-1 {summary['test_top1']:.2%}, top-5 {summary['test_top5']:.2%}{flipped} after "
        f"{_epochs(summary['epochs'])} and {summary['train_seconds']:,.0f} s "
        f"({summary['images_per_s']:,.0f} images/s) on {summary['device']}."
    )


def unfinished_lead(run: RunFiles) -> str:
    """One sentence: how far the run is and what it has reached there."""
    wanted = _epochs(run.options["epochs"])
    if not run.epochs:
        return f"Not finished: no epoch of {wanted} has ended yet."
    return (
        f"Not finished: {run.epochs} of {wanted}, validation top-1 "
        f"{run.metrics['val_top1'][-1]:.2%}, at best {max(run.metrics['val_top1']):.2%}."
    )


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count:,} epochs"


def _command(environment: dict[str, Any], folder: Path) -> str:
    """The command that began the run, and below it those that resumed it."""
    found = [environment.get("command"), *_list(environment.get("resumed_by"))]
    if not all(isinstance(words, list) for words in found):
        raise CheckpointError(f"{folder / 'environment.json'} holds no command; remove it")
    return "\n".join(shlex.join(map(str, words)) for words in found)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _sections(run: RunFiles, environment: dict[str, Any], without: Path | None) -> list[Section]:
    places = _kept_places(run.folder, without)
    kept = list(_kept(places))
    found = [_summary(run, bool(kept))]
    if run.epochs:
        found.append(Section("Curves", "curves", (), NO_TABLE, charts=run_charts(run)))
    # an analysis has drawn the same counts, and their rates
    own = (run.folder / KEPT[0], KEPT[0])
    drawn = own in places and any("confusion" in part.anchor for part in saved_sections(*own))
    if not drawn and (run.folder / "confusion_matrix.png").is_file():
        found.append(_confusion(run.folder))
    facts = tuple(_flat(run.options))
    first = tuple(fact for fact in facts if fact[0] in FIRST_OPTIONS)
    rest = tuple(fact for fact in facts if fact[0] not in FIRST_OPTIONS)
    others = ((f"the other {len(rest)} options", rest),)
    machine = {k: v for k, v in environment.items() if k not in ("command", "resumed_by")}
    return [
        *found,
        *kept,
        Section("Configuration", "configuration", (), NO_TABLE, facts=first, folded=others),
        Section("Environment", "environment", (), NO_TABLE, facts=tuple(_flat(machine))),
    ]


def _summary(run: RunFiles, looked_into: bool) -> Section:
    summary = run.summary or {}
    numbers = [
        ("test top-1", "{:.2%}", summary.get("test_top1")),
        ("test top-5", "{:.2%}", summary.get("test_top5")),
        ("test loss", "{:.4f}", summary.get("test_loss")),
        ("parameters", "{:,}", summary.get("parameters")),
        ("epochs", "{:,}", run.epochs or summary.get("epochs")),
        ("images/s", "{:,.0f}", run.images_per_s),
    ]
    told = [(name, form.format(value)) for name, form, value in numbers if value is not None]
    told.insert(-1, ("time", format_seconds(run.seconds)))
    images = summary.get("images", {})
    facts = [
        ("data", ", ".join([run.data, *(f"{count:,} {name}" for name, count in images.items())])),
        *((name, summary[name]) for name in ("device", "precision", "backend") if name in summary),
        *((name, summary[name]) for name in ("loader", "recipe", "seed") if name in summary),
    ]
    if "best_epoch" in summary and "best_val_top1" in summary:
        best = f"{summary['best_val_top1']:.2%} top-1, best.pt: epoch {summary['best_epoch']}"
        facts.append(("best validation", best))
    left_out = [
        f"{summary[name]:,} {text}"
        for name, text in (("bad_images", "unreadable"), ("grey_images_dropped", "grey"))
        if summary.get(name)
    ]
    if left_out:
        facts.append(("images left out", ", ".join(left_out)))
    paragraphs = [INVITATION.format(run=shlex.quote(str(run.folder)))] if not looked_into else []
    if summary.get("validation_images") == "test":
        paragraphs.append(
            "Validation used the test images; the test figures are those of the last epoch, so "
            "that nothing was chosen by them."
        )
    return Section(
        "Summary",
        "summary",
        tuple(paragraphs),
        NO_TABLE,
        numbers=tuple(told),
        facts=tuple((name, str(value)) for name, value in facts),
    )


def _confusion(folder: Path) -> Section:
    drawing = own_file(folder, "confusion_matrix.png")
    own_file(folder, "confusion_matrix.csv")
    try:
        classes, counts = read_confusion(folder)
        caption = _most_confused(classes, counts)
    except OSError as error:
        path = folder / "confusion_matrix.csv"
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}); remove it and its .png"
        ) from error
    alt = f"Confusion matrix of {len(classes)} classes: rows true, columns predicted."
    figure = Figure(drawing, alt, caption)
    return Section("Confusion matrix", "confusion-matrix", (), NO_TABLE, figures=(figure,))


def _most_confused(classes: list[str], counts: list[list[int]]) -> str:
    """The three largest counts beside the diagonal, in words."""
    rows = "Test images: rows true, columns predicted classes"
    rows += ", numbers counts. " if len(classes) <= NUMBERED_CLASSES else ". "
    pairs = [
        (count, true, predicted)
        for true, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    if not pairs:
        return f"{rows}None is predicted as another class."
    words = [
        f"{classes[true]} for {classes[predicted]} ({count:,} of {sum(counts[true]):,})"
        for count, true, predicted in sorted(pairs, key=lambda pair: -pair[0])[:3]
    ]
    return f"{rows}Most often taken: {', '.join(words)}."


def _kept_places(folder: Path, without: Path | None) -> list[tuple[Path, str]]:
    """The folders of a run that analyze and ood left, and the name of what is kept in each. A link
    is none: it may lead to another run, or anywhere."""
    return [
        (place, key)
        for key in KEPT
        for place in sorted(folder.glob(f"{key}*"))
        if place.is_dir() and not place.is_symlink() and place != without
    ]


def _kept(places: list[tuple[Path, str]]) -> Iterable[Section]:
    """Sections that analyze and ood left, under names that are not taken on the page yet."""
    titles = {"Summary", "Curves", "Confusion matrix", "Configuration", "Environment"}
    anchors = {title.lower().replace(" ", "-") for title in titles}
    for place, key in places:
        for section in saved_sections(place, key):
            title, anchor = section.title, section.anchor
            if title in titles:
                title = f"{title} ({place.name})"
            if anchor in anchors:
                anchor = f"{place.name}-{anchor}"
            titles.add(title)
            anchors.add(anchor)
            yield replace(section, title=title, anchor=anchor)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Nested mappings as dotted names."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, shown(value)
