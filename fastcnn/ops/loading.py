"""The native library as torch sees it: loading it, and what it has kernels for."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops.native import build

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}

schemas = torch.library.Library("fastcnn", "DEF")
_loaded = False


def load() -> build.Built:
    """Load the native library, building it first where that was not done; raises BuildError."""
    global _loaded
    built = build.load()
    _loaded = True
    return built


def supports(x: Any, parameter: Tensor | None = None) -> bool:
    """Whether a library is loaded that has kernels for what a convolution makes of tensors like x,
    beside such a parameter."""
    dtype = product_dtype(x)
    if not _loaded or dtype not in DTYPES.get(x.device.type, ()):
        return False
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fits = parameter is None or parameter.dtype == wide
    return fits and has_kernels(x.device.type) and not _transformed()


def product_dtype(x: Any) -> torch.dtype:
    """The dtype that torch takes x in for a product: under autocast autocast's, but fp64 stays."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind not in DTYPES or not torch.is_autocast_enabled(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind)


def has_kernels(device_type: str) -> bool:
    """Whether the loaded library has kernels for "cpu" or "cuda"."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device_type]
    return torch._C._dispatch_has_kernel_for_dispatch_key("fastcnn::bn_act", key)


def _transformed() -> bool:
    """Whether forward-mode differentiation or a transform of torch.func is at work."""
    if torch.compiler.is_compiling():
        return False
    dual = torch.autograd.forward_ad._current_level >= 0
    return dual or torch._C._functorch.peek_interpreter_stack() is not None


def ready() -> None:
    """Load the library before an op's first call; refuse what its ops have no rules for."""
    if torch.compiler.is_compiling():
        return
    if _transformed():  # torch would take the tangents for zeros
        raise RuntimeError(
            "fastcnn ops have no forward-mode derivative and no rules for torch.func; "
            "use backend torch"
        )
    if not _loaded:
        load()


def define(name: str, schema: str) -> None:
    """Declare an op of the library."""
    schemas.define(name + schema)
