"""What an exported file tells of itself, in every format: texts by name, JSON where they are not
plain words."""

import json
from pathlib import Path
from typing import Any

from fastcnn.errors import CheckpointError
from fastcnn.export.network import BATCH, INPUT, OUTPUT
from fastcnn.train.checkpoints.load_run import TrainedModel
from fastcnn.train.rundir import RunFolder
from fastcnn.version import __version__

PLACES = ("data_dir",)  # options that say where things are on the machine that trained


def describe(trained: TrainedModel, preprocess: bool) -> dict[str, str]:
    """Return arch, image_size, classes, normalization, input, output, config, fastcnn and, of a
    model that the run's summary speaks of, test_top1, test_images and test_flip.

    classes: a JSON list in the order of the logits. normalization: see `Normalization`; a pixel in
    0..255 becomes (pixel / 255 - mean) / std in mode zscore, pixel / 255 in mode unit, and so on.
    """
    config = {k: v for k, v in trained.config.flat().items() if k not in PLACES}
    config["data"] = Path(config["data"]).name
    return {
        "arch": trained.config.model.arch,
        "image_size": str(trained.image_size),
        "classes": _json(list(trained.classes)),
        "normalization": _json(trained.normalization.to_plain()),
        "input": _json(describe_input(trained.image_size, preprocess)),
        "output": _json({"name": OUTPUT, "dtype": "float32", "shape": [BATCH, "classes"]}),
        "config": _json(config),
        "fastcnn": __version__,
        **_accuracy(trained),
    }


def describe_input(image_size: int, preprocess: bool) -> dict[str, Any]:
    """Return name, dtype, shape and meaning of what the network takes."""
    if preprocess:
        shape: list[Any] = [BATCH, image_size, image_size, 3]
        return {"name": INPUT, "dtype": "uint8", "shape": shape, "values": "RGB pixels, 0 to 255"}
    shape = [BATCH, 3, image_size, image_size]
    values = "RGB, normalised as `normalization` says"
    return {"name": INPUT, "dtype": "float32", "shape": shape, "values": values}


def _accuracy(trained: TrainedModel) -> dict[str, str]:
    """The test figures of the summary beside the checkpoint, if it speaks of that checkpoint."""
    try:
        summary = RunFolder(trained.path.parent).read_summary() or {}
        counts = dict(summary.get("images", {}))
    except (CheckpointError, TypeError, ValueError):  # a damaged one, which tells nothing
        return {}
    tested = summary.get("tested_model", "last")
    if "test_top1" not in summary or trained.path.name != f"{tested}.pt":
        return {}
    return {
        "test_top1": str(summary["test_top1"]),
        "test_images": str(counts.get("test")),
        "test_flip": _json(bool(summary.get("test_flip"))),
    }


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
