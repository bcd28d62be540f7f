"""What a disturbed run must have in common with the undisturbed one: all but times."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from small_runs import TIMED, final_state

FORMER = re.compile(r"last-[23]\.pt")
NOT_COMPARED = {*TIMED, "train_seconds"}


def differences(whole: Path, other: Path) -> list[str]:
    """How the folders of two finished runs differ; none: bit for bit the same."""
    names = [{path.name for path in folder.iterdir()} for folder in (whole, other)]
    found = [f"{name} is missing" for name in sorted(names[0] - names[1]) if not _former(name)]
    found += [f"{name} is left over" for name in sorted(names[1] - names[0]) if not _former(name)]
    if found:
        return found
    found += _differ("last.pt", final_state(whole), final_state(other))
    found += _differ("metrics.csv", _rows(whole), _rows(other))
    found += _differ("summary.json", _summary(whole), _summary(other))
    name = "confusion_matrix.csv"
    found += _differ(name, (whole / name).read_text(), (other / name).read_text())
    return found


def _former(name: str) -> bool:
    """Whether it is an older checkpoint: after a start from one there are fewer for a while."""
    return bool(FORMER.fullmatch(name))


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: row[name] for name in row if name not in NOT_COMPARED} for row in rows]


def _summary(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "summary.json").read_text())
    return {name: value for name, value in found.items() if name not in NOT_COMPARED}


def _differ(place: str, first: Any, second: Any) -> Iterator[str]:
    if type(first) is not type(second):
        yield f"{place}: {type(first).__name__}, {type(second).__name__}"
    elif isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        if not same or not torch.equal(first, second):
            yield f"{place}: other values"
    elif isinstance(first, dict):
        for name in {**first, **second}:
            if name in first and name in second:
                yield from _differ(f"{place}.{name}", first[name], second[name])
            else:
                yield f"{place}.{name}: in one alone"
    elif isinstance(first, list | tuple) and len(first) == len(second):
        for number, pair in enumerate(zip(first, second, strict=True)):
            yield from _differ(f"{place}.{number}", *pair)
    elif first != second:
        yield f"{place}: {str(first)[:60]}, {str(second)[:60]}"
