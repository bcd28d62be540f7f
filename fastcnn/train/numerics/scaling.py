"""What multiplies the gradients before the update: the loss's scale undone, their norm clipped.

Everything stays on the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcnn.train.checkpoints.checkpoint import copy_checked_

# of the scale, as in torch.amp.GradScaler: Micikevicius et al. 2018, section 3.2
INITIAL, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000


class LossScale:
    """The factor of the loss that keeps fp16 gradients above the smallest fp16 number.

    It doubles after 2,000 good steps and halves after a step whose gradients overflowed, which the
    optimiser then skips.
    """

    def __init__(self, device: torch.device):
        self.scale = torch.full((1,), INITIAL, device=device)
        self._good_steps = torch.zeros(1, dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Adapt the scale after a step; found_inf fp32 (): not 0 where it was skipped."""
        torch._amp_update_scale_(self.scale, self._good_steps, found_inf, GROWTH, BACKOFF, INTERVAL)

    def state_dict(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        copy_checked_(self.scale, state["scale"])
        copy_checked_(self._good_steps, state["good_steps"])


@torch.no_grad()
def gradient_factor(
    gradients: Sequence[Tensor], clip: float, scale: LossScale | None
) -> Tensor | None:
    """Return what to multiply the gradients with, fp32 (), or None for 1.

    clip: largest 2-norm of all gradients together, after unscaling; 0: off.
    """
    factor = None if scale is None else scale.scale[0].reciprocal()
    if not clip:
        return factor
    wide = torch.promote_types(gradients[0].dtype, torch.float32)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(gradients), 2, wide)))
    unscaled = norm if factor is None else norm * factor
    clipped = (clip / (unscaled + 1e-6)).clamp(max=1.0)
    return (clipped if factor is None else clipped * factor).float()
