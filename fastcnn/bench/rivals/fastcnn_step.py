"""The training step of `fastcnn train`, without end, for a benchmark."""

import itertools
import math

import torch
from torch import nn

from fastcnn.bench.rivals.baselines import PADDING, Recipe
from fastcnn.config import AugmentConfig, DataConfig, OptimConfig
from fastcnn.data import Images, Loader, Normalization, make_loader
from fastcnn.train.graph import GraphMode
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.step import TrainStep

STEPS = 200_000  # more than a benchmark makes: the schedule has an end


def loader_of(
    images: Images,
    data: DataConfig,
    normalization: Normalization,
    device: torch.device,
    seed: int,
    augment: bool,
    dtype: torch.dtype = torch.float32,
) -> Loader:
    """Return a training loader of whole batches, or one that leaves the images and their order."""
    plain = AugmentConfig(crop_padding=0, flip="none")
    return make_loader(
        images,
        data,
        AugmentConfig(crop_padding=PADDING, flip="random") if augment else plain,
        normalization,
        batch_size=data.batch_size,
        device=device,
        dtype=dtype,
        seed=seed,
        shuffle=augment,
        drop_last=True,
    )


class OurStep:
    """TrainStep with the recipe of the rivals, an optimisation step a call.

    warm_up: eager steps before the graph's capture. Raises UsageError where a graph is wanted and
    cannot be had, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        precision: Precision,
        loader: Loader,
        device: torch.device,
        graph: bool,
        warm_up: int,
    ):
        config = OptimConfig(
            epochs=math.ceil(STEPS / len(loader)),
            schedule="constant",
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            label_smoothing=recipe.label_smoothing,
        )
        mode: GraphMode = "on" if graph else "off"
        self.step = TrainStep(model, config, precision, len(loader), 0, device, graph=mode)
        self.step.replay.warm_up = warm_up
        epochs = (self.step.epoch(loader) for _ in itertools.repeat(None))
        self._steps = itertools.chain.from_iterable(epochs)

    def __call__(self) -> None:
        next(self._steps)

    @property
    def graphs(self) -> int:
        """Graphs captured so far."""
        return self.step.replay.captured

    @property
    def loss_sum(self) -> float:
        """Losses of all images so far, summed."""
        figures = self.step.metrics.read()
        return figures.loss * figures.images
