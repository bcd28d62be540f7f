"""Loss and accuracy, summed on the device: reading them is the only synchronisation."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcnn.train.async_scalar import AsyncScalar
from fastcnn.train.distributed import ALONE, Distributed


@dataclass(frozen=True)
class Figures:
    """Means over `images` images; accuracies are fractions of 1. The loss of none is nan."""

    loss: float
    top1: float
    top5: float
    images: int


class Metrics:
    """Running sums of loss, top-1 and top-5 hits, images and batches: float64 (5,), exact up to
    2^53."""

    def __init__(self, device: torch.device):
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)
        self._arriving = AsyncScalar(device)

    @torch.no_grad()
    def update(
        self, loss: Tensor, logits: Tensor, labels: Tensor, skip: Tensor | None = None
    ) -> None:
        """Add a batch: `loss` is its mean (), `logits` (N, classes), `labels` int64 (N,).

        skip: bool (); where it is true the batch does not count.
        """
        count = labels.shape[0]
        best = logits.topk(min(5, logits.shape[1])).indices
        top1, top5 = logits.argmax(1) == labels, best == labels[:, None]
        images, one = (torch.full_like(loss, n, dtype=torch.float64) for n in (count, 1))
        row = torch.stack([loss.double() * count, top1.sum(), top5.sum(), images, one])
        self.sums += row if skip is None else row.masked_fill(skip, 0)

    def read(self) -> Figures:
        """Copy the sums to the host (synchronises) and divide."""
        return _figures(self.sums)

    def batches(self) -> int:
        """Batches that this process has counted (synchronises)."""
        return int(self.sums[4])

    def gather(self, ranks: Distributed) -> Figures:
        """Return the figures of all ranks together; rank 0 has their sums from then on, the others
        begin anew."""
        whole = self.sums[:4].clone()
        ranks.all_reduce_sum(whole)
        self.sums[:4] = whole if ranks.first else 0
        return _figures(torch.cat([whole, self.sums[4:]]))

    def load(self, sums: Tensor, batches: int, ranks: Distributed = ALONE) -> None:
        """Take up what was gathered, `batches` batches into the epoch. Raises ValueError for sums
        of another number."""
        if sums.shape not in ((4,), (5,)):  # batches were not counted before format 3
            raise ValueError(f"the sums of the epoch are {tuple(sums.shape)}")
        self.sums[:4] = sums[:4] if ranks.first else 0
        self.sums[4] = batches

    def peek(self) -> Figures | None:
        """The figures as the device had them a while ago, without waiting for it.

        Each call asks for the sums as they are once the device has come to this point, and returns
        what the call before asked for: None where that has not arrived, or nobody asked.
        """
        found = self._arriving(self.sums)
        return None if found is None else _figures(found)

    def reset(self) -> None:
        self.sums.zero_()
        self._arriving.forget()


def _figures(sums: Tensor) -> Figures:
    loss, top1, top5, count, _ = sums.tolist()
    mean = loss / count if count else math.nan
    return Figures(mean, top1 / max(count, 1), top5 / max(count, 1), int(count))


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts int64 (classes, classes): row = true class, column = predicted class."""
    classes = logits.shape[1]
    pairs = labels * classes + logits.argmax(1)
    # bincount would wait for the device to learn its largest value
    counts = torch.zeros(classes * classes, dtype=torch.int64, device=logits.device)
    return counts.scatter_add_(0, pairs, torch.ones_like(pairs)).view(classes, classes)


def cross_entropy(
    logits: Tensor, labels: Tensor, smoothing: float = 0.0, loss: str = "cross-entropy"
) -> Tensor:
    """Mean cross-entropy in fp32, whatever the dtype of the logits; "softmax-twice": of their
    softmax, as if that were logits, which leaves it within 1 of its start at ln(classes)."""
    logits = logits.float()
    if loss == "softmax-twice":
        logits = logits.softmax(1)
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)
