"""Precise batch norm: statistics of the weights as they are, taken from training images."""

import copy
from types import SimpleNamespace

import pytest
import torch
from small_runs import final_state, start
from torch import nn
from torch.optim.swa_utils import update_bn

from fastcnn.archs.layers import ConvNormAct, LinearNormAct
from fastcnn.archs.spec import Conv, Linear, Pool
from fastcnn.config import options_by_name
from fastcnn.recipes import resolve
from fastcnn.train import loop
from fastcnn.train.numerics.precise_bn import (
    FEW_STEPS,
    IMAGES,
    PreciseBatchNorm,
    batches_of,
    wanted,
)
from fastcnn.train.setup import prepare


def ours():
    torch.manual_seed(1)
    model = nn.Sequential(
        ConvNormAct(3, Conv(6, 3, norm=True, post_slope=0.0, pool=Pool())),
        nn.Flatten(),
        LinearNormAct(6 * 4 * 4, Linear(5, norm=True, post_slope=0.0, dropout=0.5)),
        LinearNormAct(5, Linear(4)),
    )
    return model.to(memory_format=torch.channels_last)


def torchs(model):
    """The same network of torch.nn, without its dropout."""
    conv, _, hidden, last = copy.deepcopy(model)
    body = [conv.conv, conv.norm, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, hidden.linear, hidden.norm, nn.ReLU(), last.linear)


def running(model):
    return [b.clone() for name, b in model.named_buffers() if "running" in name]


def batches(count):
    torch.manual_seed(2)
    images = torch.randn(count, 32, 3, 8, 8) * torch.arange(1, count + 1).view(-1, 1, 1, 1, 1)
    return [(x.contiguous(memory_format=torch.channels_last), None) for x in images]


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.mark.parametrize(("dtype", "close"), [(None, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("count", [1, 3])
def test_the_statistics_are_those_that_torch_finds(count, dtype, close):
    model = ours()
    plain = torchs(model)
    precise = PreciseBatchNorm(model, dtype)
    with torch.no_grad():
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            other.copy_(one.mul_(0.9))  # the weights of the call count
    precise(batches(count))
    update_bn([images for images, _ in batches(count)], plain)
    torch.testing.assert_close(running(model), running(plain), rtol=close, atol=close)


def test_nothing_else_changes():
    model = ours().train()
    weights = [p.clone() for p in model.parameters()]
    taken, generator = batches(2), torch.get_rng_state()
    PreciseBatchNorm(model)(taken)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(module.training for module in model.modules())
    assert {model[0].norm.momentum, model[2].norm.momentum} == {0.1}
    assert model[2].dropout == 0.5
    assert all(map(torch.equal, weights, model.parameters()))


def test_an_interruption_leaves_the_statistics_as_they_were():
    model, looks = ours(), iter([None, KeyboardInterrupt])
    before = running(model)

    def look():
        if error := next(looks):
            raise error

    with pytest.raises(KeyboardInterrupt):
        PreciseBatchNorm(model)(batches(3), look)
    assert all(map(torch.equal, before, running(model)))


@pytest.mark.parametrize(
    ("images", "batch_size", "world", "count"),
    [
        (50_000, 128, 1, IMAGES // 128),
        (50_000, 500, 1, 5),
        (50_000, 128, 4, IMAGES // 512),
        (1_438, 128, 1, 11),  # the twelfth has 30 images
        (100, 128, 1, 1),
        (100, 128, 2, 1),
        (50_000, 4_096, 1, 1),
    ],
)
def test_whole_batches_of_some_images(images, batch_size, world, count):
    sizes = SimpleNamespace(taken=images, step_images=batch_size * world)
    assert batches_of(sizes) == count


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({"arch": "mao-batchnorm"}, True),
        ({"arch": "mao-batchnorm", "precise_bn": "off"}, False),
        ({"arch": "mao-batchnorm", "recipe": "report"}, False),
        ({"arch": "mao-batchnorm", "recipe": "report", "precise_bn": "on"}, True),
        ({"arch": "cnn-a", "precise_bn": "on"}, False),  # has no batch norm
    ],
    ids=str,
)
def test_when_statistics_are_taken_anew(options, taken):
    setup = prepare(resolve({"data": "digits", "train_subset": 64} | options))
    assert (loop.new_precise_bn(setup, loop.new_step(setup)) is not None) is taken


@pytest.mark.parametrize(
    ("mode", "steps", "taken"),
    [
        ("auto", FEW_STEPS - 1, True),
        ("auto", FEW_STEPS, False),
        ("on", FEW_STEPS, True),
        ("off", 1, False),
    ],
)
def test_by_the_steps_of_an_epoch(mode, steps, taken):
    assert wanted(mode, steps) is taken


def test_the_help_names_its_figures():
    told = options_by_name()["precise_bn"].help
    assert f"{IMAGES:,} training images" in told
    assert f"fewer than {FEW_STEPS} steps" in told


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_evaluated_model_has_them_and_training_goes_on_the_same(tmp_path, ema):
    options = {"arch": "mao-batchnorm", "ema": ema, "train_subset": 200, "lr": 0.01}
    runs = [start(tmp_path, mode, **options, precise_bn=mode) for mode in ("on", "off")]
    precise, plain = (final_state(run.folder.path)["history"] for run in runs)
    assert [row["train_loss"] for row in precise] == [row["train_loss"] for row in plain]
    for one, other in zip(precise, plain, strict=True):
        assert one["val_loss"] < 1 < 2 < other["val_loss"]
