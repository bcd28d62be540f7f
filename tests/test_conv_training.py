"""Training through the convolution's kernels, compiled for the CPU, against torch's."""

from dataclasses import replace

import pytest
import torch
from simt.conv_ops import as_ops
from sklearn import datasets
from torch.nn import functional as F

from fastcnn.archs import NETWORKS
from fastcnn.archs.init import initialise
from fastcnn.archs.spec import Conv, Linear, build
from fastcnn.ops import plans
from fastcnn.ops.plans import FUSED
from fastcnn.train.half import half_network, refresh

STEPS, BATCH, SEEDS = 50, 8, (0, 1, 2)
LEARNING_RATE = 0.01
# The kernels' CPU bodies are slow: how much narrower each network is than in the reports, and the
# side of its images
NARROWER = {"cnn-a": 4, "tiny-d": 4, "mao-batchnorm": 8, "vgg16": 8}
SIDE = {"cnn-a": 16, "tiny-d": 16, "mao-batchnorm": 32, "vgg16": 32}


def narrow(name):
    """The network with fewer filters and units, but of the same layers."""
    network, factor = NETWORKS[name], NARROWER[name]

    def thin(layer):
        if isinstance(layer, Conv):
            return replace(layer, filters=layer.filters // factor)
        if isinstance(layer, Linear):
            return replace(layer, units=layer.units // factor)
        return layer

    return replace(network, layers=tuple(map(thin, network.layers)))


def digits(number, side):
    """Images (BATCH, 3, side, side) in bf16 and labels of one batch, different for each number."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    chosen = torch.arange(number * BATCH, (number + 1) * BATCH) % len(labels)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[chosen] / 8 - 1
    images = F.interpolate(images, size=side, mode="bilinear").expand(-1, 3, -1, -1)
    images = images.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return images, torch.tensor(labels)[chosen]


def train(name, seed, dtype=torch.bfloat16, backend="fused"):
    """The losses of STEPS steps of SGD with momentum."""
    model = build(narrow(name), SIDE[name], 10, backend)
    initialise(model, "he", torch.Generator().manual_seed(seed))
    network, halves = half_network(model, dtype if dtype != torch.float32 else None)
    momenta = {p: torch.zeros_like(p) for p in model.parameters()}
    losses = []
    for step in range(STEPS):
        images, labels = digits(seed * STEPS + step, SIDE[name])
        torch.manual_seed(step)  # dropout
        loss = F.cross_entropy(network(images.to(dtype)).float(), labels)
        network.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p, momentum in momenta.items():
                momentum.mul_(0.9).add_(halves.get(p, p).grad)
                p.add_(momentum, alpha=-LEARNING_RATE)
        refresh(halves)
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.fixture
def chained(monkeypatch, kernels):
    """Every convolution by the kernels, deferring where it may."""
    monkeypatch.setattr(plans, "plan_for", lambda *a, **k: FUSED)
    monkeypatch.setattr(plans, "may_defer", lambda x: x.dtype == torch.bfloat16)
    with as_ops(kernels) as calls:
        yield calls


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("name", NARROWER)
def test_losses_of_50_steps_leave_fp32s_by_what_rounding_to_bf16_does(name, library, chained):
    """The mean distance from the curve in fp32, over three seeds: at most twice that of torch's
    convolutions in bf16, plus 0.01."""
    ours = theirs = 0.0
    for seed in SEEDS:
        found, plain = (train(name, seed, backend=backend) for backend in ("fused", "torch"))
        truth = train(name, seed, torch.float32, "torch")
        ours += float((found - truth).abs().mean()) / len(SEEDS)
        theirs += float((plain - truth).abs().mean()) / len(SEEDS)
        assert found[-10:].mean() < found[:10].mean()  # it learns
    assert chained["conv_data_gradient"] > 0
    assert ours <= 2 * theirs + 0.01, (ours, theirs)
