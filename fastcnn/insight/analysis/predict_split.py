"""One pass over images with the tested model of a run: what it says of each of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastcnn.archs.fold import fold
from fastcnn.data import Dataset, Images
from fastcnn.data.images import Files
from fastcnn.data.progress import SLOW_IMAGES, progress_bar
from fastcnn.errors import NumbersError
from fastcnn.train.checkpoints.load_run import Feed, TrainedModel, feed, open_trained
from fastcnn.train.evaluate import predict
from fastcnn.train.host import tune_process
from fastcnn.train.numerics.precision import choose_device


@dataclass(frozen=True)
class Observation:
    """logits: float32 (n, classes); labels: int64 (n,), both in the order of `images`, which are
    those of `split` in `dataset`. words: what was looked at, in lines."""

    logits: np.ndarray
    labels: np.ndarray
    images: Images | Files
    dataset: Dataset
    split: str
    trained: TrainedModel
    device: torch.device
    words: tuple[str, ...]

    @property
    def predicted(self) -> np.ndarray:
        """The class of the largest logit, int64 (n,); of equal ones the first."""
        return self.logits.argmax(1)

    @property
    def probabilities(self) -> np.ndarray:
        """The softmax of the logits, float64 (n, classes)."""
        logits = self.logits.astype(np.float64)
        exponents = np.exp(logits - logits.max(1, keepdims=True))
        return exponents / exponents.sum(1, keepdims=True)


def open_tested(
    run: str, weights: str | None, options: dict[str, Any]
) -> tuple[TrainedModel, torch.device]:
    """Set up the process, and restore the model of a run as fastcnn.train.run.evaluate_run does."""
    tune_process(options.get("threads"))
    device = choose_device(options.get("device", "auto"))
    return open_trained(run, device, options.get("backend", "auto"), weights), device


def observe(
    trained: TrainedModel,
    device: torch.device,
    data: str | None = None,
    split_name: str = "test",
    overrides: dict[str, Any] | None = None,
) -> Observation:
    """Look at every image of a split as `fastcnn eval` does: with the norms folded, in the run's
    precision, seen both ways where the run tests so.

    data, split_name, overrides and errors: as for fastcnn.train.run.evaluate_run; NumbersError for
    a logit that is not finite.
    """
    own = feed(trained, device, data, split_name, overrides or {})
    dataset, images, precision = own.dataset, own.images, own.precision
    parts = []
    slow = len(images) > SLOW_IMAGES
    with progress_bar("looking at images", len(images), announce=slow) as advance:
        for batch in _batches(trained, own):
            parts.append(batch)
            advance(len(batch[1]))
    logits, labels = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    if not np.isfinite(logits).all():
        raise NumbersError(f"{trained.path}: a logit is not finite: broken weights")
    seen = ", each seen both ways" if own.flip else ""
    words = (
        f"network: {trained.config.model.arch}, {trained.path.name}, {precision.name} on {device}",
        f"images: {len(images):,} {split_name} images of {dataset.name}{seen}",
    )
    return Observation(logits, labels, images, dataset, split_name, trained, device, words)


@torch.no_grad()
def _batches(trained: TrainedModel, own: Feed) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits fp32 and labels of each batch, on the host."""
    dtype = own.precision.dtype
    network = fold(trained.model, dtype)
    for images, labels in own.loader:
        logits = predict(network, images.to(dtype or images.dtype), own.flip)
        yield logits.float().cpu(), labels.cpu()
