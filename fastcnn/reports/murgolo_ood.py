"""murgolo's table 2: how well each layer's mean activation tells foreign images from its own."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from fastcnn.config import DataConfig
from fastcnn.data import load_dataset
from fastcnn.errors import DataError, UsageError
from fastcnn.insight.drawing.study_bars import draw_histogram
from fastcnn.insight.html.table import Table
from fastcnn.insight.ood.ood import Detection, Result, detect
from fastcnn.insight.ood.ood_record import HEADER, NUMBERS, line
from fastcnn.insight.ood.ood_scores import ENERGY, PROBABILITY
from fastcnn.reports.planning import Images, Planned
from fastcnn.study.facts import facts_of, missing_runs
from fastcnn.study.plan import RunResult, VariantResult
from fastcnn.study.record import Drawing, Record
from fastcnn.study.runner import Failure

PUBLISHED = (
    "Published: 99.3 % (relu_9) and 100.0 % (relu_10) accuracy with a threshold of 0.32, on images "
    "and with a network that are not public"
)
SIDE = 32  # of the report's images
BASELINES = (PROBABILITY, ENERGY)

Rows = list[dict[str, Any]]


def check(images: Images, ood_data: str, machine: Mapping[str, Any]) -> None:
    """Read the foreign images before anything is trained; raises what load_dataset raises."""
    if images.name == ood_data:
        return
    names = ("on_bad_image", "bad_limit")
    given = {name: machine[name] for name in names if name in machine}
    config = DataConfig(data=ood_data, image_size=SIDE, **given)
    try:
        load_dataset(config, SIDE, torch.device("cpu"))
    except (DataError, UsageError) as error:
        raise type(error)(str(error).replace("--data ", "--ood-data ", 1)) from error


def record_of(
    planned: Planned,
    results: Mapping[str, VariantResult],
    failures: Sequence[Failure],
    ood_data: str,
    machine: Mapping[str, Any],
    command: Sequence[str],
) -> tuple[Record, Rows, Rows]:
    """The record of the experiment, and its numbers in full: means by score, and by run and score.

    Each run tells its own test images from those of `ood_data`. Without a finished run the table is
    empty.
    """
    runs = [run for result in results.values() for run in result.runs]
    missing = missing_runs(planned.runs, [*results.values()])
    own = planned.images.name == ood_data  # in a trial
    found = [] if own else [_detect(planned, run, ood_data, machine) for run in runs]
    why = f"{ood_data} are no foreign images here: give --ood-data" if own else "no run is finished"
    names = list(found[0].rows) if found else []
    means = {name: _mean([result.rows[name] for result in found]) for name in names}
    record = Record(
        planned.experiment.key,
        f"{planned.experiment.title} ({planned.experiment.place})",
        _lead(planned, ood_data, len(found)),
        facts_of(runs, command),
        Table(HEADER, tuple(line(name, means[name]) for name in names), NUMBERS),
        (
            *(found[0].words if found else (why,)),
            *map(str, failures),
            *filter(None, (missing,)),
            PUBLISHED,
        ),
        planned.experiment.notes,
        _draw(planned, found),
    )
    scale = {"scale": planned.scale}
    rows = [{"score": name, **scale, "n": len(found), **means[name]} for name in names]
    by_run = [
        {"seed": run.seed, "score": name, **scale, **vars(result.rows[name])}
        for run, result in zip(runs[: len(found)], found, strict=True)
        for name in names
    ]
    return record, rows, by_run


def _detect(planned: Planned, run: RunResult, ood_data: str, machine: Mapping[str, Any]) -> Result:
    wanted = ("device", "threads", "workers", "eval_batch_size", "on_bad_image", "bad_limit")
    options = {name: machine[name] for name in wanted if name in machine}
    # as many of the others as of its own, where there are so many
    limit = int(run.summary["images"]["test"])
    return detect(str(run.folder), ood_data, limit=limit, overrides=options)


def _mean(found: Sequence[Detection]) -> dict[str, float]:
    return {name: fmean(getattr(one, name) for one in found) for name in vars(found[0])}


def _lead(planned: Planned, ood_data: str, runs: int) -> str:
    scale = f" ({planned.extent})" if planned.extent else ""
    return (
        f"{planned.report.key}, {planned.experiment.place}: {planned.rows[0].label}{scale} tells "
        f"{planned.images.name} from {ood_data.rstrip('/').split('/')[-1]}; means of {runs} "
        f"run{'' if runs == 1 else 's'}."
    )


def _draw(planned: Planned, found: Sequence[Result]) -> tuple[Drawing, ...]:
    """The histogram of the last layer with an activation, of the first run (figure 8)."""
    if not found:
        return ()
    first = found[0]
    layer = [name for name in first.rows if name not in BASELINES][-1]
    groups = {
        "in distribution": first.held_in.by_name()[layer].tolist(),
        "out of distribution": first.held_out.by_name()[layer].tolist(),
    }
    name = f"{planned.experiment.key}-histogram"
    title = planned.entitled(f"figure 8: mean activation of {layer}")
    draw_histogram(planned.root, name, title, groups, first.rows[layer].threshold)
    alt = f"Histogram of the mean activation of {layer} of own and foreign images"
    return (Drawing(name, alt, f"Mean activation of {layer}"),)
