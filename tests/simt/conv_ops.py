"""The convolution's kernels, compiled for the CPU, in place of the library's ops for the CPU."""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastcnn.ops.conv_library import Pads, result_shape

NAMES = (
    "conv",
    "conv_bias_act_pool",
    "conv_affine_act",
    "conv_data_gradient",
    "conv_weight_gradient",
    "bn_stats_merge",
)


@contextlib.contextmanager
def as_ops(kernels: ModuleType) -> Iterator[dict[str, int]]:
    """Within the block the ops run the kernels, on bf16 tensors; counts their calls by name."""
    ops = _KernelOps(kernels)
    library = torch.library.Library("fastcnn", "IMPL")
    for name in NAMES:
        library.impl(name, ops.counted(name), "CPU", allow_override=True)
    try:
        yield ops.calls
    finally:
        library._destroy()


def image(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    made = x.new_empty(shape, dtype=dtype or x.dtype)
    return made.contiguous(memory_format=torch.channels_last)


class _KernelOps:
    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels
        self.calls = dict.fromkeys(NAMES, 0)

    def counted(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            return getattr(self, name)(*arguments)

        return call

    def launch(self, op: str, dtype: torch.dtype, **arguments: Any) -> None:
        plain = {k: v.data_ptr() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        given = {k: v for k, v in plain.items() if v is not None}
        status = getattr(self.kernels, op)(dtype=str(dtype).removeprefix("torch."), **given)
        assert status == 0, f"{op}: cudaError {status}"

    def forward(
        self, x: Tensor, filter: Tensor, bias: Tensor | None, block: Any, shape: Any, **result: Any
    ) -> None:
        defaults = {"pre_slope": 1.0, "post_slope": 1.0, "stats_slope": 1.0, "pool": False}
        given = {"x": x, "filter": filter, "bias": bias, "shape": shape, **_input(block)}
        self.launch("conv", x.dtype, **given, **(defaults | result))

    def conv(self, x, filter, bias, *rest):  # type: ignore[no-untyped-def]
        *block, stride, pads, stats_slope, _, _ = rest
        shape = _fields(x, filter, stride, pads)
        y = image(x, result_shape(x, filter, stride, pads))
        if stats_slope is None:
            self.forward(x, filter, bias, block, shape, y=y)
            return y, torch.empty(3, 0, len(filter))
        partials = torch.empty(3, self.kernels.conv_partial_rows(shape), len(filter))
        more = {"partials": partials, "stats_slope": stats_slope}
        self.forward(x, filter, bias, block, shape, y=y, **more)
        return y, partials

    def conv_bias_act_pool(self, x, filter, bias, *rest):  # type: ignore[no-untyped-def]
        *block, slope, stride, pads, _, _ = rest
        shape = _fields(x, filter, stride, pads)
        n, k, p, q = result_shape(x, filter, stride, pads)
        y = image(x, (n, k, p // 2, q // 2))
        code = image(x, y.shape, torch.uint8)
        more = {"code": code, "pool": True, "post_slope": slope}
        self.forward(x, filter, bias, block, shape, y=y, **more)
        return y, code

    def conv_affine_act(  # type: ignore[no-untyped-def]
        self, x, filter, bias, scale, shift, residual, pre_slope, post_slope, stride, pads, pool
    ):
        n, k, p, q = result_shape(x, filter, stride, pads)
        y = image(x, (n, k, p // 2, q // 2) if pool else (n, k, p, q))
        shape, plain = _fields(x, filter, stride, pads), (None, None, None, None, False, 1.0, 1.0)
        more = {"scale": scale, "shift": shift, "residual": residual, "pool": pool}
        slopes = {"pre_slope": pre_slope, "post_slope": post_slope}
        self.forward(x, filter, bias, plain, shape, y=y, **more, **slopes)
        return y

    def conv_data_gradient(self, dy, filter, x, *rest):  # type: ignore[no-untyped-def]
        *block, stride, pads = rest
        shape = _fields(x, filter, stride, pads)
        dx, channels = image(x, x.shape), x.shape[1]
        dweight = torch.empty(channels if block[2] is not None else 0)
        dbias = torch.empty(channels if block[3] is not None else 0)
        self.launch(
            "conv_data_gradient",
            x.dtype,
            shape=shape,
            x=x,
            **_input(block),
            batch_stats=block[4],
            filter=filter,
            dy=dy,
            workspace=self.workspace("conv_data_gradient", shape, x.dtype),
            dx=dx,
            dweight=dweight if len(dweight) else None,
            dbias=dbias if len(dbias) else None,
        )
        return dx, dweight, dbias

    def conv_weight_gradient(self, dy, x, *rest):  # type: ignore[no-untyped-def]
        *block, r, s, stride, pads = rest
        dfilter = image(x, (dy.shape[1], x.shape[1], r, s))
        shape = _fields(x, dfilter, stride, pads)
        self.launch(
            "conv_weight_gradient",
            x.dtype,
            shape=shape,
            x=x,
            **_input(block),
            dy=dy,
            dfilter=dfilter,
            workspace=self.workspace("conv_weight_gradient", shape, x.dtype),
        )
        return dfilter

    def bn_stats_merge(  # type: ignore[no-untyped-def]
        self, partials, count, running_mean, running_var, momentum, eps
    ):
        _, rows, k = partials.shape
        mean, rstd = torch.empty(k), torch.empty(k)
        self.launch(
            "bn_merge",
            torch.float32,
            partials=partials,
            rows=rows,
            k=k,
            count=count,
            momentum=momentum,
            eps=eps,
            running_mean=running_mean,
            running_var=running_var,
            mean=mean,
            rstd=rstd,
        )
        return mean, rstd

    def workspace(self, op: str, shape: Any, dtype: torch.dtype) -> Tensor:
        name = str(dtype).removeprefix("torch.")
        size = self.kernels.conv_workspace(op=op, shape=shape, dtype=name)
        return torch.empty(size, dtype=torch.uint8)


def _fields(x: Tensor, filter: Tensor, stride: int, pads: Pads) -> tuple[int, ...]:
    """Those of ConvShape, in their order."""
    n, k, p, q = result_shape(x, filter, stride, pads)
    c, h, w = x.shape[1:]
    return (n, h, w, c, k, *filter.shape[2:], stride, pads[0], pads[2], p, q)


def _input(block: Any) -> dict[str, Any]:
    mean, rstd, weight, bias, _, pre_slope, post_slope = block
    vectors = {"in_mean": mean, "in_rstd": rstd, "in_weight": weight, "in_bias": bias}
    return {**vectors, "in_pre_slope": pre_slope, "in_post_slope": post_slope}
