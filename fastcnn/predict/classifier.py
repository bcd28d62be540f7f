"""A trained network that turns pixels into probabilities, as `fastcnn eval` would see them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastcnn.archs.fold import fold
from fastcnn.data.examine import View
from fastcnn.errors import NumbersError
from fastcnn.train.checkpoints.load_run import TrainedModel, choose_arithmetic, open_trained
from fastcnn.train.evaluate import predict
from fastcnn.train.numerics.precision import Precision, choose_device


@dataclass(frozen=True)
class Classifier:
    """`network`: the trained one, its norms folded, in the precision's dtype. `flip`: the logits
    are the mean of those of an image and of its mirror image."""

    trained: TrainedModel
    network: nn.Module
    device: torch.device
    precision: Precision
    flip: bool

    @property
    def view(self) -> View:
        """How an image of any size is brought to the network's, as the run's own were."""
        return View(self.trained.image_size, self.trained.config.data.resize)

    def normalised(self, pixels: np.ndarray) -> Tensor:
        """Return fp32 (n, 3, H, W), channels-last strides, on the device, of uint8 (n, H, W, 3)."""
        on_device = torch.from_numpy(np.ascontiguousarray(pixels)).to(self.device)
        return self.trained.normalization.apply(on_device).permute(0, 3, 1, 2)

    @torch.no_grad()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Return the softmax of the logits, fp32 (n, classes), of images uint8 (n, H, W, 3) of the
        network's size. Raises NumbersError where a logit is not finite."""
        images = self.normalised(pixels).to(self.precision.dtype or torch.float32)
        logits = predict(self.network, images, self.flip)
        found = logits.float().softmax(1).cpu().numpy()
        if not np.isfinite(found).all():
            raise NumbersError(f"{self.trained.path}: logits that are not finite: broken weights")
        return found


def open_classifier(
    target: str | Path, weights: str | None = None, options: dict[str, Any] | None = None
) -> Classifier:
    """Restore a run or checkpoint to predict with; `options` by name, as of `evaluate_run`: device,
    backend, conv, amp, amp_dtype, test_flip. Raises as `open_trained`."""
    options = options or {}
    device = choose_device(options.get("device", "auto"))
    trained = open_trained(target, device, options.get("backend", "auto"), weights)
    precision, _ = choose_arithmetic(trained, options, device)
    flip = options.get("test_flip", trained.config.optim.test_flip)
    return Classifier(trained, fold(trained.model, precision.dtype), device, precision, flip)


def most_probable(probabilities: np.ndarray, count: int) -> np.ndarray:
    """Return int64 (n, count): the classes in falling order, of equal ones the first."""
    return np.argsort(-probabilities, axis=1, kind="stable")[:, :count]
