"""Gradients at the edges of what is finite, and the bits of what is not."""

import torch

BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float64: torch.int64,
}


def finite(dtype, shape, device="cpu", offset=0):
    """The largest numbers of both signs, the smallest ones, both zeros, over and over; 4-D tensors
    are channels-last. `offset`: values after an aligned address."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    edges = torch.tensor([info.max, -info.max, least, -least, info.tiny, 0.0, -0.0, 1.0])
    if dtype == torch.float64:
        edges = torch.tensor([info.max, info.min, 5e-324, info.tiny, -0.0], dtype=dtype)
    count = torch.Size(shape).numel()
    raw = torch.empty(count + offset, dtype=dtype, device=device)[offset:]
    raw.copy_(edges.to(dtype).repeat(count // len(edges) + 1)[:count])
    if len(shape) < 4:
        return raw.view(shape)
    n, k, p, q = shape
    return raw.view(n, p, q, k).permute(0, 3, 1, 2)


def patterns(dtype):
    """The bits of ±inf and of NaNs: the usual one, and those of the least and the most bits."""
    bits = torch.iinfo(BITS[dtype]).bits
    inf = int(torch.tensor(torch.inf, dtype=dtype).view(BITS[dtype]))
    sign = -(2 ** (bits - 1))
    usual = int(torch.tensor(torch.nan, dtype=dtype).view(BITS[dtype]))
    return [inf, inf + sign, usual, inf + 1, inf + 1 + sign, -1]


def planted(tensor, place, pattern):
    """The tensor with these bits at a place of its memory."""
    other = torch.empty_like(tensor).copy_(tensor)
    flat = torch.as_strided(other, (other.numel(),), (1,))
    flat.view(BITS[tensor.dtype])[place] = pattern
    return other


def places(count, unit=1):
    """The ends, and both sides of each boundary of so many values."""
    near = {0, 1, count - 1, *(k * unit + d for k in range(1, count // unit + 1) for d in (-1, 0))}
    return sorted(place for place in near if 0 <= place < count)
