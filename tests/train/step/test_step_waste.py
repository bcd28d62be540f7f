"""A step copies, casts and clears nothing large: no weight, no gradient, no activation."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.config import OptimConfig
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.step import TrainStep

CPU = torch.device("cpu")
WASTE = ("clone", "_to_copy", "copy_", "zeros", "zeros_like", "zero_", "fill_", "full")
SMALL = 200  # values: logits and their gradients in fp32, sums
BATCH = 8


class Waste(TorchDispatchMode):
    """Notes the operations that only move or clear memory of more than a few values."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        for tensor in tree_leaves(results):
            if name in WASTE and isinstance(tensor, torch.Tensor) and tensor.numel() > SMALL:
                self.found.append((name, tuple(tensor.shape), tensor.dtype))
        return results


def waste_of(name, number_format, **options):
    network = NETWORKS[name]
    size = network.image_sizes[0]
    model = build(network, size, 10, "fused")
    config = OptimConfig(**options)
    step = TrainStep(model, config, Precision(number_format), 4, 0, CPU, backend="fused")
    images = torch.randn(BATCH, 3, size, size).to(number_format or torch.float32)
    batch = images.contiguous(memory_format=torch.channels_last), torch.arange(BATCH)
    step(*batch)
    with Waste() as waste:
        step(*batch)
    # the running statistics of all norms, 16 KB a thousand channels, which a step may have to give
    # back
    kept = [
        ("copy_", tuple(all_of.shape), all_of.dtype)
        for all_of in [step.guard.statistics]
        if all_of is not None
    ]
    return [one for one in waste.found if one not in kept], size


@pytest.mark.full
@pytest.mark.parametrize("number_format", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "adam", "ema": 0.9, "clip_grad": 1.0}], ids=["sgd", "adam"]
)
@pytest.mark.parametrize("name", ["vgg16", "vgg11"])
def test_nothing_large_is_copied_cast_or_cleared(name, options, number_format, library):
    assert waste_of(name, number_format, **options)[0] == []


@pytest.mark.parametrize("name", ["cnn-a", "mao-default", "tiny-d"])
def test_only_a_flattened_image_is_brought_into_torchs_order(name, library):
    found, _ = waste_of(name, None)
    # forward and backward: the weights of the linear layer are those of a torch.nn network
    assert len(found) == 2
    assert {(kind, shape[0]) for kind, shape, _ in found} == {("clone", BATCH)}
