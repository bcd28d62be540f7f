"""From an experiment to the runs that make it: rows, scale, seeds, folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcnn.archs import get_network
from fastcnn.data import Dataset, load_dataset
from fastcnn.data.sources.cifar import CLASSES as CIFAR10_CLASSES
from fastcnn.errors import DataError, UsageError, nearest
from fastcnn.recipes import resolve
from fastcnn.reports.experiment import Claim, Experiment, Report, Row
from fastcnn.reports.scale import Scaled, longer_steps, scaled
from fastcnn.study.options import ReproduceOptions
from fastcnn.study.plan import PlannedRun, Variant, plan

TINY_IMAGENET_CLASSES = 200
TRIAL = "digits"  # takes the place of a report's images where there is no network

# what this project's best recipe adds to `modern`
MODERN: dict[str, Any] = {"recipe": "modern", "ema": 0.995, "test_flip": True}
MODERN_READING = "modern recipe"

# images of training and test, those left out counted in
WHOLE = {"cifar10": 60_000, "tiny-imagenet": 110_000}


@dataclass(frozen=True)
class Images:
    """The images of a reproduction: name, number, whether they are the report's, and all of
    them."""

    name: str
    train: int
    test: int
    genuine: bool
    whole: bool = True


@dataclass(frozen=True)
class Planned:
    """An experiment's runs. scaled: of each row by key. wanted: the runs that are to be trained."""

    report: Report
    experiment: Experiment
    rows: tuple[Row, ...]
    variants: tuple[Variant, ...]
    scaled: Mapping[str, Scaled]
    runs: tuple[PlannedRun, ...]
    wanted: tuple[PlannedRun, ...]
    images: Images
    scale: float
    root: Path

    @property
    def claims(self) -> tuple[Claim, ...]:
        """The conclusions that can be judged: not of a rate beside one that was raised."""
        if all(one.lr == one.full.optim.lr for one in self.scaled.values()):
            return self.experiment.claims
        own = {row.key for row in self.rows if "lr" in row.options}
        return tuple(c for c in self.experiment.claims if not {c.better, c.worse} & own)

    @property
    def extent(self) -> str:
        """How much of the report this is, in few words; "" for all of it."""
        parts = [] if self.scale == 1 else [f"scale {self.scale:g}"]
        if not self.images.genuine:
            parts.append(f"trial on {self.images.name}")
        elif not self.images.whole:
            parts.append(f"{self.images.train:,} training images in all")
        return ", ".join(parts)

    def entitled(self, what: str) -> str:
        """A figure's title: the report, what of it, and how much of it."""
        return f"{self.report.key}, {what}" + (f" ({self.extent})" if self.extent else "")


def images_of(report: Report, options: Mapping[str, Any]) -> Images:
    """Read the data set of a reproduction, at the size of the report's networks.

    Raises DataError where it is missing, or is not what the report worked on; digits alone may
    stand in for it, as a trial.
    """
    row = report.experiments[0].rows[0].options
    given = {name: row[name] for name in ("arch", "grayscale") if name in row}
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
    left_out = dataset.left_out.grey + len(dataset.left_out.bad)
    there = len(dataset.train) + len(dataset.test) + left_out
    whole = genuine and there >= WHOLE[report.data]
    return Images(dataset.name, len(dataset.train), len(dataset.test), genuine, whole)


def _readable(options: Mapping[str, Any]) -> dict[str, Any]:
    names = ("data", "data_dir", "on_bad_image", "bad_limit", "store")
    return {name: options[name] for name in names if name in options}


def _is_genuine(report: Report, dataset: Dataset) -> bool:
    if report.data == "cifar10":
        return set(dataset.classes) == set(CIFAR10_CLASSES)
    return len(dataset.classes) == TINY_IMAGENET_CLASSES


def check_rows(experiments: Sequence[Experiment], options: ReproduceOptions) -> None:
    """Raise UsageError where --rows names a row that none of the experiments has, or --modern finds
    none."""
    if options.modern and not any(one.modern for one in experiments):
        named = ", ".join(one.key for one in experiments)
        raise UsageError(f"--modern: {named} has no rows of this project's recipe")
    known = [row.key for one in experiments for row in (*one.rows, *_modern_rows(one))]
    for key in options.rows:
        if key not in known:
            raise UsageError(
                f"--rows: no row '{key}'{nearest(key, known)}; --list-rows names them all"
            )


def _modern_rows(experiment: Experiment) -> list[Row]:
    return [_modern(experiment, arch) for arch in experiment.modern]


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
    """Every run of an experiment. machine: options of a training run by name, for all of them.

    Rows of this project's recipe are those that --modern or --rows asks for, and those begun
    before. --rows says what is trained; a table has every row that has runs.
    """
    folder = "full" if options.scale == 1 else f"scale-{options.scale:g}"
    root = Path(options.output) / report.key / folder
    asked = {row.key for row in _modern_rows(experiment) if options.modern}
    asked |= set(options.rows)
    modern = [r for r in _modern_rows(experiment) if r.key in asked or (root / r.key).is_dir()]
    rows = (*experiment.rows, *modern)
    data = {"data": report.data} | dict(machine)
    given = {row.key: _fitting(row.options, images) | data for row in rows}
    size = (options.scale, images.train, images.test)
    longer = longer_steps(
        [_fitting(row.options, images) for one in report.experiments for row in one.rows], *size
    )
    changed = {key: scaled(one, *size, longer) for key, one in given.items()}
    variants = tuple(Variant(row.key, row.label, changed[row.key].options) for row in rows)
    seeds: dict[str, Sequence[int]] = {
        row.key: range(options.seeds or row.launches) for row in rows
    }
    runs = tuple(plan(variants, seeds, root))
    wanted = tuple(run for run in runs if not options.rows or run.variant.key in options.rows)
    return Planned(
        report, experiment, rows, variants, changed, runs, wanted, images, options.scale, root
    )


def _fitting(options: Mapping[str, Any], images: Images) -> dict[str, Any]:
    """The row's options, without what a trial's images do not know."""
    own = dict(options)
    if not images.genuine:
        own.pop("grayscale", None)
        own.pop("test_flip", None)  # a mirrored digit is none
    return own
