"""The augmentation of a batch of images in plain torch: what `reference` has of it.

Images are uint8 (N, H, W, 3), contiguous; nothing waits for the device.
"""

import torch
from torch import Tensor

FLIPS = ("none", "random", "alternating")
_MASK = 2**32 - 1


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
    scale: fp32 (3,). bias: fp32 (3,) or (H, W, 3). fill: fp32 (3,). All on one device.
    gathered: image and label i of `images` and `labels` are those of image i of the batch, whatever
    its sample number, from which its choices are drawn all the same.
    padding, reflect, flip: see `crop_flip`, `draw_crop`, `draw_flip`; cutout: see `cut_out`.
    A pixel becomes pixel * scale + bias, both operations rounded to fp32, then to `dtype`.
    What becomes of a sample depends on (seed, epoch, sample) alone. Raises ValueError for an
    unknown flip.
    """
    _, height, width, _ = images.shape
    samples, epoch = next_samples(order, at, count), at[0]
    crop = draw_crop(seed, epoch, samples, padding) if padding else None
    flips = draw_flip(seed, epoch, samples, flip)
    places = torch.arange(count, device=order.device) if gathered else samples
    x = normalize(crop_flip(images, places, crop, flips, reflect), scale, bias)
    if cutout:
        x = cut_out(x, draw_cutout(seed, epoch, samples, height, width), cutout, fill)
    return x.to(dtype).permute(0, 3, 1, 2), labels.index_select(0, places)


def require_flip(flip: str) -> None:
    if flip not in FLIPS:
        raise ValueError(f"flip: expected one of {', '.join(FLIPS)}, got {flip!r}")


def next_samples(order: Tensor, at: Tensor, count: int) -> Tensor:
    """Return int64 (count,): the samples from position at[1] of `order` on, then from its start."""
    places = at[1] + torch.arange(count, device=order.device)
    return order.index_select(0, places.remainder_(len(order)))


def draw_crop(seed: int, epoch: Tensor, samples: Tensor, padding: int) -> Tensor:
    """Return int64 (n, 2): offsets of the window, down and right, in -padding..padding."""
    words = _words(seed, epoch, samples, purpose=0)
    return _below(words[:2], 2 * padding + 1).T - padding


def draw_flip(seed: int, epoch: Tensor, samples: Tensor, flip: str) -> Tensor | None:
    """Return bool (n,), which samples are mirrored; None for "none"."""
    require_flip(flip)
    if flip == "none":
        return None
    if flip == "alternating":
        return draw_alternating_flip(seed, epoch, samples)
    return _words(seed, epoch, samples, purpose=0)[2] >= 2**31


def draw_alternating_flip(seed: int, epoch: Tensor, samples: Tensor) -> Tensor:
    """Return bool (n,): one half of the samples in even epochs, the other half in odd ones."""
    even = _words(seed, torch.zeros_like(epoch), samples, purpose=2)[0] >= 2**31
    return even ^ (epoch % 2 == 1)


def draw_cutout(seed: int, epoch: Tensor, samples: Tensor, height: int, width: int) -> Tensor:
    """Return int64 (n, 2): the pixel (y, x) in the middle of the cutout, any of the image's."""
    words = _words(seed, epoch, samples, purpose=1)
    return torch.stack([_below(words[0], height), _below(words[1], width)], 1)


def _words(seed: int, epoch: Tensor, samples: Tensor, purpose: int) -> Tensor:
    """Return four random words of each sample, int64 (4, n) in 0..2^32-1."""
    epochs = (epoch & _MASK).expand_as(samples)
    counter = [samples & _MASK, samples >> 32 & _MASK, epochs, torch.full_like(samples, purpose)]
    return philox(torch.stack(counter), (seed & _MASK, seed >> 32 & _MASK))


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Return Philox4x32-10 of counters int64 (4, n) of 32-bit words: four random words each.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    factors = counter.new_empty(2, 1)
    factors[0], factors[1] = 0xD2511F53, 0xCD9E8D57
    low, high = key
    for _ in range(10):
        products = counter[::2]
        # 32 x 32 bits in two steps, since a product of 64 bits has no place for its sign
        lower = factors * (products & 0xFFFF)
        upper = factors * (products >> 16) + (lower >> 16)
        words = ((upper & 0xFFFF) << 16) + (lower & 0xFFFF)
        carried = upper >> 16
        counter = torch.stack(
            [carried[1] ^ counter[1] ^ low, words[1], carried[0] ^ counter[3] ^ high, words[0]]
        )
        low, high = low + 0x9E3779B9 & _MASK, high + 0xBB67AE85 & _MASK
    return counter


