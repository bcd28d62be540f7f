"""An experiment's runs as a record: published and measured figures side by side, and verdicts."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fastcnn.insight.html.table import Table
from fastcnn.reports.experiment import Published, Row
from fastcnn.reports.judge import (
    JudgedFigure,
    Judgement,
    claim_sentence,
    figure_sentence,
    judge,
    order_sentence,
)
from fastcnn.reports.planning import Planned
from fastcnn.study.facts import facts_of, missing_runs
from fastcnn.study.plan import VariantResult
from fastcnn.study.record import Drawing, Record
from fastcnn.study.runner import Failure

HEADER = (
    "row",
    "images",
    "epochs",
    "lr",
    "n",
    "top-1, %",
    "sd",
    "min to max",
    "95 %",
    "published",
    "verdict",
    "top-5, %",
    "top-5, 95 %",
    "top-5, published",
    "top-5, verdict",
)
NUMBERS = frozenset((1, 2, 3, 4, 5, 6, 11))
LARGER = "the published numbers are of more images and epochs: no verdict on single numbers"


def results_by_key(results: Sequence[VariantResult]) -> dict[str, VariantResult]:
    return {result.variant.key: result for result in results}


def record_of(
    planned: Planned,
    results: Mapping[str, VariantResult],
    failures: Sequence[Failure],
    command: Sequence[str],
    drawings: Sequence[Drawing],
) -> Record:
    """The record of an experiment, of which some runs may be missing."""
    judged = judge(planned.rows, planned.claims, results)
    runs = [run for result in results.values() for run in result.runs]
    return Record(
        planned.experiment.key,
        f"{planned.experiment.title} ({planned.experiment.place})",
        lead_of(planned),
        facts_of(runs, command),
        table_of(planned, judged),
        (
            *sentences_of(planned, judged, results),
            *map(str, failures),
            *_missing(planned, results),
        ),
        planned.experiment.notes,
        tuple(drawings),
    )


def lead_of(planned: Planned) -> str:
    """What was run, beside what the report ran."""
    parts = [f"{planned.report.key}, {planned.experiment.place}, {_scale(planned)}."]
    if not planned.images.genuine:
        parts.append(
            f"A trial on {planned.images.name}, which are not the report's images: the published "
            "figures say nothing of them."
        )
    elif not planned.images.whole:
        parts.append(
            f"{planned.images.name} is a part of the report's images: {planned.images.train:,} for "
            f"training and {planned.images.test:,} for the test."
        )
    return " ".join(parts)


def _scale(planned: Planned) -> str:
    if planned.scale == 1:
        return "at the report's scale" if planned.images.whole else "all epochs of the report"
    said = f"at scale {planned.scale:g}: about {planned.scale:.3g} times its images and its epochs"
    if any(one.lr != one.full.optim.lr for one in planned.scaled.values()):
        said += ", SGD's rates raised so that rate × steps is as long as is safe"
    return said


def is_comparable(planned: Planned) -> bool:
    """Whether single numbers can be held against the published ones."""
    return planned.scale == 1 and planned.images.whole


def table_of(planned: Planned, judged: Judgement) -> Table:
    """A line for each row that has runs, published beside ours."""
    lines = []
    for one in judged.rows:
        scaled = planned.scaled[one.row.key]
        top1, top5 = one.top1.ours, one.top5.ours
        lines.append(
            (
                one.row.label,
                f"{scaled.train_images:,}",
                str(scaled.epochs),
                f"{scaled.lr:g}",
                str(top1.n),
                f"{top1.mean:.1f}",
                "" if top1.std is None else f"{top1.std:.1f}",
                "" if top1.n == 1 else f"{top1.low:.1f} to {top1.high:.1f}",
                _interval(one.top1),
                _published(one.top1),
                _verdict(one.top1) if is_comparable(planned) else "",
                f"{top5.mean:.1f}",
                _interval(one.top5),
                _published(one.top5),
                _verdict(one.top5) if is_comparable(planned) else "",
            )
        )
    return Table(HEADER, tuple(lines), NUMBERS).without_empty()


def _interval(one: JudgedFigure) -> str:
    if one.ours.interval is None:
        return ""
    low, high = one.ours.interval
    return f"{low:.1f} to {high:.1f}"


def _published(one: JudgedFigure) -> str:
    span = "" if one.published_range is None else "{:g} to {:g}".format(*one.published_range)
    if one.published is None:
        return span
    return f"{one.published:g} ({span})" if span else f"{one.published:g}"


def _verdict(one: JudgedFigure) -> str:
    """Where ours stands: by its interval, else by the published range."""
    return one.standing or one.in_range or ""


def sentences_of(
    planned: Planned, judged: Judgement, results: Mapping[str, VariantResult]
) -> tuple[str, ...]:
    """Verdicts on numbers where they compare, on the order, on the conclusions, on time."""
    found = []
    if is_comparable(planned):
        for one in judged.rows:
            found += [
                f"{one.row.label}: {figure_sentence(figure)}"
                for figure in (one.top1, one.top5)
                if figure.standing or figure.in_range
            ]
    elif planned.images.genuine:
        found.append(LARGER)
    found += [order_sentence(order) for order in judged.orders]
    found += [claim_sentence(claim) for claim in judged.claims]
    left = [claim for claim in planned.experiment.claims if claim not in planned.claims]
    found += [f"{claim.text}: not judged where other rates are raised" for claim in left]
    return (*found, *_times(planned, results))


def _times(planned: Planned, results: Mapping[str, VariantResult]) -> list[str]:
    """Training times relative to the first row's, where the report has them."""
    timed = [row for row in planned.rows if row.published and row.published.seconds]
    timed = [row for row in timed if results[row.key].runs]
    if len(timed) < 2:
        return []
    first = timed[0]
    return [
        f"training time of {row.label} over that of {first.label}: "
        f"{_seconds(results[row.key]) / _seconds(results[first.key]):.2f}, published "
        f"{_published_seconds(row) / _published_seconds(first):.2f}"
        for row in timed[1:]
    ]


