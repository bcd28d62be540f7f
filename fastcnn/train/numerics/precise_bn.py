"""Precise batch norm: the running statistics taken anew from training images before an evaluation.

The running statistics average over the last tens of steps, and so over weights that have moved
since. In an epoch of few steps they fit the weights that are evaluated badly, or not at all. Here
they are the means, over a few batches, of what the weights as they are give (Wu and Johnson 2021,
"Rethinking 'Batch' in BatchNorm", arXiv 2105.07576, section 3). Training itself never reads them.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import nn

from fastcnn.archs.layers import ConvNormAct, LinearNormAct
from fastcnn.data.loaders import Batch, Loader
from fastcnn.train.distributed import ALONE, Distributed
from fastcnn.train.numerics.half import half_network, refresh
from fastcnn.train.numerics.statistics import statistics

# by count of images: 2,048 forward beside 50,000 forward and backward (three times a forward) and
# 10,000 of the evaluation make 1.3 % of an epoch on CIFAR-10
IMAGES = 2_048
# auto: in fewer steps an epoch. In 25, 50, 100, 200 and 390 steps mao-batchnorm gains by it 7, 0.2,
# 2, 2 and 2 points of top-1 in its first epoch on CIFAR-10, and less than 1 in its third and last
# (--epoch-images 128 x steps --epochs 3 --test-subset 2000, one seed, AMD EPYC, 2026-12-01)
FEW_STEPS = 200


def wanted(mode: str, steps_per_epoch: int) -> bool:
    """Whether --precise-bn `mode` applies to epochs of so many steps."""
    return mode == "on" or (mode == "auto" and steps_per_epoch < FEW_STEPS)


class PreciseBatchNorm:
    """Takes the running statistics of `model` anew, of its weights as they are at each call.

    They are those of the network that is evaluated: without dropout, in `dtype` (None: the
    model's own), and over the images of all `ranks`. The model computes nothing itself: a network
    that shares its weights and statistics does, so that no mode of it changes.
    """

    def __init__(
        self, model: nn.Module, dtype: torch.dtype | None = None, ranks: Distributed = ALONE
    ):
        self.dtype, self.ranks = dtype, ranks
        self._network, self._halves = _network_of_batches(model, dtype)
        self._statistics = statistics(model)

    @torch.no_grad()
    def __call__(
        self, batches: Iterable[Batch], after_batch: Callable[[], None] | None = None
    ) -> None:
        """Take them from `batches`, of as many on each rank; each batch counts alike.

        `after_batch` is called after each batch; what it raises leaves the statistics as they were.
        """
        if not self._statistics:
            return
        refresh(self._halves)
        before = [tensor.clone() for tensor in self._statistics]
        means = [torch.zeros_like(tensor) for tensor in self._statistics]
        try:
            for number, (images, _) in enumerate(batches, 1):
                self._network(images.to(self.dtype or images.dtype))
                moves = torch._foreach_sub(self._statistics, means)
                torch._foreach_div_(moves, number)
                torch._foreach_add_(means, moves)
                if after_batch:
                    after_batch()
            for mean in means:
                self.ranks.all_reduce_sum(mean)
            torch._foreach_div_(means, self.ranks.world)
        except BaseException:
            torch._foreach_copy_(self._statistics, before)
            raise
        torch._foreach_copy_(self._statistics, means)


def batches_of(loader: Loader) -> int:
    """How many training batches each rank takes: IMAGES of all ranks together, and no partial batch
    beside whole ones."""
    return max(1, min(-(-IMAGES // loader.step_images), loader.taken // loader.step_images))


def _network_of_batches(
    model: nn.Module, dtype: torch.dtype | None
) -> tuple[nn.Module, dict[nn.Parameter, nn.Parameter]]:
    """A network with the weights of `model`, rounded to `dtype`, whose running statistics are the
    model's and become those of each batch; and the rounded weights by their originals."""
    network, halves = half_network(model, dtype)
    if network is model:
        # deepcopy takes what its memo holds for copied already
        network = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    network.eval()
    for layer in network.modules():
        if isinstance(layer, ConvNormAct | LinearNormAct) and layer.norm is not None:
            layer.training, layer.norm.momentum = True, 1.0
        if isinstance(layer, LinearNormAct):
            layer.dropout = 0.0
    return network, halves
