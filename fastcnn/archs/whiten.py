"""Whitening filters for the first convolution, measured on training images.

Neighbouring pixels are almost alike, and so are the three colours. A first layer whose outputs
are uncorrelated and equally strong spares the network the epochs in which it would learn that:
Page 2019, "How to train your ResNet 8: bag of tricks"; Jordan 2024, arXiv 2404.00498, section 3.
"""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

EPSILON = 1e-2
"""Added to each eigenvalue, in units of their mean: Page's choice for 3x3 patches of variance 1."""

FLOOR = 1e-8
"""Smallest eigenvalue that counts: far below what rounding to uint8 leaves of a pixel in [0, 1],
(1/255)²/12 = 1e-6, far above the rounding of fp64. Grey images have none in two thirds of the
directions."""

GROUP_PIXELS = 100 * 32**2  # a group of patches has about as many or all there are


def first_convolution(model: nn.Module) -> nn.Conv2d:
    """Return the convolution that sees the images."""
    return next(module for module in model.modules() if isinstance(module, nn.Conv2d))


@torch.no_grad()
def whiten(conv: nn.Conv2d, images: Tensor) -> None:
    """Give `conv` the whitening filters of the patches of its kernel's size, in place.

    images: (N, C, H, W), normalised, on the CPU; computed in fp64, no randomness. The filters are
    the eigenvectors of the patches' covariance by falling eigenvalue λ, each over √(λ + ε), each
    followed by its negative (a ReLU halves what one of them tells). Filters beyond these keep
    their weights. All are scaled alike, so that the mean variance of their outputs is what weights
    drawn with the mean square of those that stood there would give: a batch norm takes the scale
    out again, but without one the layers that follow count on it. A bias becomes what centres the
    output.
    """
    mean, covariance = patch_statistics(images, conv.weight.shape[2:])
    filters = whitening_filters(covariance)[: conv.out_channels]
    if not len(filters):
        return
    drawn = conv.weight.double().square().mean() * covariance.trace()
    filters *= (drawn / ((filters @ covariance) * filters).sum(1).mean()).sqrt()
    conv.weight[: len(filters)] = filters.view(-1, *conv.weight.shape[1:]).to(conv.weight)
    if conv.bias is not None:
        conv.bias[: len(filters)] = -(filters @ mean).to(conv.bias)


def whitening_filters(covariance: Tensor) -> Tensor:
    """Return the unscaled filters, fp64 (2 · rank, D), of a covariance fp64 (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    strong = values.flip(0) > FLOOR
    values, rows = values.flip(0)[strong], vectors.T.flip(0)[strong]
    # an eigenvector's sign is the library's whim
    rows *= rows.gather(1, rows.abs().argmax(1, keepdim=True)).sign()
    rows /= (values + EPSILON * covariance.diagonal().mean()).sqrt()[:, None]
    return torch.stack([rows, -rows], 1).flatten(0, 1)


def patch_statistics(images: Tensor, kernel: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the mean, fp64 (D,), and the covariance, fp64 (D, D), of patches of D values.

    Values in the order of a filter's weights: channel, row, column.
    """
    size = images.shape[1] * kernel.numel()
    total, products = torch.zeros(size).double(), torch.zeros(size, size).double()
    count = 0
    for patches in patch_groups(images, kernel):
        total += patches.sum(0)
        products += patches.T @ patches
        count += len(patches)
    mean = total / max(count, 1)
    return mean, products / max(count, 1) - mean.outer(mean)


def patch_groups(images: Tensor, kernel: torch.Size) -> Iterator[Tensor]:
    """Yield patches, fp64 (n, D), a group for each of the R·S ways to tile an image with them.

    So each position of a patch counts alike. Of many images every group takes others, up to one
    in R·S: all patches of all of them would cost R·S times as much and say no more.
    """
    r, s = kernel
    parts = min(r * s, max(1, images[:, 0].numel() // GROUP_PIXELS))
    for group, (top, left) in enumerate(itertools.product(range(r), range(s))):
        part = images[group % parts :: parts, :, top:, left:].double()
        if part.shape[2] >= r and part.shape[3] >= s:
            tiles = part.unfold(2, r, r).unfold(3, s, s)
            yield tiles.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
