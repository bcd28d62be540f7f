"""Augmentation of whole batches by tensor operations, on CPU and GPU alike.

For what fastcnn.ops.augment does not do in its one kernel (resized crop, rotation and shift,
colour), and for machines without the library. Nothing here waits for the device: every choice is
drawn for a whole epoch (`draw`) and indexed by sample.

Order: crop and flip, resized crop, rotation and shift, colour; then normalisation; then cutout.
"""

import math
from collections.abc import Mapping

import torch

from fastcnn.config import AugmentConfig
from fastcnn.data.draws import generator
from fastcnn.errors import UsageError
from fastcnn.ops.reference import augmentation as reference_augment

RATIO = (3 / 4, 4 / 3)  # width to height of a resized crop, as in torchvision
ATTEMPTS = 10  # at a box that fits, as in torchvision, before the centre is taken
CHUNK = 65_536  # images whose boxes are drawn at once
GREY = (0.2989, 0.587, 0.114)  # weights of R, G, B in torchvision's grey

Draws = dict[str, torch.Tensor]


def check(config: AugmentConfig, height: int, width: int) -> None:
    """Raise UsageError for padding that the images are too small to reflect."""
    side = min(height, width)
    if config.crop_mode == "reflect" and config.crop_padding >= side:
        raise UsageError(
            f"--crop-padding {config.crop_padding}: reflection needs less than the image's side, "
            f"{side}; take less or --crop-mode zero"
        )


def is_one_kernel(config: AugmentConfig) -> bool:
    """Whether fastcnn.ops.augment does everything that is switched on."""
    still = config.rotation == config.shift == config.color_jitter == 0
    return still and config.resized_crop == 1


def draw(
    config: AugmentConfig,
    seed: int,
    epoch: int,
    samples: int,
    height: int,
    width: int,
    device: torch.device | str = "cpu",
) -> Draws:
    """Return the choices of one epoch by name, each (samples,) or (samples, k).

    Only what is switched on is there, each drawn apart, so that switching one augmentation on
    leaves the others' choices as they were. Crop, flip and cutout are on `device`, and those of
    fastcnn.ops.augment; the others come from generators on the CPU.
    """
    numbers = torch.arange(samples, device=device)
    at = torch.full((), epoch, device=device)
    draws: Draws = {}
    if config.crop_padding > 0:
        draws["crop"] = reference_augment.draw_crop(seed, at, numbers, config.crop_padding)
    if (flip := reference_augment.draw_flip(seed, at, numbers, config.flip)) is not None:
        draws["flip"] = flip
    if config.cutout > 0:
        draws["cutout"] = reference_augment.draw_cutout(seed, at, numbers, height, width)
    return draws | _draw_on_cpu(config, seed, epoch, samples, height, width)


def _draw_on_cpu(
    config: AugmentConfig, seed: int, epoch: int, samples: int, height: int, width: int
) -> Draws:
    draws: Draws = {}
    if config.resized_crop < 1:
        source = generator(seed, "resized crop", epoch)
        shapes = torch.tensor([height, width]).expand(samples, 2)
        draws["box"] = resized_boxes(shapes, config.resized_crop, source)
    if config.rotation > 0 or config.shift > 0:
        source = generator(seed, "affine", epoch)
        uniform = torch.rand(samples, 3, generator=source) * 2 - 1
        # whole pixels, as torchvision shifts
        sides = torch.tensor([height, width])
        shift = (uniform[:, 1:] * config.shift * sides).round()
        draws["affine"] = torch.cat([uniform[:, :1] * config.rotation, shift], 1)
    if (strength := config.color_jitter) > 0:
        uniform = torch.rand(samples, 3, generator=generator(seed, "color", epoch))
        low = max(0.0, 1 - strength)
        draws["color"] = low + uniform * (1 + strength - low)
    return draws


