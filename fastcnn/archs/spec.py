"""Networks as plain data, and what follows from the data: shapes, parameters, FLOP.

A network is a tuple of layer records. One `Conv` record is a whole unit of fusion: convolution →
[activation] → [batch norm] → [activation] → [max-pool]. An activation is its negative slope: 1
none, 0 ReLU, 0.01 leaky ReLU. Sizes: K channels out, R x S kernel, P x Q pixels out.

It needs no torch, so that listing networks costs nothing; `build.build` makes the module.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from fastcnn.errors import UsageError

CLASSES = 0
"""The units of a last layer: as many as the data has classes."""

INPUT_CHANNELS = 3
LEAKY_SLOPE = 0.01
"""Negative slope of torch.nn.LeakyReLU by default."""


@dataclass(frozen=True)
class Pool:
    """Max-pool with a square window; sizes floor as in torch."""

    size: int = 2
    stride: int = 2
    padding: int = 0


@dataclass(frozen=True, kw_only=True)
class NormAct:
    """What follows the product of a `Conv` or `Linear`: [activation] → [norm] → [activation].

    pre_slope, post_slope: negative slope of the activation before and after the norm; without a
    norm only post_slope has a meaning. bias: of the convolution or linear layer; None: there is one
    unless a norm follows directly and would cancel it. l2: the λ of Keras' regularizers.l2, which
    adds λ·Σw² over this layer's weight (no bias, no ½) to the loss.
    """

    norm: bool = False
    pre_slope: float = 1.0
    post_slope: float = 1.0
    bias: bool | None = None
    l2: float = 0.0

    def __post_init__(self) -> None:
        if self.pre_slope != 1 and not self.norm:
            raise ValueError("pre_slope without norm: expected post_slope")

    @property
    def has_bias(self) -> bool:
        if self.bias is not None:
            return self.bias
        return not (self.norm and self.pre_slope == 1)


@dataclass(frozen=True)
class Conv(NormAct):
    """Convolution → [activation] → [batch norm] → [activation] → [max-pool].

    kernel: side, or (R, S). padding: "valid" is none; "same" keeps the size (at stride 1), an even
    kernel pads its extra pixel at the bottom and at the right.
    """

    filters: int
    kernel: int | tuple[int, int] = 3
    stride: int = 1
    padding: Literal["same", "valid"] = "same"
    pool: Pool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride > 1 and self.padding == "same" and any(k % 2 == 0 for k in self.kernel_size):
            raise ValueError("same padding with a stride: expected an odd kernel")

    @property
    def kernel_size(self) -> tuple[int, int]:
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel, self.kernel)

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """Pixels of padding: top, bottom, left, right."""
        if self.padding == "valid":
            return (0, 0, 0, 0)
        r, s = self.kernel_size
        return ((r - 1) // 2, r // 2, (s - 1) // 2, s // 2)


@dataclass(frozen=True)
class Linear(NormAct):
    """Linear → [activation] → [batch norm] → [activation] → [dropout]."""

    units: int = CLASSES
    dropout: float = 0.0


@dataclass(frozen=True)
class Residual:
    """Basic block of He et al. 2016: conv 3x3 → BN → ReLU → conv 3x3 → BN, + shortcut, → ReLU.

    The shortcut is the input, or its 1x1 convolution → BN where the block changes the shape.
    """

    filters: int
    stride: int = 1

    @property
    def convs(self) -> tuple[Conv, Conv]:
        first = Conv(self.filters, 3, self.stride, norm=True, post_slope=0.0)
        return first, replace(first, stride=1)

    def projection(self, channels: int) -> Conv | None:
        """The shortcut's convolution for an input of this many channels, or None."""
        if self.stride == 1 and channels == self.filters:
            return None
        return Conv(self.filters, 1, self.stride, norm=True)


@dataclass(frozen=True)
class GlobalAvgPool:
    """Mean over all pixels of a channel."""


@dataclass(frozen=True)
class Flatten:
    """(K, P, Q) → K·P·Q in torch's order; networks get it before their first `Linear`."""


