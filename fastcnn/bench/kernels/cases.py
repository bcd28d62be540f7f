"""What the layers of the networks ask of the ops: shapes, tensors, and the bytes that must move.

The cases are taken from the networks themselves: each is built without memory (torch's "meta"
device) and called once, and every call of an op is noted.

Sizes: x is (N, K, P, Q) in channels-last memory, or (N, K). An activation is its negative slope.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastcnn.archs import get_network, layers
from fastcnn.archs.build import build
from fastcnn.archs.spec import Network
from fastcnn.ops import reference

MOMENTUM, EPS = 0.1, 1e-5
OPS = ("bn_act", "bn_act_pool", "bias_act", "bias_act_pool")


@dataclass(frozen=True)
class Case:
    """One call of an op. pool: window, stride, padding; bias: whether a bias op is given one."""

    op: str
    shape: tuple[int, ...]
    pre_slope: float = 1.0
    post_slope: float = 1.0
    pool: tuple[int, int, int] | None = None
    residual: bool = False
    bias: bool = True
    training: bool = True

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.kind}-{shape}-{self.pre_slope:g}-{self.post_slope:g}"

    @property
    def kind(self) -> str:
        """The op, with what makes it another kernel or another amount of work."""
        words = [self.op] + ["residual"] * self.residual + ["eval"] * (not self.training)
        words += ["nobias"] * (not self.bias)
        words += ["pool" + "".join(map(str, self.pool))] if self.pool else []
        return "-".join(words)

    @property
    def norm(self) -> bool:
        return self.op.startswith("bn")

    @property
    def pooled_shape(self) -> tuple[int, ...]:
        """The result's."""
        if self.pool is None:
            return self.shape
        window, stride, padding = self.pool
        pixels = [(size + 2 * padding - window) // stride + 1 for size in self.shape[2:]]
        return (*self.shape[:2], *pixels)

    @property
    def does_nothing(self) -> bool:
        """A last layer's: no bias, no activation, the op returns x itself."""
        return not (self.norm or self.bias or self.residual or self.pool or self.post_slope != 1)


def forward_bytes(case: Case, itemsize: int) -> int:
    """Bytes that the forward pass must read and write; itemsize: of a value of x.

    With Y the bytes of x, O those of the result, C a byte for each pooled value, which is what the
    backward needs to know of a window:

        statistics (batch norm in training)   read Y: they must be known before the first result
        the op itself                         read Y, write O; with a residual read Y more
        with a pool, in training              write C

    The vectors of K values are left out.
    """
    y, o, c = _sizes(case, itemsize)
    statistics = y if case.norm and case.training else 0
    return statistics + y + o + y * case.residual + c * case.training


def backward_bytes(case: Case, itemsize: int) -> int:
    """Bytes that the backward pass of training must read and write.

        batch norm, sums over the batch       read dy, x and, with a pool, C
        batch norm, dx                        the same again, write dx
        with a residual                       the sums' pass also reads y, for the activation's
                                              mask, and writes the residual's gradient, which the
                                              second pass then reads in dy's place
        bias                                  read dy, y for the mask, write dx
        bias, with a pool                     read dy and C, write dx: x and y are not needed

    dy counts O, x, y and gradients Y. A slope of 1 has no mask: y is not read, dy's place stays.
    """
    y, o, c = _sizes(case, itemsize)
    masked = case.post_slope != 1
    if not case.norm:
        return o + c + y * (case.pool is None and masked) + y
    sums = o + c + y
    return sums + sums + y + (y * (1 + masked) if case.residual else 0)


def _sizes(case: Case, itemsize: int) -> tuple[int, int, int]:
    y, o = math.prod(case.shape), math.prod(case.pooled_shape)
    return y * itemsize, o * itemsize, o if case.pool else 0


# from the networks


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer and the call that follows it.

    x, weight, y: shapes of the product's input, filters and result, x after the padding that an
    even kernel asks for beside `padding`. stride, padding: (1, 1), (0, 0) for a linear layer.
    """

    name: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    y: tuple[int, ...]
    stride: tuple[int, int]
    padding: tuple[int, int]
    case: Case

    @property
    def flop(self) -> int:
        """Of the product, 2 a multiply-add; each of its gradients takes the same."""
        return 2 * math.prod(self.y) * math.prod(self.weight[1:])


def layers_of(network: Network, batch: int, training: bool = True) -> list[Layer]:
    """Return the layers of a network with weights, in order, at its first image size."""
    found: list[Layer] = []
    calls: list[Case] = []

    def recorded(op: str) -> Callable[..., Tensor]:
        function = getattr(reference, op)

        def record(*arguments: Any, **named: Any) -> Tensor:
            result = function(*arguments, **named)
            calls.append(_case(op, function, arguments, named))  # after those that it makes itself
            return result

        return record

    def note(name: str, module: Any, x: tuple[int, ...]) -> None:
        product = getattr(module, "conv", None) or module.linear
        stride, padding = (1, 1), (0, 0)
        if len(x) == 4:
            stride = (module.stride, module.stride)
            padding, (left, right, top, bottom) = reference.split_pads(module.pads)
            x = (*x[:2], x[2] + top + bottom, x[3] + left + right)
        weight, call = tuple(product.weight.shape), calls[-1]
        found.append(Layer(name, x, weight, call.shape, stride, padding, call))

    size = network.image_sizes[0]
    recording = mock.patch.dict(vars(reference), {op: recorded(op) for op in OPS})
    with recording, torch.device("meta"):
        model = build(network, size, network.classes, "torch").train(training)
        for name, module in model.named_modules():
            if isinstance(module, layers.ConvNormAct | layers.LinearNormAct):
                module.register_forward_hook(
                    lambda m, x, _, name=name: note(name, m, tuple(x[0].shape))
                )
        model(torch.empty(batch, 3, size, size))
    return found


def calls_of(network: Network, batch: int, training: bool = True) -> list[Case]:
    """Return what the layers of a network call for a batch, in order, at its first image size."""
    return [layer.case for layer in layers_of(network, batch, training)]


def _case(
    op: str, function: Callable[..., Tensor], arguments: tuple[Any, ...], named: dict[str, Any]
) -> Case:
    bound = inspect.signature(function).bind(*arguments, **named)
    bound.apply_defaults()
    given = bound.arguments
    return Case(
        op,
        tuple(given["x"].shape),
        given.get("pre_slope", 1.0),
        given["post_slope"] if "post_slope" in given else given["slope"],
        given.get("pool"),
        given.get("residual") is not None,
        given["bias"] is not None,
        given.get("training", True),
    )


def distinct_cases(names: list[str], batch: int) -> dict[Case, list[str]]:
    """Return the distinct calls of these networks, each with the networks that make it: those of
    training, then those of evaluation that differ from them."""
    found: dict[Case, list[str]] = {}
    for training in (True, False):
        for name in names:
            for case in calls_of(get_network(name), batch, training):
                if not case.does_nothing and name not in found.setdefault(case, []):
                    found[case].append(name)
    return found


def largest_of_each_kind(cases: dict[Case, list[str]]) -> dict[Case, list[str]]:
    """Return one case of each op, pool and mode: the one with the largest x."""
    largest: dict[str, Case] = {}
    for case in cases:
        kept = largest.setdefault(case.kind, case)
        if math.prod(case.shape) > math.prod(kept.shape):
            largest[case.kind] = case
    return {case: cases[case] for case in largest.values()}


# tensors and calls


@dataclass
class Inputs:
    """The tensors of a call by name, and the gradient of its result."""

    tensors: dict[str, Tensor]
    dy: Tensor

    @property
    def differentiable(self) -> list[Tensor]:
        return [t for t in self.tensors.values() if t.requires_grad]

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Copies of this dtype."""
        copies = {
            name: t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
            for name, t in self.tensors.items()
        }
        return Inputs(copies, self.dy.to(dtype))

    def copy(self) -> "Inputs":
        """A copy whose running statistics can move."""
        moved = ("running_mean", "running_var")
        tensors = {n: t.clone() if n in moved else t for n, t in self.tensors.items()}
        return Inputs(tensors, self.dy)


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, seed: int) -> Inputs:
    """Random tensors for a case: images of `dtype` in channels-last memory, the rest fp32."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def image(shape: tuple[int, ...]) -> Tensor:
        form = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return draw(*shape).to(dtype, memory_format=form)

    channels = case.shape[1]
    tensors = {"x": image(case.shape)}
    if case.norm:
        tensors["weight"] = 1 + 0.2 * draw(channels)
    if case.bias:
        tensors["bias"] = 0.2 * draw(channels)
    if case.residual:
        tensors["residual"] = image(case.shape)
    tensors = {name: t.requires_grad_(case.training) for name, t in tensors.items()}
    if case.norm:
        tensors["running_mean"] = 0.1 * draw(channels)
        tensors["running_var"] = 1 + 0.1 * draw(channels).abs()
    return Inputs(tensors, image(case.pooled_shape))


def function_of(case: Case, ops: ModuleType) -> Callable[[dict[str, Tensor]], Tensor]:
    """Return the call of a module's op with everything fixed but the tensors."""
    op = getattr(ops, case.op)
    slopes, pool = (case.pre_slope, case.post_slope), case.pool

    def bias(t: dict[str, Tensor]) -> Tensor:
        return op(t["x"], t.get("bias"), case.post_slope, pool or t.get("residual"))

    def norm(t: dict[str, Tensor]) -> Tensor:
        statistics = (t["running_mean"], t["running_var"], case.training, MOMENTUM, EPS)
        return op(t["x"], t["weight"], t["bias"], *statistics, *slopes, pool or t.get("residual"))

    return norm if case.norm else bias


# what the backward keeps


def kept_bytes(call: Callable[[], Tensor], known: list[Tensor]) -> int:
    """Bytes that the backward of a call keeps in memory by itself.

    Each distinct storage that autograd saves counts once and whole. Left out are those of `known`
    (parameters, and whatever else lives on anyway) and that of the result, which the next layer's
    convolution keeps as its input under every backend.
    """
    storages: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        result = call()
    for tensor in [*known, result]:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
