"""Values from the host into tensors on the device."""

import mmap

import numpy as np
import torch
from torch import Tensor

PIECE = 2**26  # bytes of a file in memory beside their copy


def upload(target: Tensor, values: Tensor) -> None:
    """Write `values` (on the CPU) to `target`, whose address stays, without waiting for the device;
    the copy is queued on a GPU.

    torch keeps the page-locked copy until the device has read it.
    """
    if target.is_cuda:
        values = values.pin_memory()
    target.copy_(values, non_blocking=True)


def resident(values: np.ndarray, device: torch.device) -> Tensor:
    """Return the array (N, ...) as a tensor that stays on `device`: on the CPU the array's own
    memory, but for one that is mapped from a file.

    Such a one is copied, for a file that is cut while it is mapped would kill the process; piece by
    piece, so that memory never holds the whole file twice.
    """
    file = mapped_file(values)
    if file is None:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)
    target = torch.empty(values.shape, dtype=torch.from_numpy(values[:0]).dtype, device=device)
    count = max(PIECE * len(values) // max(values.nbytes, 1), 1)
    for start in range(0, len(values), count):
        target[start : start + count] = torch.from_numpy(values[start : start + count])
        file.madvise(mmap.MADV_DONTNEED)
    return target


def mapped_file(values: np.ndarray) -> mmap.mmap | None:
    """Return the mapping of a file that the array, or what it is a view of, lies in."""
    owner: object = values
    while isinstance(owner, np.ndarray):
        owner = owner.base
    return owner if isinstance(owner, mmap.mmap) else None
