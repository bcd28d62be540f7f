"""Carry out a sweep: train what is not finished, then its table, figures and page."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastcnn.study import record as records
from fastcnn.study.facts import plain_runs
from fastcnn.study.options import SweepOptions
from fastcnn.study.pages import write_pages
from fastcnn.study.plan import plan
from fastcnn.study.record import Record
from fastcnn.study.runner import Failure, carry_out, claimed, results
from fastcnn.study.sweep import study_name, variants_of
from fastcnn.study.sweep_record import draw, plain_rows, record_of


def sweep(
    values: Mapping[str, Sequence[Any]],
    options: SweepOptions,
    command: list[str],
    quiet: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Record, Path, list[Failure]]:
    """Train every combination of `values`, options of a training run by name, once a seed.

    Returns the record, the folder that it was written to, and the runs that failed. Raises
    UsageError for options that no run can have, and as `carry_out`; finished runs are kept.
    """
    name = options.name or study_name(values)
    variants = variants_of(values)
    folder = Path(options.output) / name
    seeds = {variant.key: range(options.seeds) for variant in variants}
    runs = plan(variants, seeds, folder)
    failures: list[Failure] = []
    with claimed(folder):
        if not options.tables_only:
            failures = carry_out(runs, command, options.jobs, quiet, say)
        reached = results(variants, runs)
        told = [*map(str, failures)]
        drawings = draw(name, reached, folder)
        record = record_of(name, reached, runs, told, command, drawings)
        records.write(record, folder, plain_rows(reached), plain_runs(reached))
        write_pages(folder, name, record.lead)
    return record, folder, failures
