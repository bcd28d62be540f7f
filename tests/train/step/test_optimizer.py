"""Updates against formulas written out by hand, in fp64."""

import pytest
import torch
from torch import nn

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.config import OptimConfig
from fastcnn.train.optim.optimizer import Optimizer, grouped


class OneWeight(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([values], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(values, dtype=torch.float64))


@pytest.fixture(params=["torch", "fused"])
def updated(request, library):
    def run(gradients, **options):
        """The weight and the bias after a step for each gradient, starting from (1, -2)."""
        model = OneWeight([1.0, -2.0])
        optimizer = Optimizer(model, OptimConfig(**options), backend=request.param)
        by_name = {"weight": [[g] for g in gradients], "bias": gradients}
        names = {id(p): name for name, p in model.named_parameters()}
        for step in range(len(gradients)):
            wanted = [by_name[names[id(leaf)]][step] for leaf in optimizer.leaves]
            rates = torch.tensor([options["lr"], 0.0], dtype=torch.float64)
            optimizer.step([torch.tensor(g, dtype=torch.float64) for g in wanted], rates.float())
        return model.weight.detach()[0], model.bias.detach()

    return run


# exact in fp32, which the rate is in
RATE = 2.0**-7

GRADIENTS = [[0.5, 0.25], [-1.0, 0.125], [0.0, 2.0]]


def test_sgd_with_l2_and_nesterov_momentum(updated):
    w, velocity = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2).double()
    for gradient in GRADIENTS:
        g = torch.tensor(gradient, dtype=torch.float64) + 0.1 * w
        velocity = 0.9 * velocity + g
        w = w - RATE * (g + 0.9 * velocity)
    options = {"optimizer": "sgd", "lr": RATE, "weight_decay": 0.1}
    torch.testing.assert_close(updated(GRADIENTS, **options)[0], w)


def test_decoupled_sgd_shrinks_weights_outside_the_gradient(updated):
    w, velocity = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2).double()
    for gradient in GRADIENTS:
        w = w * (1 - RATE * 0.1)
        velocity = 0.9 * velocity + torch.tensor(gradient, dtype=torch.float64)
        w = w - RATE * velocity
    options = {"lr": RATE, "weight_decay": 0.1, "decay": "decoupled", "nesterov": False}
    torch.testing.assert_close(updated(GRADIENTS, optimizer="sgd", **options)[0], w)


@pytest.mark.parametrize(("decay", "decoupled"), [("l2", False), ("decoupled", True)])
def test_adam_with_either_decay(updated, decay, decoupled):
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    first, second = torch.zeros(2).double(), torch.zeros(2).double()
    for t, gradient in enumerate(GRADIENTS, 1):
        g = torch.tensor(gradient, dtype=torch.float64)
        if decoupled:
            w = w * (1 - RATE * 0.1)
        else:
            g = g + 0.1 * w
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        w = w - RATE * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    options = {"optimizer": "adam", "lr": RATE, "weight_decay": 0.1, "decay": decay}
    torch.testing.assert_close(updated(GRADIENTS, **options)[0], w)


def test_adamw_is_adam_with_decoupled_decay(updated):
    options = {"lr": RATE, "weight_decay": 0.1}
    adamw = updated(GRADIENTS, optimizer="adamw", **options)[0]
    adam = updated(GRADIENTS, optimizer="adam", decay="decoupled", **options)[0]
    assert torch.equal(adamw, adam)


def test_norms_and_biases_are_exempt_by_option(updated):
    options = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.5, "momentum": 0.0}
    _, exempt = updated([[0.0, 0.0]], **options)
    _, decayed = updated([[0.0, 0.0]], exempt_norm_bias=False, **options)
    assert exempt.tolist() == [1.0, -2.0]
    assert decayed.tolist() == pytest.approx([0.95, -1.9])


def test_every_parameter_is_in_one_group():
    model = build(NETWORKS["tiny-f"], 64, 10)
    found = [id(p) for params, _ in grouped(model, OptimConfig(), {}) for p in params]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


def test_frozen_parameters_are_in_no_group():
    model = build(NETWORKS["tiny-f"], 64, 10)
    model.conv1.conv.requires_grad_(False)
    model.conv3.requires_grad_(False)
    found = [id(p) for params, _ in grouped(model, OptimConfig(), {}) for p in params]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(found) == sorted(trained)
    assert len(trained) == len(list(model.parameters())) - 6


def test_a_layers_own_l2_counts_twice_lambda():
    model = build(NETWORKS["tiny-f"], 64, 10)
    groups = grouped(model, OptimConfig(weight_decay=0.25), {})
    decays = {id(p): decay for params, decay in groups for p in params}
    by_name = {name: decays[id(p)] for name, p in model.named_parameters()}
    own = [name for name, decay in by_name.items() if decay == pytest.approx(2 * 5e-3)]
    assert own == ["conv3.conv.weight", "conv6.conv.weight", "conv9.conv.weight"]
    assert by_name["conv1.conv.weight"] == 0.25
    assert by_name["conv3.norm.weight"] == 0.0


def test_a_skipped_step_leaves_weights_and_moments_alone():
    for options in ({"decay": "decoupled"}, {"optimizer": "adam"}):
        model = OneWeight([1.0, -2.0]).float()
        config = OptimConfig(lr=0.1, weight_decay=0.5, **options)
        optimizer = Optimizer(model, config, backend="torch")
        gradients = [torch.full_like(leaf, torch.inf) for leaf in optimizer.leaves]
        optimizer.step(gradients, torch.tensor([0.1, 0.0]), None, torch.tensor(1.0))
        assert model.weight.tolist() == [[1.0, -2.0]]
        state = optimizer.state_dict()
        assert not any(t.any() for kind in state["state"].values() for t in kind.values())
        assert state["steps"] == 0


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_state_goes_by_name_and_keeps_the_hyperparameters(name):
    first, second = (OneWeight([1.0, -2.0]) for _ in range(2))
    one = Optimizer(first, OptimConfig(optimizer=name), backend="torch")
    other = Optimizer(second, OptimConfig(optimizer=name, weight_decay=0.25), backend="torch")
    gradients = [torch.ones_like(leaf) for leaf in one.leaves]
    one.step(gradients, torch.tensor([0.1, 0.0]))
    other.load_state_dict(one.state_dict())
    for kind, tensors in one.state_dict()["state"].items():
        for key, tensor in tensors.items():
            assert torch.equal(other.state_dict()["state"][kind][key], tensor)
    assert other.state_dict()["steps"] == one.state_dict()["steps"]
    assert max(group.decay for group in other.groups) == 0.25


def test_a_state_of_another_optimiser_is_refused():
    adam, sgd = (
        Optimizer(OneWeight([1.0]), OptimConfig(optimizer=name), backend="torch")
        for name in ("adam", "sgd")
    )
    with pytest.raises(ValueError, match="another network or optimiser"):
        sgd.load_state_dict(adam.state_dict())


def test_a_gradient_in_another_layout_is_brought_into_the_weights(monkeypatch):
    weight = nn.Parameter(torch.zeros(2, 3, 2, 2).contiguous(memory_format=torch.channels_last))
    model = nn.ParameterList([weight])
    optimizer = Optimizer(model, OptimConfig(momentum=0.0, weight_decay=0.0), backend="torch")
    gradient = torch.arange(24.0).view(2, 3, 2, 2)
    optimizer.step([gradient], torch.tensor([1.0, 0.0]))
    assert torch.equal(weight.detach(), -gradient)
    assert weight.is_contiguous(memory_format=torch.channels_last)