Layer = Conv | Linear | Residual | GlobalAvgPool | Flatten
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Network:
    """A network: its name, the report it is from ("" for none) and its layers in order.

    image_sizes: sides in pixels it is meant for; larger ones work as well. classes: those of its
    report's data. notes: how the report is read where it is ambiguous.
    """

    name: str
    report: str
    image_sizes: tuple[int, ...]
    classes: int
    layers: tuple[Layer, ...]
    notes: str = ""

    @property
    def has_norm(self) -> bool:
        return any(
            isinstance(layer, Residual) or (isinstance(layer, NormAct) and layer.norm)
            for layer in self.layers
        )


class LayerRow(NamedTuple):
    """One elementary operation: a row of the table that torchsummary prints.

    name: kind and position, "Conv2d-1". layer: the built model's submodule that it belongs to,
    "conv1". output_shape: without the batch. flop: forward, for one image, 2 a multiply-add;
    convolutions and linear layers only.
    """

    name: str
    layer: str
    output_shape: Shape
    parameters: int
    flop: int

    @property
    def mflop(self) -> float:
        return self.flop / 1e6


class Totals(NamedTuple):
    """The figures below torchsummary's table; MB are 2^20 bytes at 4 bytes a value."""

    parameters: int
    trainable: int
    non_trainable: int
    input_mb: float
    forward_backward_mb: float
    parameters_mb: float
    total_mb: float


def layer_table(network: Network, image_size: int, classes: int) -> list[LayerRow]:
    """Return one row an elementary operation, in forward order.

    image_size: side in pixels of a square RGB image. classes: units of the last layer.
    Raises UsageError for an image too small, naming the layer and the smallest size that works.
    Layout of the table: torchsummary's, as in mao-2022 figure 1.
    """
    rows: list[LayerRow] = []
    for layer, operations in walk(network, image_size, classes):
        for kind, shape, parameters, flop in operations:
            rows.append(LayerRow(f"{kind}-{len(rows) + 1}", layer.name, shape, parameters, flop))
    return rows


def totals(network: Network, image_size: int, classes: int) -> Totals:
    """Return parameters and torchsummary's estimate of memory for a batch of one image.

    Every output counts twice (forward and backward). Raises UsageError as `layer_table`.
    """
    rows = layer_table(network, image_size, classes)
    count = sum(row.parameters for row in rows)
    outputs = sum(math.prod(row.output_shape) for row in rows)
    values = (INPUT_CHANNELS * image_size**2, 2 * outputs, count)
    sizes = [4 * number / 2**20 for number in values]
    # batch norm's running statistics are buffers: every parameter of these networks is trainable
    return Totals(count, count, 0, sizes[0], sizes[1], sizes[2], sum(sizes))


def parameters(network: Network, image_size: int, classes: int) -> int:
    """Return the number of trainable parameters. Raises UsageError as `layer_table`."""
    return sum(row.parameters for row in layer_table(network, image_size, classes))


def flop(network: Network, image_size: int, classes: int) -> int:
    """Return the forward FLOP of one image, 2 a multiply-add, convolutions and linear layers only.

    Raises UsageError as `layer_table`.
    """
    return sum(row.flop for row in layer_table(network, image_size, classes))


def train_flop(network: Network, image_size: int, classes: int) -> int:
    """Return forward + backward FLOP of one image, with no gradient for the image itself.

    Raises UsageError as `layer_table`.
    """
    rows = layer_table(network, image_size, classes)
    return 3 * sum(row.flop for row in rows) - rows[0].flop


class _Operation(NamedTuple):
    kind: str
    shape: Shape
    parameters: int = 0
    flop: int = 0


class Step(NamedTuple):
    """A layer in its place: the submodule's name, its record, the shape (K, P, Q) of its input."""

    name: str
    record: Layer
    input_shape: Shape


class _TooSmallError(Exception):
    """An output without pixels."""


def walk(
    network: Network, image_size: int, classes: int
) -> Iterator[tuple[Step, list[_Operation]]]:
    """The layers in order, each with its operations; raises UsageError as `layer_table`."""
    shape: Shape = (INPUT_CHANNELS, image_size, image_size)
    for name, record in _named_layers(network, classes):
        try:
            operations = list(_operations(record, shape))
        except _TooSmallError:
            smallest = _smallest_size(network, image_size)
            raise UsageError(
                f"{network.name}: {image_size}x{image_size} images are too small, nothing is left "
                f"of them at layer {name}; the smallest size that works is {smallest}x{smallest}"
            ) from None
        yield Step(name, record, shape), operations
        shape = operations[-1].shape


