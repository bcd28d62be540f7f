"""Training through the convolution's kernels, compiled for the CPU, against torch's.

`PYTHONPATH=tests python tests/ops/conv/test_conv_training.py` trains longer and prints accuracies
on held-out digits.
"""

import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from simt import harness
from simt.conv_ops import as_ops
from sklearn import datasets
from torch.nn import functional as F

from fastcnn import ops
from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.fold import fold
from fastcnn.archs.init import initialise
from fastcnn.archs.spec import Conv, Linear
from fastcnn.ops import conv_autotune
from fastcnn.ops.conv_autotune import FUSED
from fastcnn.train.numerics.half import half_network, refresh

STEPS, BATCH, SEED = 30, 8, 0
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


def digits(chosen, side):
    """Images (n, 3, side, side) in bf16 and labels of the chosen digits, counted round."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    chosen = chosen % len(labels)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8)[chosen] / 8 - 1
    images = F.interpolate(images, size=side, mode="bilinear").expand(-1, 3, -1, -1)
    images = images.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return images, torch.tensor(labels)[chosen]


def batch(number, size=BATCH):
    return torch.arange(number * size, (number + 1) * size)


class Trainee:
    """A network that computes in `dtype`, with SGD and momentum on fp32 weights."""

    def __init__(self, name, seed, dtype, backend):
        self.side, self.dtype = SIDE[name], dtype
        self.model = build(narrow(name), self.side, 10, backend)
        initialise(self.model, "he", torch.Generator().manual_seed(seed))
        half = None if dtype == torch.float32 else dtype
        self.network, self.halves = half_network(self.model, half)
        self.momenta = {p: torch.zeros_like(p) for p in self.model.parameters()}

    def gradients(self, chosen, number):
        """The loss of the chosen digits, and the gradients of all weights as one vector; number: of
        the step, which dropout draws from."""
        images, labels = digits(chosen, self.side)
        torch.manual_seed(number)
        loss = F.cross_entropy(self.network(images.to(self.dtype)).float(), labels)
        self.network.zero_grad()
        loss.backward()
        found = [self.halves.get(p, p).grad.float() for p in self.momenta]
        return loss.detach(), torch.cat([g.flatten() for g in found])

    def update(self, gradients, rate=LEARNING_RATE):
        sizes = [p.numel() for p in self.momenta]
        parts = zip(self.momenta.items(), gradients.split(sizes), strict=True)
        with torch.no_grad():
            for (p, momentum), gradient in parts:
                momentum.mul_(0.9).add_(gradient.view_as(p))
                p.add_(momentum, alpha=-rate)
        refresh(self.halves)

    def follow(self, other):
        """Take the weights of another."""
        self.model.load_state_dict(other.model.state_dict())
        refresh(self.halves)


def train(name, seed, dtype=torch.bfloat16, backend="fused", followers=()):
    """The losses of STEPS steps; and the losses and gradients of the followers at the same weights,
    as distances from those of the last of them."""
    leader = Trainee(name, seed, dtype, backend)
    losses, distances = [], []
    for number in range(seed * STEPS, (seed + 1) * STEPS):
        loss, gradients = leader.gradients(batch(number), number)
        for follower in followers:
            follower.follow(leader)
        found = [(loss, gradients), *(one.gradients(batch(number), number) for one in followers)]
        true_loss, true = found[-1]
        distances += [[((a - true_loss).abs(), (g - true).norm()) for a, g in found[:-1]]]
        leader.update(gradients)
        losses.append(loss)
    return torch.stack(losses), torch.tensor(distances).mean(0) if followers else None


@contextlib.contextmanager
def through(kernels):
    """Every convolution by the kernels, deferring where it may."""
    plan = mock.patch.object(conv_autotune, "plan_for", return_value=FUSED)
    defer = mock.patch.object(conv_autotune, "may_defer", lambda x: x.dtype == torch.bfloat16)
    with plan, defer, as_ops(kernels) as calls:
        yield calls


@pytest.fixture
def chained(kernels):
    with through(kernels) as calls:
        yield calls


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("name", ["vgg16", "mao-batchnorm"])
def test_the_steps_leave_fp32_by_what_rounding_to_bf16_does(name, library, chained):
    """The mean distances from fp32 are at most those of torch's convolutions in bf16 times a
    factor, plus 0.01: of the loss and of all gradients at the same weights, 1.5; of the loss where
    each trains by itself and the runs drift apart, 2."""
    followers = [Trainee(name, SEED, d, "torch") for d in (torch.bfloat16, torch.float32)]
    found, (ours, theirs) = train(name, SEED, followers=followers)  # each: loss, gradients
    assert found[-10:].mean() < found[:10].mean()  # it learns
    assert chained["conv_data_gradient"] > 0
    assert (ours <= 1.5 * theirs + 0.01).all(), (ours, theirs)
    plain, truth = (train(name, SEED, follower.dtype, "torch")[0] for follower in followers)
    ours, theirs = (found - truth).abs().mean(), (plain - truth).abs().mean()
    assert ours <= 2 * theirs + 0.01, (ours, theirs)


def accuracy(name, seed, backend, size=16, held_out=360):
    """The share of held-out digits that the folded network knows after 3 epochs (vgg16: 2)."""
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(99))
    test, rest = order[:held_out], order[held_out:]
    trainee = Trainee(name, seed, torch.bfloat16, backend)
    generator = torch.Generator().manual_seed(seed)
    epochs = 2 if name == "vgg16" else 3
    chosen = torch.cat([rest[torch.randperm(len(rest), generator=generator)] for _ in range(4)])
    steps = epochs * (len(rest) // size + 1)
    for step in range(steps):
        _, gradients = trainee.gradients(chosen[batch(step, size)], step)
        trainee.update(gradients, 0.02 * min(1, step / 20) * (1 - step / steps))
    images, labels = digits(test, trainee.side)
    with torch.no_grad():
        logits = fold(trainee.model, torch.bfloat16)(images)
    return float((logits.argmax(1) == labels).float().mean())


def tell_accuracies():
    torch.set_num_threads(1)
    ops.load()
    with tempfile.TemporaryDirectory() as folder:
        kernels = harness.load_module(harness.compile_module(Path(folder), ["-O2"]))
    for name in NARROWER:
        for seed in range(3):
            plain = accuracy(name, seed, "torch")
            with through(kernels):
                ours = accuracy(name, seed, "fused")
            sys.stdout.write(f"{name} seed {seed}: torch {plain:.4f}, kernels {ours:.4f}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    tell_accuracies()
