"""Steps whose gradients are not finite: what they leave behind, who is told, and where it was."""

import os
import re
import subprocess
import sys

import pytest
import torch
from graph_twin import CpuTwin
from small_runs import SMALL, assert_same, final_state, resume, start, stop_at_check
from torch import nn

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.config import OptimConfig
from fastcnn.errors import NumbersError
from fastcnn.train import loop, setup
from fastcnn.train.numerics import guard, scaling
from fastcnn.train.numerics.diagnose import first_not_finite
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.numerics.statistics import in_one, statistics
from fastcnn.train.step import TrainStep

CPU = torch.device("cpu")
NAN, INF = float("nan"), float("inf")


def new_step(name="murgolo-improved", number_format=None, recorder=None, **options):
    network = NETWORKS[name]
    model = build(network, 32, 10, options.pop("backend", "torch"))
    initialise(model, "he", torch.Generator().manual_seed(0))
    config = OptimConfig(label_smoothing=0.0, schedule="constant", **options)
    return TrainStep(
        model.train(), config, Precision(number_format), 100, 0, CPU, recorder=recorder,
        backend="auto" if number_format is None else "torch",
    )  # fmt: skip


def batch(seed, scale=1.0):
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return (images * scale).contiguous(memory_format=torch.channels_last), torch.arange(8) % 10


def state_of(step):
    state = step.state_dict()
    kept = {name: state[name] for name in ("model", "optimizer", "sums")}
    return {name: value.clone() for name, value in flat(kept).items()}


def flat(values, prefix=""):
    found = {}
    for name, value in values.items():
        found |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return found


@pytest.mark.parametrize("number_format", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [{}, {"optimizer": "adam", "lr": 1e-3}, {"clip_grad": 1.0}, {"backend": "fused"}],
    ids=str,
)
def test_the_first_step_that_is_not_finite_and_all_after_it_leave_nothing(
    number_format, options, library
):
    step = new_step(number_format=number_format, **options)
    for seed in (1, 2):
        step(*batch(seed))
    before = state_of(step)
    assert not step.guard.ended()
    step(*batch(3, NAN))
    assert step.guard.ended()
    step(*batch(4))
    assert_same(state_of(step), before)
    assert all(tensor.isfinite().all() for tensor in before.values())


def test_figures_of_the_good_steps_are_kept():
    step = new_step()
    step(*batch(1))
    loss = step.metrics.read().loss
    step(*batch(2, NAN))
    found = step.metrics.read()
    assert (found.images, found.loss) == (8, loss)


def test_an_overflow_in_fp16_is_skipped_and_the_next_step_counts():
    step, twin = (new_step(number_format=torch.float16, optimizer="adam", lr=1e-3) for _ in "12")
    for one in (step, twin):
        one.scale.scale.fill_(256)
        torch.manual_seed(1)
        one(*batch(1))
    before = state_of(step)
    scale = step.scale.scale.item()
    step(*batch(2, NAN))
    assert step.scale.scale.item() == scale / 2
    assert (step.guard.skipped(), step.guard.ended()) == (1, False)
    assert_same(state_of(step), before)
    # the clock went on, the scale is another: a power of two, of which the update sees nothing
    twin.step, twin.scale.scale = step.step, step.scale.scale.clone()
    for one in (step, twin):
        torch.manual_seed(3)  # of dropout
        one(*batch(3))
    assert_same(state_of(step), state_of(twin))
    assert step.guard.skipped() == 1
    step.guard.reset()
    assert step.guard.skipped() == 0


def test_figures_of_a_skipped_step_whose_loss_is_finite_count():
    step = new_step("cnn-a", torch.float16)
    step.scale.scale.fill_(1e30)
    step(*batch(1))
    assert (step.guard.skipped(), step.metrics.read().images) == (1, 8)


def test_overflows_in_a_row_end_the_training_and_single_ones_do_not(monkeypatch):
    monkeypatch.setattr(guard, "LIMIT", 3)
    step = new_step("cnn-a", torch.float16)
    for good in (False, False, True, False, False):
        step(*batch(1, 1.0 if good else NAN))
    assert (step.guard.skipped(), step.guard.ended()) == (4, False)
    step(*batch(1, NAN))
    assert step.guard.ended()
    before = state_of(step)
    step(*batch(2))
    assert_same(state_of(step), before)


def test_counts_go_on_from_a_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(guard, "LIMIT", 3)
    step, other = (new_step("cnn-a", torch.float16) for _ in "12")
    for _ in range(2):
        step(*batch(1, NAN))
    other.load_state_dict(step.state_dict(), tmp_path)
    other(*batch(1, NAN))
    assert (other.guard.skipped(), other.guard.ended()) == (3, True)


@pytest.mark.full
@pytest.mark.parametrize("number_format", [None, torch.float16], ids=["fp32", "fp16"])
def test_the_guard_lies_inside_the_graph(number_format):
    """The twin refuses whatever waits for the device; replays run no Python of the step."""
    plain = new_step(number_format=number_format)
    replayed = new_step(number_format=number_format, recorder=CpuTwin())
    for one in (plain, replayed):
        torch.manual_seed(0)
        for seed in range(6):
            one(*batch(seed))
    assert replayed.replay.captured == 1
    for one in (plain, replayed):
        one(*batch(6, NAN))
        torch.manual_seed(1)
        one(*batch(7))
    assert plain.guard.ended() == replayed.guard.ended() == (number_format is None)


