"""Initial weights of a network, reproducible from one torch.Generator."""

import math
from collections.abc import Callable

from torch import Generator, Tensor, nn
from torch.nn import init

from fastcnn.errors import UsageError, nearest

UNIFORM_BOUND = 0.05
"""Half the width of Keras' RandomUniform, the RUI of skagerstrom2018."""


def _he(weight: Tensor, generator: Generator) -> None:
    # fan_in: the choice of He et al. 2015, eq. 10, and of Keras' he_normal (HEI of skagerstrom2018)
    init.kaiming_normal_(weight, mode="fan_in", nonlinearity="relu", generator=generator)


def _xavier(weight: Tensor, generator: Generator) -> None:
    init.xavier_uniform_(weight, generator=generator)


def _uniform(weight: Tensor, generator: Generator) -> None:
    init.uniform_(weight, -UNIFORM_BOUND, UNIFORM_BOUND, generator=generator)


def _torch(weight: Tensor, generator: Generator) -> None:
    init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)


SCHEMES: dict[str, Callable[[Tensor, Generator], None]] = {
    "he": _he,
    "xavier": _xavier,
    "uniform": _uniform,
    "torch": _torch,
}


def initialise(model: nn.Module, scheme: str, generator: Generator) -> None:
    """Draw the weights of every convolution and linear layer anew, in place.

    scheme: he, normal with deviation √(2 / fan_in) (He et al. 2015); xavier, uniform in
    ±√(6 / (fan_in + fan_out)) (Glorot and Bengio 2010); uniform, in ±0.05; torch, torch's default,
    uniform in ±√(1 / fan_in), for biases too. Other biases are 0, as in Keras. Norms: weight 1,
    bias 0, running statistics reset. generator: on the model's device; the same seed gives the same
    weights.

    Raises UsageError for an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"unknown initialiser '{scheme}'{nearest(scheme, SCHEMES)}")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            SCHEMES[scheme](module.weight, generator)
            if module.bias is not None and scheme == "torch":
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound, generator=generator)
            elif module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()
