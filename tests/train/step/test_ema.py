"""The averaged model against the recurrence written out."""

import torch
from torch import nn

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.config import OptimConfig
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.optim.ema import Ema, move_of
from fastcnn.train.step import TrainStep


def test_statistics_follow_the_recurrence():
    model = nn.BatchNorm1d(3)
    ema = Ema(model)
    mean = model.running_mean.clone()
    for step in range(300):
        model.running_mean.normal_()
        ema.update_statistics(torch.tensor(move_of(0.9, step)))
        decay = min(0.9, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * model.running_mean
    torch.testing.assert_close(ema.model.running_mean, mean)
    assert not ema.model.training
    assert not ema.model.weight.requires_grad


def test_a_step_moves_every_average_towards_its_weight():
    model = build(NETWORKS["murgolo-improved"], 32, 10, "torch")
    config = OptimConfig(ema=0.9, optimizer="sgd", lr=0.05, schedule="constant")
    step = TrainStep(model, config, Precision(), 4, 0, torch.device("cpu"), backend="torch")
    wanted = {n: t.clone() for n, t in model.state_dict().items() if t.is_floating_point()}
    for number in range(5):
        step(torch.randn(8, 3, 32, 32), torch.arange(8))
        for name, shadow in wanted.items():
            shadow += move_of(0.9, number) * (model.state_dict()[name] - shadow)
    found = step.ema.model.state_dict()
    for name, shadow in wanted.items():
        torch.testing.assert_close(found[name], shadow, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found["conv1.conv.weight"], model.state_dict()["conv1.conv.weight"])