def _seconds(result: VariantResult) -> float:
    return max(1e-9, fmean(result.by_seed("train_seconds").values()))


def _published_seconds(row: Row) -> float:
    return (row.published or Published()).seconds or 1.0


def _missing(planned: Planned, results: Mapping[str, VariantResult]) -> list[str]:
    missing = missing_runs(planned.runs, [*results.values()])
    return [missing] if missing else []


def plain_rows(planned: Planned, results: Mapping[str, VariantResult]) -> list[dict[str, Any]]:
    """The table's numbers in full, for the CSV file."""
    found = []
    for one in judge(planned.rows, (), results).rows:
        scaled = planned.scaled[one.row.key]
        line: dict[str, Any] = {
            "row": one.row.key,
            "label": one.row.label,
            "reading": one.row.reading,
            "scale": planned.scale,
            "images": scaled.train_images,
            "test_images": scaled.test_images,
            "epochs": scaled.epochs,
            "lr": scaled.lr,
            "n": one.top1.ours.n,
        }
        for figure in (one.top1, one.top5):
            line |= _plain_figure(figure)
        found.append(line)
    return found


def _plain_figure(one: JudgedFigure) -> dict[str, Any]:
    ours = one.ours
    interval, student = ours.interval or (None, None), ours.t_interval or (None, None)
    span = one.published_range or (None, None)
    values = {
        "mean": ours.mean,
        "std": ours.std,
        "min": ours.low,
        "max": ours.high,
        "low95": interval[0],
        "high95": interval[1],
        "low95_t": student[0],
        "high95_t": student[1],
        "published": one.published,
        "published_min": span[0],
        "published_max": span[1],
    }
    return {f"{one.figure}_{name}": _rounded(value) for name, value in values.items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")
