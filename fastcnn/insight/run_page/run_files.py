"""What the files of a run's folder say of it, finished or not."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcnn.errors import CheckpointError
from fastcnn.files import load_json
from fastcnn.insight.drawing.figures import read_metrics
from fastcnn.text import first_line
from fastcnn.train.rundir import COLUMNS, RunFolder, own_file

NUMBER = (int, float)
LONGEST = 80  # characters of a value in an error
# of summary.json, what a page cannot do without, and what it shows where it is there
NEEDED: dict[str, Any] = {
    "arch": str,
    "data": str,
    "device": str,
    "epochs": int,
    "test_top1": NUMBER,
    "test_top5": NUMBER,
    "train_seconds": NUMBER,
    "images_per_s": NUMBER,
}
SHOWN: dict[str, Any] = {
    "parameters": int,
    "images": dict,
    "bad_images": int,
    "grey_images_dropped": int,
    "test_loss": NUMBER,
    "best_epoch": int,
    "best_val_top1": NUMBER,
    "precision": str,
    "backend": str,
    "loader": str,
    "recipe": str,
    "seed": int,
    "tested_model": str,
    "validation_images": str,
}


@dataclass(frozen=True)
class RunFiles:
    """options: of config.yaml, all of them; metrics: columns by name, a value an epoch; summary:
    None while the run is not finished."""

    folder: Path
    options: dict[str, Any]
    metrics: dict[str, list[float]]
    summary: dict[str, Any] | None

    @property
    def epochs(self) -> int:
        return len(self.metrics["epoch"])

    @property
    def data(self) -> str:
        """The name of the images."""
        return str(self.summary["data"] if self.summary else Path(self.options["data"]).name)

    @property
    def seconds(self) -> float:
        return self.summary["train_seconds"] if self.summary else sum(self.metrics["seconds"])

    @property
    def images_per_s(self) -> float | None:
        """The mean over the epochs; None before the first has ended."""
        if self.summary:
            return float(self.summary["images_per_s"])
        rates = self.metrics["images_per_s"]
        return sum(rates) / len(rates) if rates else None


def read_run(folder: Path) -> RunFiles:
    """Read config.yaml, metrics.csv and summary.json.

    Raises CheckpointError for a folder that holds no run, and for a file that is damaged, a link
    or, in a finished run, missing.
    """
    run = RunFolder.open(folder)
    for name in ("config.yaml", "metrics.csv", "summary.json"):
        own_file(folder, name)
    options = run.read_config().flat()
    summary = run.read_summary()
    if summary is not None:
        check_summary(summary, folder / "summary.json")
    return RunFiles(folder, options, _metrics(folder, summary is not None), summary)


def check_summary(summary: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError where a value is missing or of another kind than a run writes."""
    for name, kind in (NEEDED | SHOWN).items():
        if name not in summary and name in NEEDED:
            raise CheckpointError(f"{path} holds no {name}; remove it, and resume the run")
        value = summary.get(name)
        if name in summary and (not isinstance(value, kind) or isinstance(value, bool)):
            given = repr(value)[:LONGEST]
            raise CheckpointError(f"{path}: {name} is {given}; remove it, and resume the run")
    counts = summary.get("images", {}).values()
    if not all(type(count) is int for count in counts):
        raise CheckpointError(f"{path}: images holds no numbers; remove it, and resume the run")


def _metrics(folder: Path, finished: bool) -> dict[str, list[float]]:
    path = folder / "metrics.csv"
    if not path.is_file() and not finished:
        return {name: [] for name in COLUMNS}
    try:
        found = read_metrics(folder) or {name: [] for name in COLUMNS}
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({first_line(error)}); resume the run"
        ) from error
    found.setdefault("skipped_steps", [0.0] * len(found.get("epoch", [])))  # not counted before
    if missing := [name for name in COLUMNS if name not in found]:
        raise CheckpointError(f"{path} has no column {missing[0]}; resume the run")
    if finished and not found["epoch"]:
        raise CheckpointError(f"{path} holds no epoch; resume the run")
    if not all(map(math.isfinite, found["epoch"])):
        raise CheckpointError(f"{path} has an epoch that is no number; resume the run")
    return found


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A file that must be there and hold a mapping; raises CheckpointError otherwise."""
    path = own_file(folder, name)
    try:
        found = load_json(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing; resume the run, which writes it") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); remove it") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} is not what this program wrote; remove it")
    return found


def shown(value: Any) -> str:
    """A value as a reader sees it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return "–" if value is None else text or "–"
