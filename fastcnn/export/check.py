"""Whether a written file computes what the trained network computes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastcnn.data import Images, Normalization
from fastcnn.data.draws import derive_seed
from fastcnn.data.images import Files
from fastcnn.data.progress import progress_bar
from fastcnn.errors import NumbersError
from fastcnn.train.checkpoints.load_run import TrainedModel

# Of the largest logit. Both sides compute in fp32: folding rounds a weight once more (6e-8), and
# sums of up to 4,608 products in another order err by about √4608 · 6e-8 = 4e-6 a layer, less where
# errors cancel; tests/export/test_export_zoo.py found 2.3e-6 at most (a CPU, onnxruntime 1.31,
# 2026-11-22). A norm with another eps, the least fault of such a file, is off by more, as a test
# shows.
TOLERANCE = 1e-4
SMALL_BATCHES = (1, 7)
LARGEST_BATCH = 256


@dataclass(frozen=True)
class Comparison:
    """images: how many, in batches of the sizes `batches`. error: the largest difference of a
    logit. scale: the largest logit's magnitude. equal: share of images with the same prediction,
    of 1."""

    images: int
    batches: tuple[int, ...]
    error: float
    scale: float
    equal: float

    @property
    def relative(self) -> float:
        return self.error / self.scale if self.scale else self.error

    @property
    def passed(self) -> bool:
        # a NaN is not less than anything
        return self.relative <= TOLERANCE


def drawn(images: Images | Files, count: int, seed: int) -> np.ndarray:
    """Return uint8 (n, H, W, 3), at most `count` images, drawn by the seed."""
    order = np.random.default_rng(derive_seed(seed, "export")).permutation(len(images))
    return images.pixels_of(np.sort(order[:count]))


@torch.no_grad()
def compare(
    trained: TrainedModel,
    written: Callable[[Tensor], Tensor],
    pixels: np.ndarray,
    preprocess: bool,
) -> Comparison:
    """Compare `written` with the trained network, norms and all, in plain torch and fp32.

    pixels: uint8 (n, H, W, 3). preprocess: whether `written` takes these, or normalised images.
    Raises NumbersError where the trained network's own logits are not finite.
    """
    wanted, found = [], []
    sizes = tuple(batch_sizes(len(pixels)))
    with progress_bar("checking", len(pixels), announce=False) as advance:
        for part in np.split(pixels, np.cumsum(sizes)[:-1]):
            raw = torch.from_numpy(part)
            images = normalised(raw, trained.normalization)
            wanted.append(trained.model(images))
            found.append(written(raw if preprocess else images.contiguous()))
            advance(len(part))
    return _comparison(torch.cat(wanted), torch.cat(found), sizes, str(trained.path))


def _comparison(wanted: Tensor, found: Tensor, sizes: tuple[int, ...], where: str) -> Comparison:
    if not wanted.isfinite().all():
        raise NumbersError(f"{where}: logits that are not finite: broken weights")
    return Comparison(
        images=len(wanted),
        batches=sizes,
        error=(found - wanted).abs().max().item(),
        scale=wanted.abs().max().item(),
        equal=(found.argmax(1) == wanted.argmax(1)).double().mean().item(),
    )


def normalised(pixels: Tensor, normalization: Normalization) -> Tensor:
    """Return fp32 (n, 3, H, W), channels-last, of uint8 (n, H, W, 3)."""
    return normalization.apply(pixels).permute(0, 3, 1, 2)


def batch_sizes(images: int) -> Iterator[int]:
    """Yield 1, 7, then what is left, in batches of at most 256."""
    for size in SMALL_BATCHES:
        if images > 0:
            yield min(size, images)
        images -= size
    while images > 0:
        yield min(LARGEST_BATCH, images)
        images -= LARGEST_BATCH
