"""The five reports by key, and what `fastcnn reproduce` lists of them."""

from collections.abc import Sequence

from fastcnn.errors import UsageError, nearest
from fastcnn.insight.html.table import Table
from fastcnn.reports import bohnstedt2019, mao2022, marie2019, murgolo, skagerstrom2018
from fastcnn.reports.experiment import Experiment, Published, Report

REPORTS: dict[str, Report] = {
    module.REPORT.key: module.REPORT
    for module in (marie2019, murgolo, skagerstrom2018, mao2022, bohnstedt2019)
}


def report_named(key: str) -> Report:
    """Raises UsageError for a report that there is not."""
    if key not in REPORTS:
        raise UsageError(
            f"reproduce: no report '{key}'{nearest(key, REPORTS)}; one of {', '.join(REPORTS)}"
        )
    return REPORTS[key]


def experiments_named(report: Report, keys: Sequence[str]) -> tuple[Experiment, ...]:
    """The experiments of a report; all for no keys. Raises UsageError for one it does not have."""
    known = [experiment.key for experiment in report.experiments]
    for key in keys:
        if key not in known:
            raise UsageError(
                f"reproduce {report.key}: no experiment '{key}'{nearest(key, known)}; "
                f"one of {', '.join(known)}"
            )
    return tuple(e for e in report.experiments if not keys or e.key in keys)


def reports_table() -> Table:
    """A line an experiment."""
    lines = [
        (report.key, experiment.key, experiment.title, experiment.place, report.data)
        for report in REPORTS.values()
        for experiment in report.experiments
    ]
    return Table(("report", "experiment", "what", "in the report", "images"), tuple(lines))


def rows_table(report: Report, experiments: Sequence[Experiment]) -> Table:
    """A line a row of the experiments."""
    lines = [
        (
            experiment.key,
            row.key,
            row.label,
            str(row.options["arch"]),
            str(row.launches),
            _told(row.published, "top1"),
            _told(row.published, "top5"),
        )
        for experiment in experiments
        for row in experiment.rows
    ]
    header = ("experiment", "row", "label", "network", "runs", "top-1, %", "top-5, %")
    return Table(header, tuple(lines), frozenset((4,))).without_empty()


def _told(published: Published | None, figure: str) -> str:
    number = getattr(published, figure, None)
    span = getattr(published, f"{figure}_range", None)
    between = "{:g} to {:g}".format(*span) if span else ""
    if number is None:
        return between
    return f"{number:g} ({between})" if between else f"{number:g}"