def _below(words: Tensor, count: int) -> Tensor:
    """Map random words to 0..count-1, uniform up to count / 2^32."""
    return words * count >> 32


def crop_flip(
    images: Tensor, index: Tensor, crop: Tensor | None, flip: Tensor | None, reflect: bool
) -> Tensor:
    """Pad, crop and mirror: out[n, y, x] = padded image[index[n]][y + crop[n, 0], x + crop[n, 1]],
    x running backwards where `flip[n]`.

    images uint8 (N, H, W, 3) contiguous; crop int64 (n, 2) offsets of the window from the image;
    flip bool (n,); the padding is reflected (the edge is not repeated) or zero. Returns uint8
    (n, H, W, 3). The padding is never written: its rows and columns are looked up in the image.
    """
    count, height, width, _ = images.shape
    size, device = len(index), images.device
    if crop is None and flip is None:
        return images.view(count, -1).index_select(0, index).view(size, height, width, 3)
    rows = torch.arange(height, device=device).expand(size, height)
    columns = torch.arange(width, device=device).expand(size, width)
    if flip is not None:
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    if crop is not None:
        rows, columns = rows + crop[:, :1], columns + crop[:, 1:]
    inner_rows, inner_columns = _fold(rows, height, reflect), _fold(columns, width, reflect)
    from_rows = (index[:, None] * height + inner_rows).view(-1)
    strips = images.view(count * height, width * 3).index_select(0, from_rows)
    channels = inner_columns[:, :, None] * 3 + torch.arange(3, device=device)
    from_columns = channels.view(size, 1, width * 3).expand(size, height, width * 3)
    result = strips.view(size, height, width * 3).gather(2, from_columns)
    result = result.view(size, height, width, 3)
    if crop is not None and not reflect:
        inside = (rows == inner_rows)[:, :, None] & (columns == inner_columns)[:, None]
        result.mul_(inside[..., None])
    return result


def _fold(positions: Tensor, length: int, reflect: bool) -> Tensor:
    """Bring positions outside 0..length-1 inside: reflected, or clamped (zero: masked later)."""
    if not reflect:
        return positions.clamp(0, length - 1)
    positions = positions.abs()
    return torch.where(positions < length, positions, 2 * (length - 1) - positions)


def normalize(pixels: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Return pixels * scale + bias, contiguous fp32 (n, H, W, 3), each operation rounded.

    pixels: uint8 or float in 0..255. scale: fp32 (3,). bias: fp32 (3,) or (H, W, 3).
    """
    width = pixels.shape[2]
    # a whole row, not three channels: the inner loop then runs over contiguous memory
    rows = pixels.reshape(*pixels.shape[:2], width * 3).float() * scale.repeat(width)
    rows += bias.repeat(width) if bias.dim() == 1 else bias.view(-1, width * 3)
    return rows.view(pixels.shape)


def cut_out(x: Tensor, centres: Tensor, side: int, fill: Tensor) -> Tensor:
    """Return x (n, H, W, 3) with a square of `side` pixels set to `fill` (3,).

    centres int64 (n, 2): any pixel (y, x); what lies outside the image is lost, as in DeVries and
    Taylor, arXiv:1708.04552. The square spans centre - side // 2 up to side pixels on.
    """
    _, height, width, _ = x.shape
    start = centres - side // 2
    rows = torch.arange(height, device=x.device) - start[:, :1]
    columns = torch.arange(width, device=x.device) - start[:, 1:]
    inside_rows, inside_columns = ((at >= 0) & (at < side) for at in (rows, columns))
    inside = inside_rows[:, :, None] & inside_columns[:, None, :]
    return torch.where(inside[..., None], fill.to(x.dtype), x)
