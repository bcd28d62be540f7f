"""From an experiment to the runs that make it: rows, scale, seeds, folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcnn.archs import get_network
from fastcnn.data import Dataset, load_dataset
from fastcnn.data.cifar import CLASSES as CIFAR10_CLASSES
from fastcnn.errors import DataError, UsageError, nearest
from fastcnn.recipes import resolve
from fastcnn.reports.experiment import Claim, Experiment, Report, Row
from fastcnn.reports.scale import Scaled, scaled
from fastcnn.study.options import ReproduceOptions
from fastcnn.study.plan import PlannedRun, Variant, plan

TINY_IMAGENET_CLASSES = 200
TRIAL = "digits"  # takes the place of a report's images where there is no network

# what this project's best recipe adds to `modern`
MODERN: dict[str, Any] = {"recipe": "modern", "ema": 0.995, "test_flip": True}
MODERN_READING = "modern recipe"


@dataclass(frozen=True)
class Images:
    """The images of a reproduction: name, number, and whether they are the report's."""

    name: str
    train: int
    test: int
    genuine: bool


@dataclass(frozen=True)
class Planned:
    """An experiment's runs. rows, claims: those wanted; scaled: of each row by key."""

    report: Report
    experiment: Experiment
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]
    variants: tuple[Variant, ...]
    scaled: Mapping[str, Scaled]
    runs: tuple[PlannedRun, ...]
    images: Images
    scale: float
    root: Path


def images_of(report: Report, options: Mapping[str, Any]) -> Images:
    """Read the data set of a reproduction, at the size of the report's networks.

    Raises DataError where it is missing, or is not what the report worked on; digits alone may
    stand in for it, as a trial.
    """
    given = {"arch": report.experiments[0].rows[0].options["arch"]}
    config = resolve(given | {"data": report.data} | _readable(options))
    import torch

    side = get_network(config.model.arch).image_sizes[0]
    dataset = load_dataset(config.data, side, torch.device("cpu"))
    genuine = _is_genuine(report, dataset)
    if not genuine and config.data.data != TRIAL:
        known = (
            "its ten classes" if report.data == "cifar10" else f"{TINY_IMAGENET_CLASSES} classes"
        )
        raise DataError(
            f"{report.key} is about {report.data} ({known}); {dataset.name} has "
            f"{len(dataset.classes)} classes ({', '.join(dataset.classes[:3])}, …): give --data "
            f"{report.data}, or --data {TRIAL} for a trial"
        )
    return Images(dataset.name, len(dataset.train), len(dataset.test), genuine)


def _readable(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("data", "data_dir", "on_bad_image", "bad_limit", "store")
    return {name: options[name] for name in names if name in options}


def _is_genuine(report: Report, dataset: Dataset) -> bool:
    if report.data == "cifar10":
        return set(dataset.classes) == set(CIFAR10_CLASSES)
    return len(dataset.classes) == TINY_IMAGENET_CLASSES


def rows_of(experiment: Experiment, options: ReproduceOptions) -> tuple[Row, ...]:
    """The experiment's rows, with --modern those of this project's recipe, of which --rows keeps
    some. Raises UsageError where it names no row of the experiment."""
    rows = experiment.rows
    if options.modern:
        rows += tuple(_modern(experiment, arch) for arch in experiment.modern)
    if not options.rows:
        return rows
    known = [row.key for row in rows]
    for key in options.rows:
        if key not in known:
            raise UsageError(
                f"--rows: {experiment.key} has no row '{key}'{nearest(key, known)}; "
                f"it has {', '.join(known)}"
            )
    return tuple(row for row in rows if row.key in options.rows)


def _modern(experiment: Experiment, arch: str) -> Row:
    """A network with this project's recipe on the experiment's images, for as many epochs."""
    launches = experiment.rows[0].launches
    own = dict(experiment.modern_options) | MODERN | {"arch": arch}
    key = f"{experiment.key}-modern-{arch}"
    return Row(key, f"{arch} ({MODERN_READING})", own, None, MODERN_READING, launches)


def plan_experiment(
    report: Report,
    experiment: Experiment,
    images: Images,
    options: ReproduceOptions,
    machine: Mapping[str, Any],
) -> Planned:
    """Every run of an experiment. machine: options of a training run by name, for all of them."""
    rows = rows_of(experiment, options)
    data = {"data": report.data} | dict(machine)
    changed = {
        row.key: scaled(
            _fitting(row.options, images) | data, options.scale, images.train, images.test
        )
        for row in rows
    }
    variants = tuple(Variant(row.key, row.label, changed[row.key].options) for row in rows)
    seeds: dict[str, Sequence[int]] = {
        row.key: range(options.seeds or row.launches) for row in rows
    }
    folder = "full" if options.scale == 1 else f"scale-{options.scale:g}"
    root = Path(options.output) / report.key / folder
    runs = tuple(plan(variants, seeds, root))
    keys = {row.key for row in rows}
    claims = tuple(c for c in experiment.claims if {c.better, c.worse} <= keys)
    scale = options.scale
    return Planned(report, experiment, rows, claims, variants, changed, runs, images, scale, root)


def _fitting(options: Mapping[str, Any], images: Images) -> dict[str, Any]:
    """The row's options, without what a trial's images do not know."""
    own = dict(options)
    if not images.genuine:
        own.pop("grayscale", None)
    return own
