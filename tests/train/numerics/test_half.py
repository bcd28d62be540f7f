"""Half-precision copies of the weights: autocast's arithmetic without its casts."""

import copy

import pytest
import torch
from torch.nn import functional as F

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.config import OptimConfig
from fastcnn.train.numerics.half import half_network, refresh
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.step import TrainStep

CPU = torch.device("cpu")
FAMILIES = ["cnn-a", "murgolo-improved", "mao-batchnorm", "tiny-d", "vgg11", "resnet18"]


def network_of(name):
    network = NETWORKS[name]
    model = build(network, network.image_sizes[0], 10, "torch")
    initialise(model, "torch", torch.Generator().manual_seed(0))
    return model, network.image_sizes[0]


def gradients(model, images, labels):
    loss = F.cross_entropy(model(images).float(), labels)
    return torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_autocast_bit_for_bit(name):
    model, size = network_of(name)
    half, _ = half_network(model, torch.bfloat16)
    images = torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(4)
    cast = copy.deepcopy(model)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = gradients(cast, images, labels)
    torch.manual_seed(0)
    found = gradients(half, images.bfloat16(), labels)
    for (parameter, _), mine, theirs in zip(model.named_parameters(), found, wanted, strict=True):
        assert torch.equal(mine.float(), theirs), parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_norms_and_statistics_are_shared_and_the_rest_is_copied(name):
    model, _ = network_of(name)
    half, copies = half_network(model, torch.bfloat16)
    pairs = list(zip(model.named_parameters(), half.named_parameters(), strict=True))
    for (key, original), (_, used) in pairs:
        if original in copies:
            assert used is copies[original], key
            assert used.dtype == torch.bfloat16
            assert used.stride() == original.stride()
        else:
            assert used is original, key
    assert all(original in copies for (_, original), _ in pairs if original.ndim > 1)
    own, shared = dict(model.named_buffers()), dict(half.named_buffers())
    assert all(shared[key] is buffer for key, buffer in own.items())


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_copies_are_the_rounded_weights_after_every_step(optimizer, backend, library):
    model, size = network_of("murgolo-improved")
    config = OptimConfig(optimizer=optimizer, lr=0.01)
    step = TrainStep(model, config, Precision(torch.bfloat16), 4, 0, CPU, backend=backend)
    for _ in range(3):
        step(torch.randn(8, 3, size, size), torch.arange(8))
        for original, used in step._halves.items():
            assert torch.equal(used.detach(), original.detach().bfloat16())
            assert original.dtype == torch.float32


def test_refresh_rounds_anew():
    model, _ = network_of("cnn-a")
    _, copies = half_network(model, torch.float16)
    with torch.no_grad():
        model.conv1.conv.weight.fill_(1 / 3)
    refresh(copies)
    assert (copies[model.conv1.conv.weight] == torch.tensor(1 / 3).half()).all()


def test_without_a_half_precision_the_model_itself_computes():
    model, _ = network_of("cnn-a")
    assert half_network(model, None) == (model, {})
