"""Normalisation of uint8 pixels: fitted on the training images, kept in the checkpoint.

Every mode is y = x · scale + bias in float32, with scale and bias a channel (or, for the mean
image, a bias a pixel), the formula of fastcnn.ops.augment, so that all loaders agree to the bit.
"""

import logging
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from fastcnn.data.images import Files, Images
from fastcnn.data.progress import SLOW_IMAGES
from fastcnn.ops.reference.augmentation import normalize

log = logging.getLogger(__name__)

Mode = Literal["zscore", "unit", "centered", "mean-image", "levels"]
# float32 sums of up to 256 squares of uint8 stay below 2^24, so they are exact in any order
EXACT_CHUNK = 64
LEAST_VARIANCE = 1e-12  # of a channel that varies


@dataclass(frozen=True)
class Normalization:
    """`mean`, `std`: of each channel of the training images, in [0, 1]. `mean_image`: nested
    lists (H, W, 3) in [0, 1] for mode mean-image, else None."""

    mode: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    mean_image: list[list[list[float]]] | None = None

    @classmethod
    def fit(cls, images: Images | Files, mode: Mode) -> "Normalization":
        """Measure the training images; a channel without variation gets std 1.

        Of files, what their scan summed up, but for the mean image, for which all are decoded.
        """
        height, width = images.sides
        pixel_sums = None
        if isinstance(images, Files) and mode != "mean-image":
            sums, squares = images.sums[:, :3].sum(0), images.sums[:, 3:].sum(0)
        else:
            pixel_sums, pixel_squares = _sums(images)
            sums, squares = pixel_sums.sum((0, 1)), pixel_squares.sum((0, 1))
        values = len(images) * height * width
        mean = sums / values / 255
        variance = squares / values / 255**2 - mean**2
        # constant channels leave a rounding error of about 1e-17 in place of 0
        std = np.sqrt(np.where(variance > LEAST_VARIANCE, variance, 1.0))
        mean_image = None
        if mode == "mean-image" and pixel_sums is not None:
            mean_image = (pixel_sums / len(images) / 255).tolist()
        return cls(mode, _three(mean), _three(std), mean_image)

    def to_plain(self) -> dict[str, Any]:
        """Return strings, floats and lists only, fit for a checkpoint or JSON."""
        plain = asdict(self)
        return {**plain, "mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> "Normalization":
        """The reverse; raises ValueError for what no images are normalised by."""
        found = cls(plain["mode"], _three(plain["mean"]), _three(plain["std"]), plain["mean_image"])
        means = np.array(found.mean)
        if found.mode == "mean-image":
            means = np.array(found.mean_image, dtype=np.float64)
            if means.ndim != 3 or means.shape[2] != 3:
                raise ValueError(f"its mean image has the shape {means.shape}")
        # of pixels in [0, 1], whose deviation is above their variance; NaN compares with nothing
        means_hold = ((means >= 0) & (means <= 1)).all()
        stds_hold = all(LEAST_VARIANCE < std <= 1 for std in found.std)
        if found.mode not in get_args(Mode) or not means_hold or not stds_hold:
            raise ValueError("it normalises as no images are")
        return found

    @property
    def fill(self) -> tuple[float, float, float]:
        """What the mean colour (mode mean-image: the mean image) becomes: the colour of cutout."""
        if self.mode == "unit":
            return self.mean
        if self.mode == "centered":
            return _three([mean - 0.5 for mean in self.mean])
        return (0.0, 0.0, 0.0)

    def scale_bias(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 scale (3,) and bias, (3,) or (H, W, 3): y = x · scale + bias."""
        mean, std = np.array(self.mean), np.array(self.std)
        scale, bias = np.full(3, 1 / 255), np.zeros(3)
        if self.mode == "zscore":
            scale, bias = 1 / (255 * std), -mean / std
        elif self.mode == "centered":
            bias = np.full(3, -0.5)
        elif self.mode == "mean-image":
            bias = -np.array(self.mean_image)
        elif self.mode == "levels":  # MATLAB's zerocenter: the range of the pixels stays
            scale, bias = np.ones(3), -255 * mean
        return (
            torch.tensor(scale, dtype=torch.float32, device=device),
            torch.tensor(bias, dtype=torch.float32, device=device),
        )

    def apply(self, pixels: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normalise (n, H, W, 3), uint8 or float in 0..255, to the same shape in `dtype`."""
        return normalize(pixels, *self.scale_bias(pixels.device)).to(dtype)


def _sums(images: Images | Files) -> tuple[np.ndarray, np.ndarray]:
    """Return float64 (H, W, 3): the exact sums over N of the pixels and of their squares.

    NumPy on one thread, in chunks that stay in cache: 0.12 s for CIFAR-10, where the same in
    PyTorch on two busy cores took 0.2 to 5 s.
    """
    shape = (*images.sides, 3)
    sums, squares = np.zeros(shape), np.zeros(shape)
    buffer = np.empty((EXACT_CHUNK, *shape), dtype=np.float32)
    if isinstance(images, Files) and len(images) > SLOW_IMAGES:
        log.info("mean image: decoding %s files", f"{len(images):,}")
    for start in range(0, len(images), EXACT_CHUNK):
        chunk = images.pixels_of(range(start, min(start + EXACT_CHUNK, len(images))))
        values = buffer[: len(chunk)]
        values[...] = chunk
        sums += values.sum(0)
        squares += np.square(values, out=values).sum(0)
    return sums, squares


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = (float(value) for value in values)
    return (first, second, third)
