"""`fastcnn analyze`: what a trained network does well and badly, and what it looks at, as files and
as sections of its run's page."""

import re
from pathlib import Path
from typing import Any

from fastcnn.archs import get_network
from fastcnn.archs.spec import LayerRow, layer_table
from fastcnn.errors import UsageError
from fastcnn.insight.analysis.analysis_dir import claimed, origin_of, word_of
from fastcnn.insight.analysis.analysis_files import KEY, summary, write_files
from fastcnn.insight.analysis.analysis_sections import sections_of
from fastcnn.insight.analysis.feature_maps import stages
from fastcnn.insight.analysis.findings import find
from fastcnn.insight.analysis.gradcam import choose_operation, find_operations
from fastcnn.insight.analysis.predict_split import observe, open_tested
from fastcnn.insight.run_page import page
from fastcnn.insight.run_page.saved_sections import save_sections
from fastcnn.train.checkpoints.load_run import TrainedModel
from fastcnn.train.rundir import RunFolder


def analyze(
    run: str,
    data: str | None = None,
    split_name: str = "test",
    weights: str | None = None,
    *,
    layer: str | None = None,
    maps: list[str] | None = None,
    samples: int = 20,
    seed: int = 0,
    overrides: dict[str, Any] | None = None,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Write figures and tables of a finished run into RUN/analysis, and the run's page anew.

    data, split_name, weights, overrides: as for fastcnn.train.run.evaluate_run; other data and
    another split than test have a folder of their own, RUN/analysis-<data>-<split>. layer: what
    Grad-CAM shows (gradcam.choose_operation). maps: layers or operations with a figure of feature
    maps each; None: the first two convolutions. samples: images of a grid. seed: which images are
    drawn at random. command: what the page says that it was made by.

    Returns figures and paths as plain values. Raises UsageError for a checkpoint file and for
    layers that the network lacks, CheckpointError for a run that is missing, unfinished or damaged
    and for a folder that another process writes, and what evaluate_run raises.
    """
    options, folder = overrides or {}, finished_run(run).path
    name = folder_name("" if data is None else word_of(data), split_name)
    of = [origin_of(data), split_name]
    with claimed(folder, name, KEY, of) as target:
        # before the images, which may take long
        page.check_page(folder, target)
        trained, device = open_tested(run, weights, options)
        rows = _rows(trained)
        operation = choose_operation(rows, layer)
        shown = _figures_of_maps(rows, maps)
        seen = observe(trained, device, data, split_name, options)
        found = find(seen, operation, shown, samples, seed)
        files = write_files(target, found)
        save_sections(target, KEY, sections_of(target, found, command or []), of)
        index = page.write_page(folder)
    names = sorted(path.name for path in files)
    return {**summary(found), "folder": str(target), "page": str(index), "files": names}


def finished_run(run: str) -> RunFolder:
    """The folder of a finished run; raises UsageError for a file, CheckpointError for no run."""
    path = Path(run)
    if path.is_file():
        weights = f" --weights {path.stem}" if path.stem in ("last", "best") else ""
        raise UsageError(
            f"{run} is a file; figures are written where the run is: give the run folder "
            f"{path.parent}{weights}"
        )
    return RunFolder.finished(path)


def folder_name(data: str, split_name: str) -> str:
    """Where an analysis stands in its run's folder; data: "" for the run's own."""
    split_name = "" if split_name == "test" else split_name
    words = [word for word in (KEY, data, split_name) if word]
    return re.sub(r"[^\w.-]", "_", "-".join(words))


def _rows(trained: TrainedModel) -> list[LayerRow]:
    network = get_network(trained.config.model.arch)
    return layer_table(network, trained.image_size, len(trained.classes))


def _figures_of_maps(rows: list[LayerRow], maps: list[str] | None) -> list[tuple[str, ...]]:
    """The operations of each figure of feature maps."""
    if maps is None:
        return stages(rows, [row for row in rows if row.name.startswith("Conv2d")][:2])
    found: dict[tuple[str, ...], None] = {}
    for name in maps:
        chosen = stages(rows, find_operations(rows, name, "--maps"))
        if not chosen:
            raise UsageError(f"--maps {name}: its output has no pixels; take a layer before it")
        found |= dict.fromkeys(chosen)
    return list(found)
