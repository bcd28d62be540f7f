"""The formats: their files' endings, what each needs and takes. Needs no torch."""

import importlib
import importlib.util
from typing import Literal

from fastcnn.errors import UsageError
from fastcnn.text import first_line

Format = Literal["onnx", "torch", "safetensors"]
Names = Literal["own", "torchvision"]

SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2", "safetensors": ".safetensors"}
# of the extra `export`
PACKAGES: dict[Format, tuple[str, ...]] = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch": (),
    "safetensors": ("safetensors",),
}
OPSETS = (18, 23)  # the oldest and the newest that torch writes by itself


def check_options(format: Format, preprocess: bool, names: Names, opset: int | None) -> None:  # noqa: A002
    """Raise UsageError for an option that the format has not, and for a package that is missing."""
    if preprocess and format == "safetensors":
        raise UsageError("--preprocess: safetensors holds weights alone; use onnx or torch")
    if names != "own" and format != "safetensors":
        raise UsageError(f"--names {names}: --format {format} has the network; use safetensors")
    if opset is not None and format != "onnx":
        raise UsageError(f"--opset: --format {format} has none; it is ONNX's")
    if opset is not None and not OPSETS[0] <= opset <= OPSETS[1]:
        raise UsageError(f"--opset: expected {OPSETS[0]} to {OPSETS[1]}, got {opset}")
    for package in PACKAGES[format]:
        remedy = "pip install 'fastcnn[export]'"
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"--format {format}: the package {package} is missing; {remedy}")
        try:
            importlib.import_module(package)
        except Exception as error:  # a broken package raises anything
            raise UsageError(
                f"--format {format}: the package {package} cannot be imported "
                f"({first_line(error)}); {remedy}"
            ) from error
