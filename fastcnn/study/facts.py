"""What a study's figures need beside them, from its runs: machine, precision, versions, images."""

import datetime
import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from fastcnn.bench.environment import commit
from fastcnn.study.plan import PlannedRun, RunResult, VariantResult

Fact = tuple[str, str]
NAMED_RUNS = 5


def facts_of(runs: Sequence[RunResult], command: Sequence[str]) -> tuple[Fact, ...]:
    """Name and value of each fact; what differs from run to run stands there with all its values.

    The commit is that of the program that writes this, which may be later than the runs.
    """
    summaries = [run.summary for run in runs]
    found = [
        # what makes the runs, also where only the table was made anew
        ("command", shlex.join(word for word in command if word != "--tables-only")),
        ("date", datetime.date.today().isoformat()),
        ("commit", commit() or "unknown"),
        ("machine", _all(s.get("device") for s in summaries)),
        ("precision", _all(s.get("precision") for s in summaries)),
        ("backend", _all(s.get("backend") for s in summaries)),
        ("torch", _all(dict(s.get("versions", {})).get("torch") for s in summaries)),
        ("images", _all(s.get("data") for s in summaries)),
    ]
    return tuple((name, value) for name, value in found if value)


def _all(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value is not None))


def plain_runs(results: Sequence[VariantResult]) -> list[dict[str, Any]]:
    """A line a run, for a CSV file: accuracies as fractions of 1."""
    names = ("test_top1", "test_top5", "test_loss", "val_top1", "epochs", "train_seconds")
    return [
        {"variant": result.variant.key, "seed": run.seed}
        | {name: run.summary.get(name) for name in names}
        for result in results
        for run in result.runs
    ]


def missing_runs(planned: Sequence[PlannedRun], results: Sequence[VariantResult]) -> str:
    """Which of the planned runs have no result; "" if all have one."""
    done = {(result.variant.key, run.seed) for result in results for run in result.runs}
    left = [one.name for one in planned if (one.variant.key, one.seed) not in done]
    if not left:
        return ""
    more = "" if len(left) <= NAMED_RUNS else f" and {len(left) - NAMED_RUNS} more"
    return (
        f"{len(planned) - len(left)} of {len(planned)} runs are finished; "
        f"missing: {', '.join(left[:NAMED_RUNS])}{more}"
    )
