"""Loss, accuracy and confusion of a model over a loader, every image counted once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.train.metrics import Figures, Metrics, confusion, cross_entropy
from fastcnn.train.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """Figures, confusion counts int64 (classes, classes) on the host, and the time taken."""

    figures: Figures
    confusion: Tensor
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.figures.images / max(self.seconds, 1e-9)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Any,
    classes: int,
    precision: Precision,
    device: torch.device,
    after_batch: Callable[[], None] | None = None,
    batches: int | None = None,
    flip: bool = False,
) -> Evaluation:
    """Run `model` over `loader` in evaluation mode; at most `batches` batches if given.

    `flip`: an image's logits are the mean of its own and of those of its mirror image.
    `after_batch` is called after each batch; what it raises ends the evaluation.
    """
    was_training = model.training
    model.eval()
    metrics = Metrics(device)
    counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
    start = time.perf_counter()
    try:
        for number, (images, labels) in enumerate(loader, 1):
            with precision.autocast():
                logits = predict(model, images, flip)
            metrics.update(cross_entropy(logits, labels), logits, labels)
            counts += confusion(logits, labels)
            if after_batch:
                after_batch()
            if number == batches:
                break
    finally:
        model.train(was_training)
    figures = metrics.read()
    return Evaluation(figures, counts.cpu(), time.perf_counter() - start)


def predict(model: nn.Module, images: Tensor, flip: bool) -> Tensor:
    """Logits (N, classes) of images (N, 3, H, W); with `flip` the mean over both directions."""
    logits = model(images)
    if not flip:
        return logits
    # in half precision the sum would be rounded once more
    precise = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(precise) + model(images.flip(-1)).to(precise)) / 2
