"""The learning rate against torch's own schedulers and against its formulas."""

import math

import pytest
import torch

from fastcnn.config import OptimConfig
from fastcnn.train.optim.schedule import ONE_CYCLE_RISE, ONE_CYCLE_START, learning_rate

STEPS = 7


def rates(**options):
    config = OptimConfig(**{"epochs": 10, "lr": 0.5, **options})
    return [learning_rate(step, STEPS, config) for step in range(config.epochs * STEPS)]


def torch_rates(make, epochs=10, lr=0.5, every=STEPS):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = make(optimizer)
    found = []
    for step in range(epochs * STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if (step + 1) % every == 0:
            scheduler.step()
    return found


def test_constant():
    assert set(rates(schedule="constant")) == {0.5}


def test_step_is_torchs():
    oracle = torch_rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.2))
    assert rates(schedule="step", step_epochs=3, gamma=0.2) == pytest.approx(oracle)


def test_milestones_are_torchs():
    oracle = torch_rates(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 7], 0.1))
    assert rates(schedule="milestones", milestones=[2, 7]) == pytest.approx(oracle)


def test_cosine_is_torchs():
    oracle = torch_rates(
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10 * STEPS, eta_min=0.05), every=1
    )
    assert rates(schedule="cosine", final_lr=0.1) == pytest.approx(oracle)


def test_inverse_time():
    found = rates(schedule="inverse-time", time_decay=0.25)
    assert found == pytest.approx([0.5 / (1 + 0.25 * step) for step in range(10 * STEPS)])


def test_warmup_rises_to_the_peak_before_the_schedule():
    found = rates(schedule="cosine", warmup_epochs=2)
    assert found[: 2 * STEPS] == pytest.approx([0.5 * (i + 1) / 14 for i in range(14)])
    assert found[2 * STEPS] == pytest.approx(0.5)
    assert found == sorted(found[:14]) + sorted(found[14:], reverse=True)


def test_one_cycle_rises_then_falls_to_its_end():
    found = rates(schedule="one-cycle", final_lr=0.01)
    rise = round(ONE_CYCLE_RISE * len(found))
    assert found[0] == pytest.approx(0.5 * (ONE_CYCLE_START + (1 - ONE_CYCLE_START) / rise))
    assert max(found) == found[rise - 1] == pytest.approx(0.5)
    assert found[-1] == pytest.approx(0.005)
    middle = (rise - 1 + len(found) - 1) / 2
    nearest = found[math.floor(middle)], found[math.ceil(middle)]
    assert sum(nearest) / 2 == pytest.approx(0.5 * (1 + 0.01) / 2, rel=1e-3)


def test_one_cycle_takes_its_rise_from_warmup_epochs():
    found = rates(schedule="one-cycle", warmup_epochs=4)
    assert found.index(max(found)) == 4 * STEPS - 1


def test_a_rise_of_less_than_a_step_is_a_step():
    found = rates(schedule="one-cycle", warmup_epochs=0.01)
    assert found[0] == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["one-cycle", "cosine", "step", "inverse-time"])
def test_a_single_step_has_a_rate(schedule):
    rate = learning_rate(0, 1, OptimConfig(epochs=1, schedule=schedule))
    assert rate > 0
