"""ONNX: one file with the weights in it, run by onnxruntime."""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcnn.errors import UsageError
from fastcnn.export.network import BATCH, INPUT, OUTPUT, Exported, traced

LARGEST = 2**31 - 1  # bytes of a protobuf message


def encode(network: Exported, metadata: dict[str, str], opset: int | None = None) -> bytes:
    """Return an ONNX model with `metadata` in its metadata_props; opset: default torch's.

    Raises UsageError for an opset that torch cannot write and for a model of 2 GB or more.
    """
    import onnx

    bytes_ = sum(tensor.nbytes for tensor in network.state_dict().values())
    if bytes_ > LARGEST:
        raise UsageError(f"--format onnx: {bytes_:,} bytes of weights; one file holds {LARGEST:,}")
    model = _model(network, opset)
    if opset is not None and (found := model.opset_import[0].version) != opset:
        raise UsageError(f"--opset {opset}: torch {torch.__version__} writes only {found} of this")
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        del part.metadata_props[:]  # torch's notes, files and lines of this machine among them
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def _model(network: Exported, opset: int | None) -> Any:
    """An onnx.ModelProto by torch's exporter, without what that prints and logs."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                traced(network),
                (network.example(),),
                dynamo=True,
                verbose=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=opset,
                dynamic_shapes=({0: BATCH},),
            )
    finally:
        logger.setLevel(level)
    assert program is not None
    return program.model_proto


def reader(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the model of a file as a function of images, run by onnxruntime on the CPU."""
    opened = session(path, session_options())
    return lambda images: torch.from_numpy(opened.run([OUTPUT], {INPUT: images.numpy()})[0])


def session_options() -> Any:
    """onnxruntime's options for a session with as many threads as torch, that logs errors alone."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors
    return options


def session(model: Path | bytes, options: Any) -> Any:
    """onnxruntime's session of a file, or of what is in one, on the CPU."""
    import onnxruntime

    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
