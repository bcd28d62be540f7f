"""Initial weights: reproducible, with the spread that each scheme promises."""

import math

import pytest
import torch
from torch import nn

from fastcnn.archs import get_network
from fastcnn.archs.build import build
from fastcnn.archs.init import SCHEMES, initialise
from fastcnn.archs.spec import Conv, Linear, Network
from fastcnn.errors import UsageError


@pytest.mark.parametrize("scheme", SCHEMES)
def test_initial_weights_come_from_the_generator(scheme):
    def draw(seed, elsewhere):
        torch.manual_seed(elsewhere)
        model = build(get_network("mao-batchnorm"), 32, 10)
        initialise(model, scheme, torch.Generator().manual_seed(seed))
        return list(model.state_dict().values())

    first, again, other = draw(0, 1), draw(0, 2), draw(1, 1)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, other))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_initial_weights_have_the_schemes_spread(scheme):
    network = Network("wide", "", (8,), 10, (Conv(64, 5), Linear(512), Linear()))
    model = build(network, 8, 10)
    initialise(model, scheme, torch.Generator().manual_seed(0))
    for layer in (model.conv1.conv, model.fc1.linear):
        weight = layer.weight
        fan_in = weight[0].numel()
        fan_out = weight[:, 0].numel()
        bounds = {
            "xavier": math.sqrt(6 / (fan_in + fan_out)),
            "uniform": 0.05,
            "torch": math.sqrt(1 / fan_in),
        }
        deviation = bounds[scheme] / math.sqrt(3) if scheme in bounds else math.sqrt(2 / fan_in)
        assert weight.std().item() == pytest.approx(deviation, rel=0.03)
        if scheme in bounds:
            assert weight.abs().max().item() <= bounds[scheme]
        else:
            assert weight.abs().max().item() > 3 * deviation
        if scheme == "torch":
            assert 0.5 * bounds["torch"] < layer.bias.abs().max().item() <= bounds["torch"]
        else:
            assert layer.bias.abs().max() == 0


def test_initialise_resets_norms():
    model = build(get_network("vgg11"), 32, 10)
    norm = model.conv1.norm
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor.fill_(5)
    initialise(model, "he", torch.Generator().manual_seed(0))
    values = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    assert [v.mean().item() for v in values] == [1, 0, 0, 1]


def test_unknown_scheme():
    with pytest.raises(UsageError, match="unknown initialiser 'xaver'; did you mean 'xavier'"):
        initialise(nn.Sequential(), "xaver", torch.Generator())
