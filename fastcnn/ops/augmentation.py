"""Augmentation: a training batch from resident uint8 images in one kernel, for CPU and CUDA.

The random choices are drawn in the kernel, from a counter (csrc/draws.h), so that they depend on
(seed, epoch, sample) alone. `fastcnn.ops.reference.augment` gives the same bits in plain torch.
"""

import torch
from torch import Tensor

from fastcnn.ops.loading import define, ready, schemas
from fastcnn.ops.reference.augmentation import FLIPS, require_flip

_ops = torch.ops.fastcnn

define(
    "augment",
    "(Tensor images, Tensor labels, Tensor order, Tensor at, SymInt count, Tensor scale, "
    "Tensor bias, Tensor fill, int seed, int padding, bool reflect, int flip, int cutout, "
    "bool gathered, ScalarType dtype) -> (Tensor x, Tensor y)",
)


@torch.library.register_fake("fastcnn::augment", lib=schemas)
def _(images, labels, order, at, count, *options):  # type: ignore
    _, height, width, channels = images.shape
    x = images.new_empty((count, height, width, channels), dtype=options[-1])
    return x.permute(0, 3, 1, 2), labels.new_empty((count,))


def augment(
    images: Tensor,
    labels: Tensor,
    order: Tensor,
    at: Tensor,
    count: int,
    scale: Tensor,
    bias: Tensor,
    fill: Tensor,
    *,
    seed: int,
    padding: int = 0,
    reflect: bool = True,
    flip: str = "none",
    cutout: int = 0,
    gathered: bool = False,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Return the `count` images and labels that come next: x (count, 3, H, W), channels-last, of
    `dtype`, and y int64 (count,).

    images: uint8 (M, H, W, 3). labels: int64 (M,). order: int64 (L,), sample numbers.
    at: int64 (2,), epoch and position; image i of the batch is sample order[(position + i) % L].
    scale: fp32 (3,). bias: fp32 (3,) or (H, W, 3). fill: fp32 (3,). All contiguous, on one device;
    `at` is read there, so that a captured call makes another batch once it has changed.
    gathered: image and label i of `images` and `labels` (M >= count) are those of image i of the
    batch, whatever its sample number, from which its choices are drawn all the same.
    padding: a window of H x W is cut at random from the image with so many pixels around it:
    reflected without the edge, or zero. flip: mirrored left-right after that; "random", or
    "alternating": one half of the samples in even epochs, the other in odd ones, or "none".
    A pixel becomes pixel * scale + bias, both operations rounded to fp32, then to `dtype`: fp32,
    bf16, fp16 (CUDA), fp64 (CPU). cutout: last of all a square of so many pixels a side around any
    pixel is set to `fill`; what lies outside the image is lost.

    What becomes of a sample depends on (seed, epoch, sample) alone, and has the same bits on every
    device. No gradient. On a GPU sample numbers and position are not checked.
    Raises ValueError for an unknown flip, RuntimeError for another shape, dtype, layout or device,
    count < 1, fewer gathered images than count, negative padding or cutout, padding too wide to
    reflect, and on the CPU for samples out of range and a negative epoch or position; BuildError
    without a library.
    DeVries and Taylor 2017, arXiv:1708.04552; alternating flip: Jordan 2024, arXiv:2404.00498.
    """
    ready()
    require_flip(flip)
    options = (seed, padding, reflect, FLIPS.index(flip), cutout, gathered, dtype)
    return _ops.augment(images, labels, order, at, count, scale, bias, fill, *options)