def test_statistics_lie_in_one_tensor_and_stay_what_they_were():
    model = build(NETWORKS["vgg11"], 32, 10)
    for number, tensor in enumerate(statistics(model)):
        tensor.fill_(number)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole = in_one(model)
    assert_same(dict(model.state_dict()), before)
    assert all(tensor.data_ptr() % 64 == whole.data_ptr() % 64 for tensor in statistics(model))
    whole.fill_(7)
    assert all((tensor == 7).all() for tensor in statistics(model))
    assert in_one(build(NETWORKS["cnn-a"], 32, 10)) is None


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * INF


class Batches:
    """A loader of one batch over and over."""

    step_images = 8

    def load_state_dict(self, state):
        self.asked = state

    def __iter__(self):
        yield batch(1)


def test_the_layer_is_named():
    step, loader = new_step("cnn-a"), Batches()
    step._prepare()
    assert first_not_finite(step, loader, 2, 3) == "the loss or a gradient"
    assert loader.asked == {"epoch": 2, "position": 24}
    with torch.no_grad():
        step.model.conv2.conv.bias[0] = NAN
    assert first_not_finite(step, loader, 0, 0) == "the output of conv2"


def test_the_gradient_or_the_loss_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 10)

        def forward(self, x):
            return self.last(Breaks.apply(self.first(x.mean((2, 3)))))

    config = OptimConfig(label_smoothing=0.0, schedule="constant")
    step = TrainStep(Net(), config, Precision(), 100, 0, CPU)
    step._prepare()
    assert first_not_finite(step, Batches(), 0, 0) == "the gradient of first.bias"
    # the right class is 1e38 · 1e38 behind, and every value finite
    with torch.no_grad():
        step.model.last.bias.copy_(torch.tensor([-3e38] * 9 + [3e38]))
    assert first_not_finite(step, Batches(), 0, 0) == "the loss"


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_a_gradient_that_is_one_number_for_all_is_looked_at(backend, library):
    """Of a sum: expanded by autograd, without memory of its own."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.shift = nn.Linear(3, 10), nn.Parameter(torch.zeros(4, 5))

        def forward(self, x):
            return self.last(x.mean((2, 3))) + self.shift.sum()

    config = OptimConfig(label_smoothing=0.0, schedule="constant")
    step = TrainStep(Net(), config, Precision(), 100, 0, CPU, backend=backend)
    step(*batch(1))
    assert not step.guard.ended()
    step(*batch(1, INF))
    assert step.guard.ended()


def command(tmp_path, *options):
    words = [sys.executable, "-m", "fastcnn", "train", "--data", "digits", "--arch", "tiny-f"]
    words += ["--train-subset", "96", "--test-subset", "20", "--batch-size", "24", "--threads", "1"]
    words += ["--output", str(tmp_path), "--name", "run", *options]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=dict(os.environ))
    return done.returncode, done.stderr.splitlines()


@pytest.mark.full
def test_a_run_that_diverges_names_step_and_place_and_keeps_its_checkpoint(tmp_path):
    options = ["--recipe", "report", "--optimizer", "sgd", "--lr", "1e18", "--schedule", "constant"]
    code, lines = command(tmp_path, *options, "--checkpoint-steps", "1", "--image-size", "64")
    assert code == 6
    pattern = (
        r"fastcnn: step (\d+) \(epoch 1\): the ((output|gradient) of \S+|loss) is not finite: "
        r"lower --lr or use --clip-grad 1; the last good checkpoint is .*last\.pt"
    )
    found = re.fullmatch(pattern, lines[-1])
    assert found, lines[-1]
    state = final_state(tmp_path / "run")
    assert state["step"] == int(found[1]) - 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def fp16(monkeypatch):
    """Computed in by emulation, with a scale at which nothing overflows by itself."""
    monkeypatch.setattr(scaling, "INITIAL", 256.0)
    chosen = Precision(torch.float16)
    monkeypatch.setattr(setup, "choose_precision", lambda *arguments: chosen)


def overflowing(monkeypatch, steps):
    """Let the loss of these steps overflow (counted from 0, over the run)."""
    original = loop.TrainStep._work

    def work(self, images, labels):
        original(self, images * INF if self.step in steps else images, labels)

    monkeypatch.setattr(loop.TrainStep, "_work", work)


@pytest.mark.full
def test_skipped_steps_are_counted_in_the_log_also_of_a_resumed_run(tmp_path, monkeypatch, capsys):
    fp16(monkeypatch)
    overflowing(monkeypatch, {0, 1, 4})
    whole = start(tmp_path, "whole", amp=True, amp_dtype="fp16")
    rows = (whole.folder.path / "metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("skipped_steps")
    assert [row.split(",")[column] for row in rows[1:]] == ["2", "1"]
    with monkeypatch.context() as patch:
        stop_at_check(patch, 2)
        with pytest.raises(Exception, match="SIGTERM"):
            start(tmp_path, "run", amp=True, amp_dtype="fp16")
    resume(tmp_path / "run")
    assert_same(final_state(tmp_path / "run"), final_state(whole.folder.path))


def test_a_collapsing_scale_ends_the_run_with_a_reason(tmp_path, monkeypatch):
    fp16(monkeypatch)
    monkeypatch.setattr(guard, "LIMIT", 2)
    monkeypatch.setattr(loop, "LIMIT", 2)
    overflowing(monkeypatch, {3, 4, 5})
    with pytest.raises(NumbersError) as error:
        start(tmp_path, amp=True, amp_dtype="fp16")
    assert SMALL["train_subset"] // SMALL["batch_size"] + 1 == 3  # steps an epoch
    assert re.fullmatch(
        r"epoch 2: the loss or a gradient is not finite in fp16; 2 steps in a row were skipped and "
        r"the loss scale fell to 64: lower --lr or use --clip-grad 1, or --amp-dtype bf16; the "
        r"last good checkpoint is \S+last\.pt",
        str(error.value),
    ), str(error.value)
    assert final_state(tmp_path / "run")["step"] == 3
