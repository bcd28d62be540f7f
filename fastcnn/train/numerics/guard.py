"""What keeps a step whose gradients are not finite from leaving anything behind.

It is decided on the device, before the update; the host looks when it likes (`ended`). Without a
loss scale the first such step ends the training: weights, moments, running statistics and figures
stay those of the step before, whatever was launched since. With one, fp16 overflows now and then:
such steps are skipped and counted, and LIMIT of them in a row end the training.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.ops.backend import ops_for
from fastcnn.train.async_scalar import AsyncScalar
from fastcnn.train.checkpoints.checkpoint import copy_checked_
from fastcnn.train.numerics.scaling import LossScale
from fastcnn.train.numerics.statistics import in_one

LOOK_S = 1.0  # between two looks at what a GPU decided
LIMIT = 25  # skipped steps in a row: the scale has fallen from 65,536 to 1/512


class Guard:
    """The judge of a run's steps. `found`: fp32 (), not 0 where the present step is to leave
    nothing behind, as the updates of fastcnn.ops take it."""

    def __init__(
        self,
        model: nn.Module,
        scale: LossScale | None,
        device: torch.device,
        backend: str = "auto",
    ):
        self.scale = scale
        self.found = torch.zeros((), device=device)
        self.statistics = in_one(model)
        self._before = None if self.statistics is None else self.statistics.clone()
        self._backend = backend
        # skipped steps of this epoch, those in a row, whether the training is over
        self._counts = torch.zeros(3, device=device)
        self._over = self.found if scale is None else self._counts[2]
        self._arriving, self._due = AsyncScalar(device), 0.0

    def snapshot(self) -> None:
        """Keep the running statistics as they are before the forward pass."""
        if self._before is not None and self.statistics is not None:
            self._before.copy_(self.statistics)

    @torch.no_grad()
    def check_finite(self, gradients: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Set `found`; return bool (): whether the figures of the step do not count either.

        gradients: in memory without gaps.
        """
        if self.scale is not None:
            self.found.copy_(self._over)
        ops_for(self._backend, gradients[0]).find_nonfinite_(list(gradients), self.found)
        if self.scale is None:
            return self.found != 0
        # what overflows is most often a gradient alone; x - x is 0 for finite numbers only
        return (self._over + (loss.detach() - loss.detach())) != 0

    @torch.no_grad()
    def commit(self) -> None:
        """After the update: take back what the forward pass did to the statistics; count."""
        if self._before is not None and self.statistics is not None:
            skip = self.found != 0
            torch.where(skip, self._before, self.statistics, out=self.statistics)
        if self.scale is not None:
            self.scale.update(self.found)
            skipped, in_a_row, over = self._counts.unbind()
            skipped += self.found
            in_a_row.add_(1).mul_(self.found)
            over += in_a_row >= LIMIT

    def ended(self, wait: bool = True) -> bool:
        """Whether a step has ended the training; without `wait`, as the device told a while ago."""
        if wait or self._over.device.type == "cpu":
            return bool(self._over)
        now = time.monotonic()
        if now < self._due:
            return False
        self._due = now + LOOK_S
        seen = self._arriving(self._over)
        return seen is not None and bool(seen)

    def skipped(self) -> int:
        """Steps skipped in this epoch (synchronises)."""
        return int(self._counts[0])

    def reset(self) -> None:
        """Begin an epoch."""
        self._counts[0] = 0

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        copy_checked_(self._counts, state["counts"])
        if not self._counts.isfinite().all():
            raise ValueError("the counts of skipped steps are not finite")
