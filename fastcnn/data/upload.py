"""Values from the host into a tensor on the device, without waiting for it."""

from torch import Tensor


def upload(target: Tensor, values: Tensor) -> None:
    """Write `values` (on the CPU) to `target`, whose address stays; the copy is queued on a GPU.

    torch keeps the page-locked copy until the device has read it.
    """
    if target.is_cuda:
        values = values.pin_memory()
    target.copy_(values, non_blocking=True)
