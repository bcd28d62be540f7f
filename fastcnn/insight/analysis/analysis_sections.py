"""The sections of a run's page that tell of an analysis."""

import shlex
from pathlib import Path

import numpy as np

from fastcnn.insight.analysis.analysis_figures import BARS, ENDS
from fastcnn.insight.analysis.analysis_files import CAM_TITLES, TITLES, TOP, maps_file, told
from fastcnn.insight.analysis.calibration import BINS
from fastcnn.insight.analysis.classes import accuracy, top_confusions
from fastcnn.insight.analysis.findings import Findings
from fastcnn.insight.drawing.figures import NUMBERED_CLASSES
from fastcnn.insight.drawing.image_figures import MAPS_SHOWN
from fastcnn.insight.html.document import Figure, Section
from fastcnn.insight.html.table import Table

NONE = Table((), ())


def sections_of(folder: Path, found: Findings, command: list[str]) -> list[Section]:
    """Sections with the figures in `folder`, whose name tells several analyses of a run apart."""
    parts = [
        _classes(folder, found, command),
        _confusions(folder, found),
        _calibration(folder, found),
        _predictions(folder, found),
        _grad_cam(folder, found),
        _maps(folder, found),
    ]
    what = folder.name.removeprefix("analysis").removeprefix("-")
    end = f" ({what})" if what else ""
    return [
        Section(
            f"{part.title}{end}",
            f"{folder.name}-{part.anchor}",
            part.paragraphs,
            part.table,
            part.sentences,
            part.figures,
            part.facts,
        )
        for part in parts
    ]


def _classes(folder: Path, found: Findings, command: list[str]) -> Section:
    figures, names = found.figures, found.seen.trained.classes
    macro, weighted = figures.macro(), figures.weighted()
    order = np.argsort(-figures.f1, kind="stable")
    many = len(order) > BARS
    if many:
        order = np.concatenate([order[:ENDS], order[-ENDS:]])
    rows = tuple(
        (
            names[i],
            f"{figures.support[i]:,}",
            f"{figures.predicted[i]:,}",
            *(f"{part[i]:.3f}" for part in (figures.precision, figures.recall, figures.f1)),
        )
        for i in order
    )
    header = ("class", "images", "predicted", "precision", "recall", "F1")
    table = Table(header, rows, frozenset(range(1, len(header))))
    sentences: tuple[str, ...] = (
        f"Accuracy {_percent(accuracy(found.counts))} of {len(found.seen.labels):,} images.",
        f"Means over the classes: precision {macro['precision']:.3f}, recall "
        f"{macro['recall']:.3f}, F1 {macro['f1']:.3f}; weighted by their images "
        f"{weighted['precision']:.3f}, {weighted['recall']:.3f}, {weighted['f1']:.3f}.",
    )
    if many:
        part = f"The {ENDS} best and the {ENDS} worst of {len(names)} classes; classes.csv has all."
        sentences = (*sentences, part)
    best, worst = int(np.argmax(figures.f1)), int(np.argmin(figures.f1))
    span = (
        f"F1 from {figures.f1[worst]:.2f} ({names[worst]}) to {figures.f1[best]:.2f} "
        f"({names[best]})"
    )
    figure = Figure(
        folder / "class_f1.png",
        f"Bars of F1 by class with marks for precision and recall: {span}",
        f"{span}; mean {macro['f1']:.3f}.",
    )
    facts = (("command", shlex.join(command)),) if command else ()
    return Section("Classes", "classes", found.seen.words, table, sentences, (figure,), facts)


def _confusions(folder: Path, found: Findings) -> Section:
    names = found.seen.trained.classes
    pairs = top_confusions(found.counts, TOP)
    rows = tuple(
        (names[p.true], names[p.predicted], f"{p.count:,}", _percent(p.share)) for p in pairs
    )
    table = Table(("true", "predicted", "images", "of the true class"), rows, frozenset({2, 3}))
    most = "No image was confused."
    if pairs:
        top = pairs[0]
        most = (
            f"Most often {names[top.true]} was predicted as {names[top.predicted]}: {top.count:,} "
            f"images, {_percent(top.share)} of them."
        )
    far = "" if len(names) <= NUMBERED_CLASSES else " Classes by their numbers in classes.csv."
    wrong = int(found.counts.sum() - found.counts.trace())
    figures = (
        Figure(
            folder / "confusion_counts.png",
            f"Confusion matrix in numbers of images, true class by predicted class. {most}",
            f"Images by true and predicted class; {wrong:,} off the diagonal.{far}",
        ),
        Figure(
            folder / "confusion_rates.png",
            f"Confusion matrix in percent of each true class, by predicted class. {most}",
            f"The diagonal is each class's recall, mean {_percent(found.figures.macro()['recall'])}"
            f".{far}",
        ),
    )
    return Section("Confusions", "confusions", (), table, (most,), figures)


