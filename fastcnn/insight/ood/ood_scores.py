"""What a trained network tells of an image beside its class: scores by which a foreign one stands
out."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastcnn.archs import get_network
from fastcnn.archs.spec import layer_table
from fastcnn.errors import NumbersError
from fastcnn.train.checkpoints.load_run import TrainedModel

PROBABILITY, ENERGY = "max softmax", "energy"
ACTIVATIONS = ("ReLU", "LeakyReLU")  # kinds in the table of layers


def called(score: str) -> str:
    """A score's name in a sentence."""
    return score if score in (PROBABILITY, ENERGY) else f"mean activation of {score}"


@dataclass(frozen=True)
class Scores:
    """Scores of n images, float64 (n,) each; higher is more like the training images.

    activations: the mean of an activation's output over all its values, before dropout and pool, by
    the name that `fastcnn archs <network>` gives it ("ReLU-9"), in forward order (murgolo, section
    2.3). probability: maximum of the softmax (Hendrycks and Gimpel 2017). energy: the negative free
    energy log Σ exp(logit) at temperature 1 (Liu et al. 2020).
    """

    activations: Mapping[str, np.ndarray]
    probability: np.ndarray
    energy: np.ndarray

    def __len__(self) -> int:
        return len(self.energy)

    def by_name(self) -> dict[str, np.ndarray]:
        """All of them: the activations by their names, PROBABILITY, ENERGY."""
        return {**self.activations, PROBABILITY: self.probability, ENERGY: self.energy}


def activation_names(trained: TrainedModel) -> list[str]:
    """The activations of a network in forward order, as in its table of layers."""
    network = get_network(trained.config.model.arch)
    rows = layer_table(network, trained.image_size, len(trained.classes))
    return [row.name for row in rows if row.name.split("-")[0] in ACTIVATIONS]


@torch.no_grad()
def scores(
    trained: TrainedModel, loader: Iterable[tuple[Tensor, Tensor]], device: torch.device
) -> Scores:
    """Score every image of `loader`, batches of (N, 3, H, W) and labels, in one pass.

    By a copy of the network in evaluation mode, in fp32 and plain torch, whatever backend and mode
    `trained` has; of an image alone, not of its mirror image. Raises NumbersError where a score is
    not finite.
    """
    network = _plain_copy(trained.model).to(device)
    names = activation_names(trained)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in (*names, PROBABILITY, ENERGY)}
    for images, _ in loader:
        with _ActivationMeans() as seen:
            logits = network(images.to(device, torch.float32)).double()
        found = dict(zip(names, seen.means, strict=True))
        found[PROBABILITY] = logits.softmax(1).amax(1)
        found[ENERGY] = logits.logsumexp(1)
        for name, values in found.items():
            parts[name].append(values.cpu().numpy())
    arrays = {name: np.concatenate([np.empty(0), *values]) for name, values in parts.items()}
    for name, values in arrays.items():
        if not np.isfinite(values).all():
            raise NumbersError(f"{trained.path}: {name} is not finite: broken weights")
    probability, energy = arrays.pop(PROBABILITY), arrays.pop(ENERGY)
    return Scores(arrays, probability, energy)


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode whose layers call plain torch and defer nothing."""
    network = copy.deepcopy(model).eval()
    for module in network.modules():
        if hasattr(module, "backend"):
            module.backend = "torch"  # type: ignore[assignment]
    return network


class _ActivationMeans(TorchFunctionMode):
    """Notes the mean of each image's values behind every activation, in forward order.

    A layer is one call of an op, pool included; a forward hook would come too late.
    """

    def __init__(self) -> None:
        super().__init__()
        self.means: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (F.relu, F.leaky_relu):
            self.means.append(result.flatten(1).mean(1, dtype=torch.float64))
        return result
