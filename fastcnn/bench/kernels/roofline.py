"""The least time of a training step: bytes that must move, FLOP that must be computed.

A step is a list of passes, each of which takes max(bytes / bandwidth, FLOP / rate). What the passes
of an image read and write, in values of s bytes, with X, Y the input and the result of a layer's
product, n the Y of layers without a pool, p those of layers with one and o what the pool leaves:

    product            forward, weight gradient and data gradient: X + Y each; the first layer has
                       no data gradient
    what follows       eager           16 Y + 3 p + 2 o, and 16 bytes (an int64 index, written and
                                       read) for each of o; batch norm 3 Y and 5 Y, an activation
                                       2 Y and 3 Y, a separate bias 2 Y and Y, the pool p and o, its
                                       zero-filled gradient p, filled from o by another pass
                       K1-K3           8 n + 5 p + 3 o: statistics Y; normalise, act and pool Y, o;
                                       sums Y, o; dx Y, o, Y
                       K4              Y less: the statistics are the convolution's
                       K5              3 n + 2 o less than K4: normalise and act in the next layer's
                                       load (2 n), the backward's sums in its data gradient
    without a norm     eager           8 Y + 3 p + 2 o and the index
                       K1-K3           Y, o; then 3 n, or p + o with a pool
                       K4, K5          forward 0 (the product's epilogue, which writes o in place of
                                       p); backward the same
    a parameter        eager           44 bytes of update and, in half precision, 12 of casts
                       fused           20 bytes of update and, in half precision, 6 of the cast

These reproduce the table of the project's targets (one H200, 4.3 TB/s, 790 TFLOP/s, batch 1024,
bf16) to its last digit, but for cnn-a without a norm: 3.01 M images/s where the table says 2.98 M.
The split of K5 and the eager optimiser (unfused, as the table's figures want it) are inferred from
those figures.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from fastcnn.archs.spec import Network, parameters
from fastcnn.bench.kernels.cases import Layer, layers_of

COLUMNS = ("eager", "K1-K3", "K4", "K5")
FLOOR = "K5"  # the column whose share is told: the least that is thought possible


class Pass(NamedTuple):
    """A read or write of memory, or a product with its FLOP."""

    bytes: float
    flop: float = 0.0


class Roofline(NamedTuple):
    """Of one image of a training step: bytes, FLOP, seconds."""

    bytes: float
    flop: float
    seconds: float

    @property
    def images_per_s(self) -> float:
        return 1 / self.seconds


def roofline(
    network: Network, batch: int, itemsize: int, column: str, bandwidth: float, rate: float
) -> Roofline:
    """Return what an image costs at least in a step of `batch` images.

    itemsize: bytes of an activation; column: one of COLUMNS; bandwidth: bytes/s; rate: FLOP/s.
    """
    passes = list(passes_of(network, batch, itemsize, column))
    seconds = sum(max(p.bytes / bandwidth, p.flop / rate) for p in passes)
    moved, computed = sum(p.bytes for p in passes), sum(p.flop for p in passes)
    return Roofline(moved / batch, computed / batch, seconds / batch)


def passes_of(network: Network, batch: int, itemsize: int, column: str) -> Iterable[Pass]:
    """Yield the passes of a step of `batch` images."""
    layers = layers_of(network, batch)
    for layer in layers:
        yield from _products(layer, itemsize, column, first=layer is layers[0])
        yield Pass(_chain_bytes(layer, itemsize, column))
    half = itemsize < 4
    each = 44 + 12 * half if column == "eager" else 20 + 6 * half
    yield Pass(each * parameters(network, network.image_sizes[0], network.classes))


def _products(layer: Layer, itemsize: int, column: str, first: bool) -> Iterable[Pass]:
    x, y = math.prod(layer.x), math.prod(layer.y)
    epilogue = column in ("K4", "K5") and not layer.case.norm
    written = math.prod(layer.case.pooled_shape) if epilogue else y
    yield Pass((x + written) * itemsize, layer.flop)
    for _ in range(1 if first else 2):
        yield Pass((x + y) * itemsize, layer.flop)


def _chain_bytes(layer: Layer, itemsize: int, column: str) -> float:
    """Bytes of what follows the product."""
    case = layer.case
    if case.does_nothing:
        return 0
    y = math.prod(layer.y)
    n, p, o = (0, y, math.prod(case.pooled_shape)) if case.pool else (y, 0, 0)
    if column == "eager":
        values = (16 if case.norm else 8) * y + 3 * p + 2 * o
        return values * itemsize + 16 * o + 6 * y * itemsize * case.residual
    if case.norm:
        values = 8 * n + 5 * p + 3 * o
        values -= y if column != "K1-K3" else 0
        values -= 3 * n + 2 * o if column == "K5" else 0
    else:
        values = 3 * n + p + o
        values += y + (o or n) if column == "K1-K3" else 0
    return (values + 2 * y * case.residual) * itemsize
