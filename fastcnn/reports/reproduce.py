"""Reproduce a report: train what is not finished, then tables, figures and the report's page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastcnn.reports import murgolo_ood
from fastcnn.reports.drawings import draw
from fastcnn.reports.experiment import Experiment, Report
from fastcnn.reports.outcome import plain_rows, record_of, results_by_key
from fastcnn.reports.planning import Planned, check_rows, images_of, plan_experiment
from fastcnn.study import record as records
from fastcnn.study.facts import plain_runs
from fastcnn.study.options import ReproduceOptions
from fastcnn.study.pages import write_pages
from fastcnn.study.record import Record
from fastcnn.study.runner import Failure, carry_out, claimed, results

Say = Callable[[str], None]


@dataclass(frozen=True)
class Reproduced:
    """An experiment that was reproduced, as far as its runs are finished."""

    record: Record
    folder: Path
    failures: tuple[Failure, ...]


def reproduce(
    report: Report,
    experiments: Sequence[Experiment],
    options: ReproduceOptions,
    machine: Mapping[str, Any],
    command: list[str],
    quiet: bool = False,
    say: Say = lambda text: None,
) -> list[Reproduced]:
    """Run experiments of a report and write what they came to.

    machine: options of a training run by name, for every run. Raises DataError for images that are
    missing or not the report's, and as `carry_out`; finished runs are kept in any case.
    """
    check_rows(experiments, options)
    images = images_of(report, machine)
    planned = [plan_experiment(report, one, images, options, machine) for one in experiments]
    if not options.tables_only and any("histogram" in one.figures for one in experiments):
        murgolo_ood.check(images, options.ood_data, machine)
    found = []
    with claimed(planned[0].root):
        for one in planned:
            failures: list[Failure] = []
            if not options.tables_only:
                failures = carry_out(one.wanted, command, options.jobs, quiet, say)
            found.append(_write(one, failures, options, machine, command))
            order = [experiment.key for experiment in report.experiments]
            write_pages(one.root, f"{report.key}: {report.title}", _credit(report), order)
    return found


def _credit(report: Report) -> str:
    return f"{report.authors}, {report.year}. Published and measured figures side by side."


def _write(
    planned: Planned,
    failures: Sequence[Failure],
    options: ReproduceOptions,
    machine: Mapping[str, Any],
    command: Sequence[str],
) -> Reproduced:
    reached = results_by_key(results(planned.variants, planned.runs))
    if "histogram" in planned.experiment.figures:
        record, rows, runs = murgolo_ood.record_of(
            planned, reached, failures, options.ood_data, machine, command
        )
    else:
        drawings = draw(planned, reached, planned.root)
        record = record_of(planned, reached, failures, command, drawings)
        rows = plain_rows(planned, reached)
        runs = [{"scale": planned.scale} | run for run in plain_runs([*reached.values()])]
    records.write(record, planned.root, rows, runs)
    return Reproduced(record, planned.root, tuple(failures))