def distort(
    config: AugmentConfig,
    images: torch.Tensor,
    index: torch.Tensor,
    draws: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Read images uint8 (N, H, W, 3) at `index` (n,) with everything that comes before
    normalisation.

    `draws` are the rows of the samples. Returns uint8, or float32 in 0..255 where pixels were
    interpolated or recoloured, (n, H, W, 3).
    """
    reflect = config.crop_mode == "reflect"
    pixels = reference_augment.crop_flip(
        images, index, draws.get("crop"), draws.get("flip"), reflect
    )
    if "box" in draws:
        pixels = resized_crop(pixels, draws["box"])
    if "affine" in draws:
        pixels = rotate_shift(pixels, draws["affine"])
    if "color" in draws:
        pixels = jitter(pixels, draws["color"])
    return pixels


def resized_boxes(shapes: torch.Tensor, smallest: float, source: torch.Generator) -> torch.Tensor:
    """Return int64 (n, 4) of top, left, height, width in images of `shapes` (n, 2), height and
    width, distributed as torchvision's RandomResizedCrop with scale (smallest, 1): area uniform,
    ratio log-uniform in RATIO.

    Drawn CHUNK by CHUNK, so that a million images take little memory.
    """
    boxes = [_chunk_of_boxes(chunk.long(), smallest, source) for chunk in shapes.split(CHUNK)]
    return torch.cat(boxes)


def _chunk_of_boxes(shapes: torch.Tensor, smallest: float, source: torch.Generator) -> torch.Tensor:
    samples = len(shapes)
    height, width = shapes[:, :1], shapes[:, 1:]
    uniform = torch.rand(2, samples, ATTEMPTS, generator=source, dtype=torch.float64)
    area = (smallest + uniform[0] * (1 - smallest)) * height * width
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    ratio = torch.exp(low + uniform[1] * (high - low))
    w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    sides = torch.cat([h.gather(1, first), w.gather(1, first)], 1)
    corner = torch.rand(2, samples, generator=source, dtype=torch.float64).T
    boxes = torch.cat([(corner * (shapes - sides + 1)).long(), sides], 1)
    return torch.where(fits.any(1, keepdim=True), boxes, _centre_boxes(shapes))


def _centre_boxes(shapes: torch.Tensor) -> torch.Tensor:
    """The largest centred boxes whose ratio lies in RATIO, for when no drawn box fits."""
    height, width = shapes.double().unbind(1)
    ratio = (width / height).clamp(*RATIO)
    sides = torch.stack([width / ratio, height * ratio], 1).round().long().minimum(shapes)
    return torch.cat([(shapes - sides) // 2, sides], 1)


def resized_crop(pixels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Stretch each box (n, 4) of top, left, height, width to the whole image, bilinear.

    A box is never larger than the image, so there is nothing to antialias. Samples are kept inside
    the box, as if it had been cut out first. Returns float32 (n, H, W, 3) in 0..255.
    """
    _, height, width, _ = pixels.shape
    y = _box_positions(boxes[:, 0], boxes[:, 2], height)
    x = _box_positions(boxes[:, 1], boxes[:, 3], width)
    grid = torch.stack(
        [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], dim=3
    )
    return _sample(pixels, grid)


def _box_positions(start: torch.Tensor, length: torch.Tensor, side: int) -> torch.Tensor:
    """Return (n, side) positions of the output's pixel centres in the input, in grid_sample's
    coordinates: -1 and 1 at the outer edges."""
    centres = (torch.arange(side, device=start.device) + 0.5) / side
    start, length = start[:, None].float(), length[:, None].float()
    inside = torch.minimum((centres * length).clamp(min=0.5), length - 0.5)
    return (start + inside) * (2 / side) - 1


def rotate_shift(pixels: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """Rotate about the centre, then shift; black comes in from outside.

    affine float (n, 3): angle in degrees (positive turns clockwise), shift down and shift right in
    pixels. As torchvision's affine with bilinear interpolation. Returns float32 in 0..255.
    """
    _, height, width, _ = pixels.shape
    angle, down, right = torch.deg2rad(affine[:, 0]), affine[:, 1], affine[:, 2]
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    device = pixels.device
    y = torch.arange(height, device=device) + 0.5 - height / 2 - down[:, None]
    x = torch.arange(width, device=device) + 0.5 - width / 2 - right[:, None]
    y, x = y[:, :, None], x[:, None, :]
    grid = torch.stack(
        [(cos * x + sin * y) * (2 / width), (cos * y - sin * x) * (2 / height)], dim=3
    )
    return _sample(pixels, grid)


def _sample(pixels: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    nchw = pixels.permute(0, 3, 1, 2).float()
    sampled = torch.nn.functional.grid_sample(nchw, grid, mode="bilinear", align_corners=False)
    return sampled.permute(0, 2, 3, 1)


def jitter(pixels: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Scale brightness, then contrast, then saturation by factors (n, 3), clamped to 0..255.

    Contrast moves away from the image's mean grey, saturation from each pixel's grey. Returns
    float32 (n, H, W, 3).
    """
    brightness, contrast, saturation = factors.float().view(-1, 3, 1, 1, 1).unbind(1)
    result = (pixels.float() * brightness).clamp_(0, 255)
    mean = _grey(result).mean((1, 2), keepdim=True)
    result = torch.lerp(mean, result, contrast).clamp_(0, 255)
    return torch.lerp(_grey(result), result, saturation).clamp_(0, 255)


def _grey(pixels: torch.Tensor) -> torch.Tensor:
    red, green, blue = pixels.unbind(3)
    return (GREY[0] * red + GREY[1] * green + GREY[2] * blue).unsqueeze(3)
