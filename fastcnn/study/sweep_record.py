"""A sweep's runs as a record: every variant's figures, and its difference from the first one."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcnn.insight.drawing.study_bars import Bar, draw_bars
from fastcnn.insight.drawing.study_figures import Curves, draw_curves, draw_losses
from fastcnn.insight.html.table import Table
from fastcnn.study.facts import facts_of, missing_runs
from fastcnn.study.plan import PlannedRun, VariantResult
from fastcnn.study.record import Drawing, Record
from fastcnn.study.statistics import Comparison, Summary, compare, summarise

KEY = "sweep"
HEADER = (
    "variant",
    "n",
    "top-1, %",
    "sd",
    "min to max",
    "95 %",
    "against the first",
    "95 %",
    "Holm p",
    "top-5, %",
    "images/s",
)
NUMBERS = frozenset((1, 2, 3, 6, 8, 9, 10))


def record_of(
    name: str,
    results: Sequence[VariantResult],
    planned: Sequence[PlannedRun],
    failures: Sequence[str],
    command: Sequence[str],
    drawings: Sequence[Drawing],
) -> Record:
    """The record of a sweep, of whose planned runs some may be missing."""
    finished = [result for result in results if result.runs]
    runs = [run for result in finished for run in result.runs]
    missing = missing_runs(planned, results)
    compared = comparisons(finished)
    return Record(
        KEY,
        name,
        f"{len(results)} variants, {len(planned)} runs. Accuracies are of the test images.",
        facts_of(runs, command),
        Table(
            HEADER,
            tuple(_line(*pair) for pair in zip(finished, compared, strict=True)),
            NUMBERS,
        ).without_empty(),
        (*failures, *([missing] if missing else [])),
        _notes(finished, compared),
        tuple(drawings),
    )


def comparisons(finished: Sequence[VariantResult]) -> list[Comparison | None]:
    """Each variant's top-1, in percent, against the first one's; Holm's correction over all."""
    if not finished:
        return []
    first = _percent(finished[0])
    return [None, *compare([(_percent(other), first) for other in finished[1:]])]


def _percent(result: VariantResult, figure: str = "test_top1") -> dict[int, float]:
    return {seed: 100 * value for seed, value in result.by_seed(figure).items()}


def summary_of(result: VariantResult, figure: str = "test_top1") -> Summary:
    """Of a figure of the summaries, in percent."""
    images = int(result.runs[0].summary["images"]["test"])
    return summarise(list(_percent(result, figure).values()), images, whole=100.0)


def _line(result: VariantResult, against: Comparison | None) -> tuple[str, ...]:
    top1, top5 = summary_of(result), summary_of(result, "test_top5")
    rate = [float(run.summary["images_per_s"]) for run in result.runs]
    several = top1.n > 1
    return (
        result.variant.label,
        str(top1.n),
        f"{top1.mean:.1f}",
        f"{top1.std:.1f}" if top1.std is not None else "",
        f"{top1.low:.1f} to {top1.high:.1f}" if several else "",
        _interval(top1.interval),
        "" if against is None else f"{against.difference:+.1f}",
        "" if against is None else _interval(against.interval, "+.1f"),
        "" if against is None or against.p_holm is None else _p(against.p_holm),
        f"{top5.mean:.1f}",
        f"{sum(rate) / len(rate):,.0f}",
    )


def _interval(interval: tuple[float, float] | None, form: str = ".1f") -> str:
    return "" if interval is None else f"{interval[0]:{form}} to {interval[1]:{form}}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _notes(
    finished: Sequence[VariantResult], compared: Sequence[Comparison | None]
) -> tuple[str, ...]:
    """How intervals and tests were made."""
    notes = []
    methods = [summary_of(result).method for result in finished]
    if "bootstrap" in methods:
        notes.append("95 % of the mean over seeds: bootstrap")
    if "binomial" in methods:
        notes.append(
            "95 % of a single run, and of equal ones: binomial, of its test images alone, not of "
            "seeds"
        )
    for test in dict.fromkeys(one.test for one in compared if one and one.p is not None):
        notes.append(f"differences: {test} test over seeds, p corrected by Holm's procedure")
    return tuple(notes)


def draw(name: str, results: Sequence[VariantResult], folder: Path) -> list[Drawing]:
    """Bars of top-1, curves and training losses of the variants that have finished runs."""
    finished = [result for result in results if result.runs]
    if not finished:
        return []
    curves = [
        Curves(result.variant.label, tuple(run.history for run in result.runs))
        for result in finished
    ]
    draw_bars(folder, f"{KEY}-top1", name, [_bar(result) for result in finished])
    draw_curves(folder, f"{KEY}-curves", name, curves)
    draw_losses(folder, f"{KEY}-losses", name, curves)
    return [
        Drawing(f"{KEY}-top1", f"Top-1 of the variants of {name}", "Top-1"),
        Drawing(f"{KEY}-curves", f"Loss, top-1 and top-5 of the variants of {name}", "Curves"),
        Drawing(f"{KEY}-losses", f"Training loss of the variants of {name}", "Training loss"),
    ]


def _bar(result: VariantResult) -> Bar:
    top1 = summary_of(result)
    return Bar(result.variant.label, top1.mean, top1.interval, tuple(_percent(result).values()))


def plain_rows(results: Sequence[VariantResult]) -> list[dict[str, Any]]:
    """The table's numbers in full, for the CSV file: percent."""
    finished = [result for result in results if result.runs]
    found = []
    for result, against in zip(finished, comparisons(finished), strict=True):
        top1 = summary_of(result)
        low, high = top1.interval or (None, None)
        found.append(
            {
                "variant": result.variant.key,
                "label": result.variant.label,
                "n": top1.n,
                "top1_mean": top1.mean,
                "top1_std": top1.std,
                "top1_min": top1.low,
                "top1_max": top1.high,
                "top1_low95": low,
                "top1_high95": high,
                "top5_mean": summary_of(result, "test_top5").mean,
                "difference": None if against is None else against.difference,
                "p": None if against is None else against.p,
                "p_holm": None if against is None else against.p_holm,
            }
        )
    return found
