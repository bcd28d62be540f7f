"""Loss, accuracy and confusion of a model over a loader, every image counted once."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.archs.fold import Folded
from fastcnn.data.loaders import Loader
from fastcnn.train.distributed import ALONE, Distributed
from fastcnn.train.graph import Recorder, Replay
from fastcnn.train.metrics import Figures, Metrics, confusion, cross_entropy
from fastcnn.train.numerics.precision import Precision


@dataclass(frozen=True)
class Evaluation:
    """Figures, confusion counts int64 (classes, classes) on the host, and the time taken."""

    figures: Figures
    confusion: Tensor
    seconds: float

    @property
    def images_per_s(self) -> float:
        return self.figures.images / max(self.seconds, 1e-9)


class Evaluator:
    """Evaluates a model on a loader as often as wanted; with a recorder by CUDA graphs.

    `folded.network` computes: the model with its norms folded, in the precision's dtype, refreshed
    by each evaluation; the model itself is read and no more. `flip`: the logits are the mean of
    those of an image and of its mirror image. `required`: see `Replay`. `loss`: as the option.
    `ranks`: each of which has a part of the images; the figures are those of all.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Any,
        classes: int,
        precision: Precision,
        device: torch.device,
        flip: bool = False,
        recorder: Recorder | None = None,
        required: bool = False,
        loss: str = "cross-entropy",
        ranks: Distributed = ALONE,
    ):
        self.loader, self.flip, self.loss, self.ranks = loader, flip, loss, ranks
        self.dtype = precision.dtype
        self.folded = Folded(model, self.dtype)
        self.metrics = Metrics(device)
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)
        self.replay = Replay(recorder, required)

    @torch.no_grad()
    def __call__(
        self, after_batch: Callable[[], None] | None = None, batches: int | None = None
    ) -> Evaluation:
        """Run over the loader with the weights as they are now; at most `batches` batches if given.

        `after_batch` is called after each batch; what it raises ends the evaluation.
        """
        start = time.perf_counter()
        self.folded.refresh()
        self.metrics.reset()
        self.counts.zero_()
        if isinstance(self.loader, Loader):
            self.loader.load_state_dict({"epoch": 0, "position": 0})
        for number, _ in enumerate(self.replay.epoch(self.loader, self._work), 1):
            if after_batch:
                after_batch()
            if number == batches:
                break
        self.ranks.all_reduce_sum(self.counts)
        figures = self.metrics.gather(self.ranks)
        return Evaluation(figures, self.counts.cpu(), time.perf_counter() - start)

    def _work(self, images: Tensor, labels: Tensor) -> None:
        """One batch, on the device alone."""
        images = images.to(self.dtype or images.dtype)
        logits = predict(self.folded.network, images, self.flip)
        loss = cross_entropy(logits, labels, loss=self.loss)
        self.metrics.update(loss, logits, labels)
        self.counts += confusion(logits, labels)


def predict(model: nn.Module, images: Tensor, flip: bool) -> Tensor:
    """Logits (N, classes) of images (N, 3, H, W); with `flip` the mean over both directions."""
    logits = model(images)
    if not flip:
        return logits
    # in half precision the sum would be rounded once more
    precise = torch.promote_types(logits.dtype, torch.float32)
    return (logits.to(precise) + model(images.flip(-1)).to(precise)) / 2


def evaluate(
    model: nn.Module,
    loader: Any,
    classes: int,
    precision: Precision,
    device: torch.device,
    flip: bool = False,
    loss: str = "cross-entropy",
) -> Evaluation:
    """Evaluate once; see `Evaluator`."""
    return Evaluator(model, loader, classes, precision, device, flip, loss=loss)()
