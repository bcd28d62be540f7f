"""A small tensor of the device, seen from the host without waiting for it."""

import torch
from torch import Tensor


class AsyncScalar:
    """Each call asks for the values as they are once the device has come to this point, and returns
    what the call before asked for: None where that has not arrived, or nobody asked."""

    def __init__(self, device: torch.device):
        self._arriving: Tensor | None = None
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def __call__(self, tensor: Tensor) -> Tensor | None:
        if self._event is None:
            return tensor.clone()
        if self._arriving is not None and not self._event.query():
            return None
        found = self._arriving
        self._arriving = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._arriving.copy_(tensor, non_blocking=True)
        self._event.record()
        return found

    def forget(self) -> None:
        """What was asked for is of no interest any more."""
        self._arriving = None