def _calibration(folder: Path, found: Findings) -> Section:
    c = found.calibration
    word = "more" if c.confidence > c.accuracy else "less"
    sentences = (
        f"The mean confidence is {_percent(c.confidence)}, the accuracy {_percent(c.accuracy)}: "
        f"the network is {word} confident than right.",
        f"Expected calibration error {c.ece:.4f}, largest gap of a bin {c.mce:.4f} ({BINS} bins of "
        "equal width of the largest probability).",
        f"Brier score {c.brier:.4f} (0 to 2), negative log-likelihood {c.nll:.4f} nats.",
    )
    figure = Figure(
        folder / "reliability.png",
        f"Reliability diagram: accuracy by confidence in {BINS} bins against the diagonal, and a "
        f"histogram of the confidences. Expected calibration error {c.ece:.4f}",
        f"Above: accuracy of the images of each bin of confidence; ECE {c.ece:.4f}, MCE "
        f"{c.mce:.4f}. Below: how many images are in each bin.",
    )
    return Section("Calibration", "calibration", (), NONE, sentences, (figure,))


def _predictions(folder: Path, found: Findings) -> Section:
    figures, names = [], found.seen.trained.classes
    for name, picked in found.grids.items():
        places = picked.places
        if not len(places):
            continue
        low, high = found.confidence[places].min(), found.confidence[places].max()
        wrong = int((found.seen.labels[places] != found.seen.predicted[places]).sum())
        true = ", ".join(dict.fromkeys(names[i] for i in found.seen.labels[places]))
        caption = (
            f"{TITLES[name]}: {len(places)} images, predicted with {_percent(low)} to "
            f"{_percent(high)}"
        )
        if name == "random":
            caption += f"; {wrong} of them wrong"
        figures.append(
            Figure(
                folder / f"predictions_{name}.png",
                f"{len(places)} images with true and predicted class. {TITLES[name]}. "
                f"True classes: {true}",
                f"{caption}. Beside each class stands its probability.",
            )
        )
    sentences = () if len(found.grids["wrong"].places) else ("No prediction is wrong.",)
    return Section("Predictions", "predictions", (), NONE, sentences, tuple(figures))


def _grad_cam(folder: Path, found: Findings) -> Section:
    text = (
        f"Grad-CAM (Selvaraju et al. 2017) of the output of {found.operation}: bright is what "
        "raises the score of the class named below, dark what does not; each map is scaled to its "
        "own largest value. An image is looked at as it is, not mirrored."
    )
    figures = []
    for name, (picked, for_predicted, for_true) in found.cams.items():
        drawn = [for_predicted, for_true] if name == "wrong" else [for_predicted]
        empty = sum(int((part.max((1, 2)) == 0).sum()) for part in drawn)
        kinds = "for the predicted and for the true class" if name == "wrong" else "for its class"
        nothing = f"; {empty} of {len(drawn) * len(picked.places)} maps are 0 everywhere"
        figures.append(
            Figure(
                folder / f"gradcam_{name}.png",
                f"{CAM_TITLES[name]}: {len(picked.places)} images, each with the parts of it that "
                f"speak {kinds}",
                f"{CAM_TITLES[name]}: each image, and beside it what speaks {kinds}"
                f"{nothing if empty else ''}.",
            )
        )
    return Section("Grad-CAM", "grad-cam", (text,), NONE, (), tuple(figures))


def _maps(folder: Path, found: Findings) -> Section:
    place = int(found.shown.places[0])
    label = found.seen.trained.classes[found.seen.labels[place]]
    figures = []
    for maps in found.maps:
        names = " and ".join(told(maps, number) for number in range(len(maps)))
        spans = "; ".join(
            f"{told(maps, number)}: {len(values)} maps of {values.shape[1]}x{values.shape[2]}, "
            f"{values.min():.2f} to {values.max():.2f}"
            for number, (_, values) in enumerate(maps)
        )
        more = f" The first {MAPS_SHOWN} are shown." if len(maps[0][1]) > MAPS_SHOWN else ""
        figures.append(
            Figure(
                folder / maps_file(maps[0][0]),
                f"Feature maps of {names} for one image of class {label}",
                f"{spans}; each map from its own smallest value (black) to its largest (white), "
                "one that is the same everywhere black."
                f"{more}",
            )
        )
    count, height, width, _ = found.filters.shape
    figures.append(
        Figure(
            folder / "filters.png",
            f"The {count} filters of the first convolution as small colour images",
            f"{count} filters of {height}x{width} weights for red, green and blue, each from its "
            "own smallest weight to its largest.",
        )
    )
    return Section("Feature maps and filters", "maps", (), NONE, (), tuple(figures))


def _percent(value: float) -> str:
    return f"{value:.1%}"
