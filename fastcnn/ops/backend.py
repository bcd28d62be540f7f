"""Which implementation of the ops a layer takes: the native library's or plain torch's."""

from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from fastcnn import ops
from fastcnn.errors import BuildError, FastcnnError
from fastcnn.ops import conv_autotune, reference
from fastcnn.ops.native import build

Backend = Literal["auto", "fused", "torch"]
BACKENDS: tuple[Backend, ...] = ("auto", "fused", "torch")


def ops_for(backend: str, x: Tensor | ops.Pending, parameter: Tensor | None = None) -> ModuleType:
    """Return the module whose ops a layer calls on x: `fastcnn.ops` or `fastcnn.ops.reference`.

    "auto" takes the native library where one is loaded and has kernels for x's device and dtype
    beside such a parameter, and no transform of torch.func is at work. What is pending of x, only
    `fastcnn.ops` can apply.
    """
    if isinstance(x, ops.Pending):
        return ops
    if backend == "torch" or (backend == "auto" and not ops.supports(x, parameter)):
        return reference
    return ops


def choose_backend(
    backend: str, device: torch.device, dtype: torch.dtype | None
) -> tuple[Backend, str]:
    """Return "fused" or "torch" for a run, and a note on why "auto" could not take "fused".

    dtype: of autocast, or None for fp32. The library is loaded, and built if need be.
    Raises BuildError where "fused" is asked for and cannot be had.
    """
    if backend == "torch":
        return "torch", ""
    try:
        _require_fused(device, dtype)
    except FastcnnError as error:
        if backend == "fused":
            raise BuildError(f"--backend fused: {error}") from error
        return "torch", f"backend torch: {error}"
    return "fused", ""


def choose_convolution(
    mode: conv_autotune.Mode, backend: str, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Make `mode` the one by which this process chooses convolutions (`conv_autotune.set_mode`).

    backend: as `choose_backend` has chosen; dtype: of autocast, or None for fp32.
    Raises BuildError where "fused" is asked for and cannot be had.
    """
    if mode == "fused" and (reason := _why_not_fused(backend, device, dtype)):
        raise BuildError(f"--conv fused: {reason}")
    conv_autotune.set_mode(mode)


def convolution_of_run(
    mode: conv_autotune.Mode,
    deterministic: bool,
    backend: str,
    device: torch.device,
    dtype: torch.dtype | None,
) -> conv_autotune.Mode:
    """Return the mode by which the network of a run with such options is evaluated: the run's own.

    "auto" where its "fused" cannot be had here, "vendor" for the "auto" of a deterministic run.
    backend, dtype: as in `choose_convolution`, of the evaluation.
    """
    if mode == "fused" and _why_not_fused(backend, device, dtype):
        mode = "auto"
    return "vendor" if mode == "auto" and deterministic else mode


def _why_not_fused(backend: str, device: torch.device, dtype: torch.dtype | None) -> str:
    if backend != "fused":
        return (
            "needs --backend fused, which cannot be had here or was not asked for; use --conv auto"
        )
    reason = conv_autotune.why_vendor(device, dtype or torch.float32)
    return reason and f"{reason}; {_remedy(device, dtype)}"


def _remedy(device: torch.device, dtype: torch.dtype | None) -> str:
    if device.type == "cuda" and dtype is None:
        return "add --amp, or use --conv auto"
    return "use --conv auto"


def _require_fused(device: torch.device, dtype: torch.dtype | None) -> None:
    if dtype is not None and dtype not in ops.DTYPES[device.type]:
        name = str(dtype).removeprefix("torch.")
        raise BuildError(f"no kernels for {name} on the {device.type.upper()}; use --backend torch")
    built = ops.load()
    if device.type != "cuda":
        return
    if not ops.has_kernels("cuda"):
        raise BuildError("the native library has no CUDA kernels; `fastcnn doctor` says why")
    if reason := build.check_gpu_code(torch.cuda.get_device_capability(device), built.archs):
        raise BuildError(reason)
