"""Updates against formulas written out by hand, in fp64."""

import pytest
import torch
from torch import nn

from fastcnn.archs import NETWORKS
from fastcnn.archs.spec import build
from fastcnn.config import OptimConfig
from fastcnn.train.optimizer import build_optimizer, parameter_groups, set_learning_rate


class OneWeight(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([values], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def updated(gradients, **options):
    """The weight after a step for each gradient, starting from (1, -2)."""
    model = OneWeight([1.0, -2.0])
    optimizer = build_optimizer(model, OptimConfig(**options))
    for gradient in gradients:
        model.weight.grad = torch.tensor([gradient], dtype=torch.float64)
        model.bias.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    return model.weight.detach()[0], model.bias.detach()


GRADIENTS = [[0.5, 0.25], [-1.0, 0.125], [0.0, 2.0]]


def test_sgd_with_l2_and_nesterov_momentum():
    w, velocity = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2).double()
    for gradient in GRADIENTS:
        g = torch.tensor(gradient, dtype=torch.float64) + 0.1 * w
        velocity = 0.9 * velocity + g
        w = w - 0.01 * (g + 0.9 * velocity)
    options = {"optimizer": "sgd", "lr": 0.01, "weight_decay": 0.1}
    torch.testing.assert_close(updated(GRADIENTS, **options)[0], w)


def test_decoupled_sgd_shrinks_weights_outside_the_gradient():
    w, velocity = torch.tensor([1.0, -2.0], dtype=torch.float64), torch.zeros(2).double()
    for gradient in GRADIENTS:
        w = w * (1 - 0.01 * 0.1)
        velocity = 0.9 * velocity + torch.tensor(gradient, dtype=torch.float64)
        w = w - 0.01 * velocity
    options = {"lr": 0.01, "weight_decay": 0.1, "decay": "decoupled", "nesterov": False}
    torch.testing.assert_close(updated(GRADIENTS, optimizer="sgd", **options)[0], w)


@pytest.mark.parametrize(("decay", "decoupled"), [("l2", False), ("decoupled", True)])
def test_adam_with_either_decay(decay, decoupled):
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    first, second = torch.zeros(2).double(), torch.zeros(2).double()
    for t, gradient in enumerate(GRADIENTS, 1):
        g = torch.tensor(gradient, dtype=torch.float64)
        if decoupled:
            w = w * (1 - 0.01 * 0.1)
        else:
            g = g + 0.1 * w
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
        w = w - 0.01 * (first / (1 - 0.9**t)) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
    options = {"optimizer": "adam", "lr": 0.01, "weight_decay": 0.1, "decay": decay}
    torch.testing.assert_close(updated(GRADIENTS, **options)[0], w)


def test_adamw_is_adam_with_decoupled_decay():
    options = {"lr": 0.01, "weight_decay": 0.1}
    adamw = updated(GRADIENTS, optimizer="adamw", **options)[0]
    adam = updated(GRADIENTS, optimizer="adam", decay="decoupled", **options)[0]
    assert torch.equal(adamw, adam)


def test_norms_and_biases_are_exempt_by_option():
    options = {"optimizer": "sgd", "lr": 0.1, "weight_decay": 0.5, "momentum": 0.0}
    _, exempt = updated([[0.0, 0.0]], **options)
    _, decayed = updated([[0.0, 0.0]], exempt_norm_bias=False, **options)
    assert exempt.tolist() == [1.0, -2.0]
    assert decayed.tolist() == pytest.approx([0.95, -1.9])


def test_every_parameter_is_in_one_group():
    model = build(NETWORKS["tiny-f"], 64, 10)
    groups = parameter_groups(model, OptimConfig())
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_frozen_parameters_are_in_no_group():
    model = build(NETWORKS["tiny-f"], 64, 10)
    model.conv1.conv.requires_grad_(False)
    model.conv3.requires_grad_(False)
    groups = parameter_groups(model, OptimConfig())
    grouped = [id(p) for group in groups for p in group["params"]]
    trained = [id(p) for p in model.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(trained)
    assert len(trained) == len(list(model.parameters())) - 6


def test_a_layers_own_l2_counts_twice_lambda():
    model = build(NETWORKS["tiny-f"], 64, 10)
    decays = {
        id(p): group["weight_decay"]
        for group in parameter_groups(model, OptimConfig(weight_decay=0.25))
        for p in group["params"]
    }
    by_name = {name: decays[id(p)] for name, p in model.named_parameters()}
    own = [name for name, decay in by_name.items() if decay == pytest.approx(2 * 5e-3)]
    assert own == ["conv3.conv.weight", "conv6.conv.weight", "conv9.conv.weight"]
    assert by_name["conv1.conv.weight"] == 0.25
    assert by_name["conv3.norm.weight"] == 0.0


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_updates_are_fused(optimizer):
    built = build_optimizer(OneWeight([1.0]), OptimConfig(optimizer=optimizer))
    assert all(group["fused"] for group in built.param_groups)


def test_set_learning_rate_reaches_every_group():
    built = build_optimizer(OneWeight([1.0]), OptimConfig())
    set_learning_rate(built, 0.125)
    assert [group["lr"] for group in built.param_groups] == [0.125, 0.125]


def test_a_step_that_the_scaler_skips_leaves_decoupled_weights_alone():
    model = OneWeight([1.0, -2.0]).float()
    options = OptimConfig(lr=0.1, weight_decay=0.5, decay="decoupled")
    optimizer = build_optimizer(model, options)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    loss = (model.weight * torch.tensor([[float("inf"), 1.0]])).sum() + model.bias.sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert model.weight.tolist() == [[1.0, -2.0]]
    assert scaler.get_scale() == 2.0
