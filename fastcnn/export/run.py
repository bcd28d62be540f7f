"""Export a run: write, read back, compare with the trained network, only then give it its name."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcnn.data import load_dataset
from fastcnn.errors import DataError, NumbersError, UsageError
from fastcnn.export import check, onnx_file, safetensors_file, torch_file
from fastcnn.export.formats import SUFFIXES, Format, Names, check_options
from fastcnn.export.metadata import describe, describe_input
from fastcnn.export.network import exported_network
from fastcnn.files import replacing
from fastcnn.train.checkpoints.load_run import (
    TrainedModel,
    evaluation_data,
    open_trained,
    other_data,
)
from fastcnn.train.host import tune_process

CPU = torch.device("cpu")
Reader = Callable[[Path], Callable[[Tensor], Tensor]]


@dataclass(frozen=True)
class Result:
    """path, bytes: of the file. input: see `describe_input`, None where it holds weights alone.
    checked_on: which images. comparison: with the trained network."""

    path: Path
    format: str
    arch: str
    bytes: int
    input: dict[str, Any] | None
    checked_on: str
    comparison: check.Comparison

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON would have it."""
        plain = asdict(self) | {"path": str(self.path)}
        figures = {"relative": self.comparison.relative, "tolerance": check.TOLERANCE}
        return plain | {"comparison": plain["comparison"] | figures}


def export_run(
    target: str,
    format: Format,  # noqa: A002
    *,
    output: str | None = None,
    preprocess: bool = False,
    names: Names = "own",
    weights: str | None = None,
    data: str | None = None,
    images: int = 256,
    opset: int | None = None,
    overrides: dict[str, Any] | None = None,
) -> Result:
    """Write the network of a run folder or checkpoint file as `format`, checked against it.

    output: default <arch>.onnx, .pt2 or .safetensors beside the checkpoint. The file takes its name
    only once it was read back and its logits on `images` of the run's own test images (data: of
    those of other data, whatever their classes) were those of the trained network in plain torch;
    until then a file of that name stays. overrides: options by name: threads, and those of data.

    Raises UsageError for options that contradict each other, CheckpointError for a checkpoint that
    is missing or damaged and for a disk that refuses, NumbersError for a file that computes
    something else, DataError for images that cannot be read.
    """
    options = overrides or {}
    check_options(format, preprocess, names, opset)
    tune_process(options.get("threads"))
    trained = open_trained(target, CPU, "torch", weights)
    path = destination(trained, format, output)
    # before the images: they may take long, and what cannot be exported needs none
    content, reader = _encoded(trained, format, preprocess, names, opset)
    pixels, where = _pixels(trained, data, images, options)
    with replacing(path, content) as temporary:
        comparison = check.compare(trained, reader(temporary), pixels, preprocess)
        if not comparison.passed:
            raise NumbersError(
                f"{path}: not written, its logits differ from the trained network's by up to "
                f"{comparison.error:.2g}, {comparison.relative:.1e} of the largest "
                f"(allowed: {check.TOLERANCE:g})"
            )
    taken = None if format == "safetensors" else describe_input(trained.image_size, preprocess)
    arch = trained.config.model.arch
    return Result(path, format, arch, len(content), taken, where, comparison)


def destination(trained: TrainedModel, format: Format, output: str | None) -> Path:  # noqa: A002
    """Return the file to write; raises UsageError for a name of another kind of file."""
    suffix = SUFFIXES[format]
    if output is None:
        return trained.path.parent / f"{trained.config.model.arch}{suffix}"
    path = Path(output)
    # nothing else in a run folder ends so, a checkpoint least of all
    if path.suffix != suffix:
        raise UsageError(f"--output {output}: expected a file name that ends with {suffix}")
    if path.is_dir():
        raise UsageError(f"--output {output}: is a folder; give a file name")
    if not path.parent.is_dir():
        raise UsageError(f"--output {output}: there is no folder {path.parent}")
    return path


def _encoded(
    trained: TrainedModel,
    format: Format,  # noqa: A002
    preprocess: bool,
    names: Names,
    opset: int | None,
) -> tuple[bytes, Reader]:
    """The file's content, and what reads such a file."""
    metadata = describe(trained, preprocess)
    if format == "onnx":
        network = exported_network(trained, preprocess)
        return onnx_file.encode(network, metadata, opset), onnx_file.reader
    if format == "torch":
        return torch_file.encode(exported_network(trained, preprocess), metadata), torch_file.reader
    weights = safetensors_file.weights_of(trained, names)
    content = safetensors_file.encode(weights, metadata)
    if names == "own":
        return content, safetensors_file.reader
    return content, lambda path: safetensors_file.torchvision_reader(path, trained)


def _pixels(
    trained: TrainedModel, data: str | None, count: int, options: dict[str, Any]
) -> tuple[np.ndarray, str]:
    """Test images, uint8 (n, H, W, 3), of the run or of other data, and where they are from."""
    options = {name: value for name, value in options.items() if hasattr(trained.config.data, name)}
    if data is None:
        try:
            dataset, images = evaluation_data(trained, None, "test", options, CPU)
        except (DataError, UsageError) as error:
            raise DataError(
                f"{error}; any images can check an export: --data digits, or a folder"
            ) from error
    else:
        config = other_data(trained.config.data, data, trained.image_size, options)
        dataset = load_dataset(config, trained.image_size, CPU)
        images = dataset.test
    return check.drawn(images, count, trained.config.run.seed), f"test images of {dataset.name}"
