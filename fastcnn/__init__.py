"""fastcnn: train convolutional image classifiers as fast as the hardware allows."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastcnn.version import __version__

if TYPE_CHECKING:
    from fastcnn.api import load, train

__all__ = ["__version__", "load", "train"]


def __getattr__(name: str) -> Any:
    # only now, for they import torch
    if name == "load":
        return import_module("fastcnn.api").load
    if name == "train":  # a package that can be called: see there
        return import_module("fastcnn.train")
    raise AttributeError(f"module 'fastcnn' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
