"""The training step of `fastcnn train`, without end, for a benchmark."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastcnn.bench.rivals import PADDING, Recipe
from fastcnn.config import AugmentConfig, DataConfig, OptimConfig
from fastcnn.data import Images, Loader, Normalization, make_loader
from fastcnn.errors import UsageError
from fastcnn.train.precision import Precision
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

    Raises UsageError where a graph is wanted and cannot be had, with the reason.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        precision: Precision,
        loader: Loader,
        device: torch.device,
        graph: bool,
    ):
        per_epoch = len(loader)
        config = OptimConfig(
            epochs=math.ceil(STEPS / per_epoch),
            schedule="constant",
            lr=recipe.lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            label_smoothing=recipe.label_smoothing,
        )
        options: dict[str, Any] = {}
        if hasattr(TrainStep, "epoch"):
            options["graph"] = "on" if graph else "off"
        elif graph:
            raise UsageError("the training step has no CUDA graph")
        self.step = TrainStep(model, config, precision, per_epoch, 0, device, **options)
        self._steps = self._endless(loader)
        self._graph = graph

    def __call__(self) -> None:
        next(self._steps)
        if self._graph and (note := getattr(self.step, "graph_note", "")):
            raise UsageError(f"no CUDA graph: {note}")

    @property
    def loss_sum(self) -> float:
        """Losses of all images so far, summed."""
        figures = self.step.metrics.read()
        return figures.loss * figures.images

    def _endless(self, loader: Loader) -> Iterator[None]:
        if hasattr(self.step, "epoch"):
            yield from itertools.chain.from_iterable(
                self.step.epoch(loader) for _ in itertools.repeat(None)
            )
        while True:
            for images, labels in loader:
                self.step(images, labels)
                yield
