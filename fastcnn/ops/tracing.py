"""What the blocks of several ops share: the results that tracing is told of, without memory, and
what their gradients do first."""

from typing import Any

import torch
from torch import Tensor


def like(x: Tensor) -> Tensor:
    if x.dim() == 4:
        return torch.empty_like(x, memory_format=torch.channels_last)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def image(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return x.new_empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)


def pooled(x: Tensor, shape: tuple[int, ...], pool: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """The max-pool of images of this shape and its codes."""
    window, stride, padding = pool
    pixels = [(size + 2 * padding - window) // stride + 1 for size in shape[2:]]
    smaller = (*shape[:2], *pixels)
    return image(x, smaller, x.dtype), image(x, smaller, torch.uint8)


def per_channel(x: Tensor) -> Tensor:
    return x.new_empty((x.shape[1],), dtype=parameter_dtype(x))


def parameter_dtype(x: Tensor) -> torch.dtype:
    """Of parameters, statistics and sums beside x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def incoming(dy: Tensor) -> Tensor:
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError("fastcnn ops have no second derivative; use backend torch")
    # autograd hands over whatever the next op returned: expanded by a mean, NCHW by a flatten
    if dy.dim() == 4:
        return dy.contiguous(memory_format=torch.channels_last)
    return dy.contiguous()


def no_gradient_of_code(ctx: Any, code: Tensor) -> None:
    ctx.mark_non_differentiable(code)
    ctx.set_materialize_grads(False)  # else each backward fills a tensor of zeros for it
