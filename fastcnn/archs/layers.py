"""The modules of a network: the parameters of a torch.nn layer, and one call for what is computed.

A convolution with what follows it (activation, batch norm, residual, pool) is a single call of
fastcnn.ops, which finds the kernels for it; of a linear layer, what follows is. `conv`, `linear`
and `norm` are torch.nn modules under their usual names, so that weights move to and from a plain
torch.nn network, and between the backends of the ops: "fused" (the native library), "torch" (plain
torch), "auto" (fused where it can be).

`norm.num_batches_tracked` stays in the state dict for that exchange but does not count: batch norm
here has a fixed momentum (`norm.momentum`, torch's 0.1), which never reads it, and counting costs a
kernel a layer and step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from fastcnn.archs import spec
from fastcnn.ops import Pending, conv_autotune
from fastcnn.ops.backend import BACKENDS, ops_for

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ConvNormAct(nn.Module):
    """Convolution → [activation] → [batch norm] → [+ residual] → [activation] → [max-pool].

    `conv`: nn.Conv2d. `norm`: nn.BatchNorm2d or None. `l2`: λ of the penalty λ·Σw² on conv.weight,
    which the training loss adds. `defers`: whether the next module is a convolution that takes the
    result alone, so that normalisation and activation may be left to it. Where they are (with the
    library's convolutions, on a CPU in fp32 and on a GPU in half precision, in training and
    wherever gradients are wanted; never with backend "torch") the result is an `ops.Pending`, for a
    forward hook as well; `.applied()` makes a tensor of it. `across`: the processes over which the
    norm takes its statistics in training (`synchronise`), or None; then nothing is left to the next
    module.
    """

    def __init__(self, channels: int, record: spec.Conv, backend: str = "auto") -> None:
        super().__init__()
        self.backend = _checked(backend)
        self.stride = record.stride
        self.pads = record.pads
        top, _, left, _ = self.pads
        self.conv = nn.Conv2d(
            channels,
            record.filters,
            record.kernel_size,
            self.stride,
            (top, left),
            bias=record.has_bias,
        )
        self.norm = nn.BatchNorm2d(record.filters) if record.norm else None
        self.pre_slope = record.pre_slope
        self.post_slope = record.post_slope
        pool = record.pool
        self.pool = (pool.size, pool.stride, pool.padding) if pool else None
        self.l2 = record.l2
        self.defers = False
        self.across: Across | None = None

    def forward(self, x: Tensor | Pending, residual: Tensor | None = None) -> Tensor | Pending:
        """x: (N, channels, H, W), residual and result: (N, filters, P, Q), all channels-last.

        Raises ValueError for one value a channel in training with a norm, for a residual of another
        shape and for a residual of a layer that pools.
        """
        conv, norm = self.conv, self.norm
        # the op adds a bias that no norm follows: on a GPU torch's convolution would, in a pass of
        # its own
        ops = ops_for(self.backend, x, conv.bias if norm is None else norm.weight)
        across = _group(self)
        defer = (
            self.defers
            and across is None
            and conv_autotune.may_defer(x.x if isinstance(x, Pending) else x)
        )
        rest = (self.stride, self.pads, self.pool, residual, defer)
        if norm is None:
            return ops.conv_bias_act(x, conv.weight, conv.bias, self.post_slope, *rest)
        arguments = (*_tensors(norm), self.training, _momentum(norm), norm.eps)
        slopes = (self.pre_slope, self.post_slope)
        return ops.conv_bn_act(x, conv.weight, conv.bias, *arguments, *slopes, *rest, across=across)


class LinearNormAct(nn.Module):
    """Linear → [activation] → [batch norm] → [activation] → [dropout].

    `linear`: nn.Linear. `norm`: nn.BatchNorm1d or None. `l2`, `across`: as in `ConvNormAct`.
    """

    def __init__(self, channels: int, record: spec.Linear, backend: str = "auto") -> None:
        super().__init__()
        self.backend = _checked(backend)
        self.linear = nn.Linear(channels, record.units, bias=record.has_bias)
        self.norm = nn.BatchNorm1d(record.units) if record.norm else None
        self.pre_slope = record.pre_slope
        self.post_slope = record.post_slope
        self.dropout = record.dropout
        self.l2 = record.l2
        self.across: Across | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels), result: (N, units).

        Raises ValueError for a batch of one image in training with a norm.
        """
        y = self.linear(x)
        ops = ops_for(self.backend, y, self.norm.weight if self.norm else None)
        if self.norm is None:
            y = ops.bias_act(y, None, self.post_slope)
        else:
            arguments = (*_tensors(self.norm), self.training, _momentum(self.norm), self.norm.eps)
            y = ops.bn_act(y, *arguments, self.pre_slope, self.post_slope, across=_group(self))
        return F.dropout(y, self.dropout, self.training) if self.dropout else y