def _smallest_size(network: Network, too_small: int) -> int:
    for size in itertools.count(too_small + 1):
        shape: Shape = (INPUT_CHANNELS, size, size)
        try:
            for _, record in _named_layers(network, network.classes):
                shape = list(_operations(record, shape))[-1].shape
        except _TooSmallError:
            continue
        return size
    raise AssertionError("unreachable")


def _named_layers(network: Network, classes: int) -> Iterator[tuple[str, Layer]]:
    counts = {Conv: 0, Residual: 0, Linear: 0}
    words = {Conv: "conv", Residual: "block", Linear: "fc"}
    flat = False
    for layer in network.layers:
        if isinstance(layer, GlobalAvgPool):
            flat = True
            yield "avgpool", layer
            continue
        if isinstance(layer, Linear):
            if not flat:
                flat = True
                yield "flatten", Flatten()
            layer = replace(layer, units=layer.units or classes)
        kind = type(layer)
        counts[kind] += 1
        yield f"{words[kind]}{counts[kind]}", layer


def _operations(layer: Layer, shape: Shape) -> Iterator[_Operation]:
    match layer:
        case Conv():
            yield from _conv_operations(layer, shape)
        case Linear():
            yield from _linear_operations(layer, shape)
        case Residual():
            yield from _residual_operations(layer, shape)
        case GlobalAvgPool():
            yield _Operation("GlobalAvgPool", shape[:1])
        case Flatten():
            yield _Operation("Flatten", (math.prod(shape),))


def _conv_operations(conv: Conv, shape: Shape) -> Iterator[_Operation]:
    channels, height, width = shape
    r, s = conv.kernel_size
    top, bottom, left, right = conv.pads
    p = (height + top + bottom - r) // conv.stride + 1
    q = (width + left + right - s) // conv.stride + 1
    _check_pixels(p, q)
    shape = (conv.filters, p, q)
    weights = conv.filters * channels * r * s
    count = weights + conv.filters * conv.has_bias
    yield _Operation("Conv2d", shape, count, 2 * p * q * weights)
    yield from _norm_act_operations(conv, shape, "BatchNorm2d")
    if conv.pool:
        yield _pool_operation(conv.pool, shape)


def _pool_operation(pool: Pool, shape: Shape) -> _Operation:
    channels, *pixels = shape
    p, q = ((n + 2 * pool.padding - pool.size) // pool.stride + 1 for n in pixels)
    _check_pixels(p, q)
    return _Operation("MaxPool2d", (channels, p, q))


def _check_pixels(p: int, q: int) -> None:
    if p < 1 or q < 1:
        raise _TooSmallError


def _linear_operations(linear: Linear, shape: Shape) -> Iterator[_Operation]:
    weights = shape[0] * linear.units
    shape = (linear.units,)
    count = weights + linear.units * linear.has_bias
    yield _Operation("Linear", shape, count, 2 * weights)
    yield from _norm_act_operations(linear, shape, "BatchNorm1d")
    if linear.dropout:
        yield _Operation("Dropout", shape)


def _residual_operations(block: Residual, shape: Shape) -> Iterator[_Operation]:
    first, second = block.convs
    projection = block.projection(shape[0])
    operations = list(_conv_operations(projection, shape)) if projection else []
    operations += _conv_operations(first, shape)
    operations += _conv_operations(replace(second, post_slope=1.0), operations[-1].shape)
    yield from operations
    yield _Operation("Add", operations[-1].shape)
    yield from _activation_operations(second.post_slope, operations[-1].shape)


def _norm_act_operations(layer: NormAct, shape: Shape, norm: str) -> Iterator[_Operation]:
    yield from _activation_operations(layer.pre_slope, shape)
    if layer.norm:
        yield _Operation(norm, shape, 2 * shape[0])
    yield from _activation_operations(layer.post_slope, shape)


def _activation_operations(slope: float, shape: Shape) -> Iterator[_Operation]:
    if slope != 1:
        yield _Operation("ReLU" if slope == 0 else "LeakyReLU", shape)
