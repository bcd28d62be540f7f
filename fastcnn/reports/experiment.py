"""What an experiment of a report is: its rows, what was published of each, what was concluded.

Accuracies are in percent, as the reports print them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Range = tuple[float, float]


@dataclass(frozen=True)
class Published:
    """A row's published figures. top1, top5: the mean or the one figure; ranges: least and
    greatest of several launches, or the span that a text names; seconds: of the training; place:
    the value of the last digit printed."""

    top1: float | None = None
    top5: float | None = None
    top1_range: Range | None = None
    top5_range: Range | None = None
    seconds: float | None = None
    launches: int = 1
    place: float = 0.1


@dataclass(frozen=True)
class Row:
    """One network and recipe of an experiment.

    key: the folder of its runs, unique in the report, so that experiments share runs. options: by
    name, as given to `fastcnn train`. reading: "" for the recipe as printed; else a short name of
    another reading of it. launches: runs (seeds) where the user names no number.
    """

    key: str
    label: str
    options: Mapping[str, Any]
    published: Published | None = None
    reading: str = ""
    launches: int = 1


@dataclass(frozen=True)
class Claim:
    """A conclusion of the report: row `better` reaches a higher `figure` than row `worse`."""

    text: str
    better: str
    worse: str
    figure: Literal["top1", "top5"] = "top1"


@dataclass(frozen=True)
class Experiment:
    """One experiment of a report, at its full scale.

    place: where its figures stand in the report. claims: what it concludes of its rows. notes: what
    a reader of the table must know. figures: which of the report's figures are redrawn ("curves",
    "losses", "bars"). modern: networks that --modern adds, by this project's recipe, on the same
    images for as many epochs.
    """

    key: str
    title: str
    place: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()
    figures: tuple[str, ...] = ("bars", "curves")
    modern: tuple[str, ...] = ()
    modern_options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """A report and its experiments.

    data: what its images are by --data's name. grayscale: what it does with grey images.
    """

    key: str
    title: str
    authors: str
    year: str
    data: str
    experiments: tuple[Experiment, ...]

    def experiment(self, key: str) -> Experiment:
        return next(e for e in self.experiments if e.key == key)
