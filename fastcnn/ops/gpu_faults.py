"""Errors that a GPU does not recover from, told apart from refusals.

After an illegal access, an assertion or a hang of a kernel, every call of the process fails with
the same error. Who catches errors of GPU work in order to go on in another way must ask here first.
"""

import torch

from fastcnn.errors import FastcnnError
from fastcnn.text import first_line


class GpuError(FastcnnError):
    """A kernel has failed, and with it the process's use of the GPU."""


def require_alive(device: torch.device, error: Exception, doing: str, remedy: str = "") -> None:
    """Raise GpuError if the GPU of `device` takes no more work after `error`.

    Waits for the device; nothing on a CPU. doing: what was done, as "--graph on". remedy: what does
    without it, as "--graph off".
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as found:
        instead = f", or with {remedy}" if remedy else ""
        raise GpuError(
            f"{doing}: a kernel has failed on {device}, which takes no more work of this process "
            f"({first_line(found)}): start again with CUDA_LAUNCH_BLOCKING=1, which shows the "
            f"kernel{instead}"
        ) from error
