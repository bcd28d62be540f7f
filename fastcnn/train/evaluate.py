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
) -> Evaluation:
    """Run `model` over `loader` in evaluation mode; at most `batches` batches if given.

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
                logits = model(images)
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
