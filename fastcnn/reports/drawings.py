"""A report's figures, redrawn from our runs."""

from collections.abc import Mapping
from pathlib import Path

from fastcnn.insight.drawing.study_bars import Bar, draw_bars
from fastcnn.insight.drawing.study_figures import Curves, draw_curves, draw_losses, draw_panels
from fastcnn.insight.drawing.study_lines import Measure
from fastcnn.reports.experiment import Row
from fastcnn.reports.judge import judge_rows
from fastcnn.reports.planning import Planned
from fastcnn.study.plan import VariantResult
from fastcnn.study.record import Drawing


def draw(planned: Planned, results: Mapping[str, VariantResult], folder: Path) -> list[Drawing]:
    """Redraw the report's figures from the finished runs."""
    rows = [row for row in planned.rows if results[row.key].runs]
    experiment = planned.experiment
    curves = [
        Curves(row.label, tuple(run.history for run in results[row.key].runs)) for row in rows
    ]
    title = planned.entitled(experiment.place)
    drawn = []
    if "bars" in experiment.figures:
        name = f"{experiment.key}-top1"
        draw_bars(folder, name, title, [_bar(row, results[row.key], planned) for row in rows])
        drawn.append(Drawing(name, f"Top-1 of {title}: published and ours", "Top-1"))
    if "losses" in experiment.figures:
        name = f"{experiment.key}-losses"
        draw_losses(folder, name, title, curves)
        drawn.append(Drawing(name, f"Training loss over epochs of {title}", "Training loss"))
    if "panels" in experiment.figures:
        measures: tuple[tuple[Measure, str], ...] = (("loss", "Loss"), ("top1", "Top-1"))
        for measure, what in measures:
            name = f"{experiment.key}-panels-{measure}"
            draw_panels(folder, name, title, curves, measure)
            drawn.append(Drawing(name, f"{what} of {title}, a panel a row", what))
    if "curves" in experiment.figures:
        for row, curve in zip(rows, curves, strict=True):
            name = f"{experiment.key}-curves-{row.key}"
            draw_curves(folder, name, f"{title}: {row.label}", [curve])
            drawn.append(
                Drawing(name, f"Loss, top-1 and top-5 of {row.label} over epochs", row.label)
            )
    return drawn


def _bar(row: Row, result: VariantResult, planned: Planned) -> Bar:
    [one] = judge_rows([row], {row.key: result})
    points = tuple(100 * value for value in result.by_seed("test_top1").values())
    shown = one.top1 if planned.images.genuine else None
    return Bar(
        row.label,
        one.top1.ours.mean,
        one.top1.ours.interval,
        points,
        shown.published if shown else None,
        shown.published_range if shown else None,
    )