class ResidualBlock(nn.Module):
    """Basic block of He et al. 2016: relu(conv2(conv1(x)) + shortcut(x)), all with batch norm.

    `projection`: 1x1 convolution → batch norm on the shortcut, or None where the shape stays.
    """

    def __init__(self, channels: int, record: spec.Residual, backend: str = "auto") -> None:
        super().__init__()
        first, second = record.convs
        projection = record.projection(channels)
        self.conv1 = ConvNormAct(channels, first, backend)
        self.conv1.defers = True
        self.conv2 = ConvNormAct(record.filters, second, backend)
        self.projection = ConvNormAct(channels, projection, backend) if projection else None

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, channels, H, W), result: (N, filters, P, Q), channels-last."""
        shortcut = x if self.projection is None else self.projection(x)
        return self.conv2(self.conv1(x), shortcut)


class GlobalAvgPool(nn.Module):
    """Mean over the pixels: (N, K, P, Q) → (N, K)."""

    def forward(self, x: Tensor) -> Tensor:
        # the backward of nn.AdaptiveAvgPool2d throws in deterministic mode
        return x.mean((2, 3))


class Across:
    """A process group in a layer: copies of the layer share it, where copy.deepcopy would fail."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Across:
        return self


def synchronise(network: nn.Module, group: ProcessGroup | None) -> int:
    """Let every norm of the network take its statistics, in training, over all processes of the
    group, which step together from then on; None: over its own images again. Return how many.

    The convolutions before them are the vendor's in training, also with `--conv fused`
    (`ops.conv_bn_act`). No effect in evaluation.
    """
    layers = [
        module
        for module in network.modules()
        if isinstance(module, ConvNormAct | LinearNormAct) and module.norm is not None
    ]
    for layer in layers:
        layer.across = None if group is None else Across(group)
    return len(layers)


def make(record: spec.Layer, channels: int, backend: str = "auto") -> nn.Module:
    """Return the module of a layer record; channels: size of its input's second dimension.

    Raises ValueError for an unknown backend.
    """
    match record:
        case spec.Conv():
            return ConvNormAct(channels, record, backend)
        case spec.Linear():
            return LinearNormAct(channels, record, backend)
        case spec.Residual():
            return ResidualBlock(channels, record, backend)
        case spec.GlobalAvgPool():
            return GlobalAvgPool()
        case spec.Flatten():
            # copies a channels-last image into NCHW order, that of a torch.nn network's weights
            return nn.Flatten(1)


def conv_linear_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that convolutions and linear layers take, in the dtype of x.

    The others stay fp32 beside half-precision activations: those of norms, and the bias that an op
    adds where no norm follows a convolution.
    """
    added = {
        id(module.conv.bias)
        for module in model.modules()
        if isinstance(module, ConvNormAct) and module.norm is None
    }
    return [
        parameter
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        for parameter in module.parameters(recurse=False)
        if id(parameter) not in added
    ]


def _checked(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


def _group(layer: ConvNormAct | LinearNormAct) -> ProcessGroup | None:
    """The group that a norm takes its statistics over now."""
    return layer.across.group if layer.across and layer.training else None


def _tensors(norm: nn.Module) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var  # type: ignore[return-value]


def _momentum(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> float:
    return cast(float, norm.momentum)  # None would ask for the mean of all batches so far
