"""The whole step as a graph, by its CPU twin: what a replay does is what an eager step does."""

import logging

import pytest
import torch
from graph_twin import CpuTwin
from image_files import make_images
from loader_cases import EVERYTHING as AUGMENTED
from loader_cases import FUSED, Staged, resident_bytes
from small_runs import assert_same, final_state, resume, start, stop_at_check

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.config import OptimConfig
from fastcnn.errors import UsageError
from fastcnn.train import graph, loop, step
from fastcnn.train.graph import Replay, recorder_for
from fastcnn.train.interrupt import Interrupted
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.step import TrainStep

CPU = torch.device("cpu")
# three steps an epoch, the last one smaller: its kind is captured in the fourth epoch
EPOCHS = 6
EVERYTHING = {"ema": 0.9, "mixup": 0.4, "cutmix": 1.0, "clip_grad": 1.0, "cutout": 6}
OPTIONS = {
    "sgd": {"optimizer": "sgd", "lr": 0.02},
    "adam": {"optimizer": "adam", "lr": 1e-3, "schedule": "inverse-time", "time_decay": 0.1},
    "everything": {"optimizer": "sgd", "lr": 0.02, "test_flip": True, **EVERYTHING},
    "rare augmentations": {"rotation": 10.0, "color_jitter": 0.3, "flip": "alternating"},
    "bf16": {"amp": True, "amp_dtype": "bf16", **EVERYTHING},
    "decoupled": {"decay": "decoupled", "val_fraction": 0.2},
    "torch loader": {"loader": "torch", "workers": 0},
}


@pytest.fixture
def twin(monkeypatch):
    """Lets every run of the test capture graphs by the twin."""
    found = CpuTwin()
    monkeypatch.setattr(step, "recorder_for", lambda device, mode: found)
    return found


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.mark.full
@pytest.mark.parametrize("backend", ["torch", "fused"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_runs_with_and_without_graphs_are_bit_equal(tmp_path, monkeypatch, options, backend):
    common = {"epochs": EPOCHS, "backend": backend, **options}
    eager = start(tmp_path, "eager", **common).folder.path
    found = CpuTwin()
    monkeypatch.setattr(step, "recorder_for", lambda device, mode: found)
    graphed = start(tmp_path, "graphed", **common).folder.path
    assert found.captures >= 3  # two kinds of training steps, and evaluation
    assert_same(final_state(graphed), final_state(eager))


def test_resumed_in_the_middle_a_graphed_run_is_the_unbroken_one(tmp_path, monkeypatch, twin):
    options = {"epochs": EPOCHS, "ema": 0.9, "lr": 0.02, "optimizer": "sgd"}
    whole = start(tmp_path, "whole", **options).folder.path
    with monkeypatch.context() as patch:
        stop_at_check(patch, 26)  # six looks an epoch: in the fifth one, among replays
        with pytest.raises(Interrupted):
            start(tmp_path, "broken", **options)
    resumed = resume(tmp_path / "broken").folder.path
    assert_same(final_state(resumed), final_state(whole))


def test_a_kind_of_step_is_captured_once(tmp_path, monkeypatch, twin):
    seen = []
    original = loop.Training._finish_epoch

    def finish(self, stop):
        seen.append(self.step.replay.captured)
        return original(self, stop)

    monkeypatch.setattr(loop.Training, "_finish_epoch", finish)
    start(tmp_path, "run", epochs=EPOCHS)
    assert seen == [0, 1, 1, 2, 2, 2]


def steps_of(recorder, count=8, **options):
    """Weights after some steps with a falling learning rate."""
    torch.manual_seed(0)
    model = build(NETWORKS["murgolo-base"], 32, 10, "torch")
    config = OptimConfig(schedule="inverse-time", time_decay=0.5, lr=0.05, **options)
    run = TrainStep(model, config, Precision(), 4, 0, CPU, backend="torch", recorder=recorder)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        run(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4))
    return run, [p.detach().clone() for p in model.parameters()]


class StagedInside(Staged):
    """Brings its images where a graph would be made of it: the planted error."""

    def stage(self, count):
        pass

    def batch(self, count):
        super().stage(count)
        return super().batch(count)


def trained_on(kind, recorder, augment, backend, stop=0, epochs=6):
    """Weights and labels' sums after epochs of a loader, each broken off after `stop` steps and
    gone on with."""
    torch.manual_seed(0)
    model = build(NETWORKS["murgolo-base"], 32, 3, "torch")
    loader = kind(make_images(10, 32, 32), augment, backend=backend)
    config = OptimConfig(lr=0.05)
    run = TrainStep(model, config, Precision(), 3, 0, CPU, backend="torch", recorder=recorder)
    for _ in range(epochs):
        for _, _ in zip(range(stop), run.epoch(loader), strict=False):
            pass
        for _ in run.epoch(loader):
            pass
    assert loader.state_dict() == {"epoch": epochs, "position": 0}
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("stop", [0, 2])
@pytest.mark.parametrize("augment", [FUSED, AUGMENTED], ids=["one kernel", "many operations"])
@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_staged_images_reach_a_replayed_step(backend, augment, stop):
    eager = trained_on(Staged, None, augment, backend)
    found = CpuTwin()
    assert same(trained_on(Staged, found, augment, backend, stop), eager)
    assert found.captures == 2


def test_images_staged_inside_a_graph_would_be_frozen():
    # proves the test above: what is staged must be staged outside
    eager = trained_on(StagedInside, None, FUSED, "fused")
    assert same(trained_on(Staged, None, FUSED, "fused"), eager)
    assert not same(trained_on(StagedInside, CpuTwin(), FUSED, "fused"), eager)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_learning_rate_on_the_host_would_be_frozen(monkeypatch):
    # proves the twin: what the capture cannot see must show
    assert same(steps_of(None)[1], steps_of(CpuTwin())[1])
    original = step.Optimizer.step

    def on_the_host(self, gradients, rates, *rest):
        return original(self, gradients, torch.tensor([hosts_rate(), 0.0]), *rest)

    counter = iter(range(100))

    def hosts_rate():
        return 0.05 / (1 + next(counter))

    monkeypatch.setattr(step.Optimizer, "step", on_the_host)
    eager = steps_of(None)[1]
    counter = iter(range(100))
    assert not same(eager, steps_of(CpuTwin())[1])


def test_a_step_that_waits_for_the_device_goes_on_eagerly_and_says_why(monkeypatch, caplog):
    original = step.TrainStep._forward

    def waiting(self, *arguments):
        loss, logits = original(self, *arguments)
        float(loss.detach())
        return loss, logits

    plain = steps_of(None)[1]
    monkeypatch.setattr(step.TrainStep, "_forward", waiting)
    with caplog.at_level(logging.WARNING, "fastcnn"):
        run, weights = steps_of(CpuTwin())
    assert same(plain, weights)
    assert run.replay.recorder is None
    assert run.replay.captured == 0
    assert "one kernel at a time: operation not permitted" in run.replay.note
    assert len([r for r in caplog.records if run.replay.note in r.message]) == 1


def test_where_a_graph_is_demanded_a_failed_capture_is_an_error():
    replay = Replay(CpuTwin(), required=True)
    for _ in range(graph.WARM_UP):
        replay.run("wait", lambda: torch.ones(1).item())
    with pytest.raises(UsageError, match="--graph on: the step cannot be captured: operation not"):
        replay.run("wait", lambda: torch.ones(1).item())


@pytest.mark.parametrize("hidden", [False, True])
def test_running_out_of_memory_is_no_reason_to_go_on(hidden):
    def out_of_memory():
        try:
            raise torch.OutOfMemoryError("out of memory")
        except torch.OutOfMemoryError:
            if hidden:  # as by the end of a broken capture
                raise RuntimeError("operation failed due to a previous error")  # noqa: B904
            raise

    replay = Replay(CpuTwin(), warm_up=0)
    with pytest.raises(torch.OutOfMemoryError):
        replay.run("large", out_of_memory)


def test_graphs_need_a_gpu():
    assert recorder_for(CPU, "auto") is None
    assert recorder_for(CPU, "off") is None
    with pytest.raises(UsageError, match="--graph on: CUDA graphs need a GPU"):
        recorder_for(CPU, "on")


def test_a_capture_leaves_no_effect_behind():
    weights, buffer = torch.zeros(3), torch.ones(3)

    def work():
        weights.add_(torch.rand(3))
        buffer.mul_(2)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    replay = CpuTwin().capture(work)
    assert weights.tolist() == [0, 0, 0]
    assert buffer.tolist() == [1, 1, 1]
    assert torch.equal(torch.get_rng_state(), before)
    replay()
    replay()
    torch.manual_seed(3)
    torch.testing.assert_close(weights, torch.rand(3) + torch.rand(3))
    assert buffer.tolist() == [4, 4, 4]


@pytest.mark.full
@pytest.mark.parametrize("graphed", [False, True])
def test_a_long_run_does_not_grow(tmp_path, monkeypatch, graphed):
    found = CpuTwin() if graphed else None
    monkeypatch.setattr(step, "recorder_for", lambda device, mode: found)
    sizes, original = [], loop.Training._record

    def record(self, trained, figures, seconds):
        original(self, trained, figures, seconds)
        sizes.append(resident_bytes())

    monkeypatch.setattr(loop.Training, "_record", record)
    small = {"arch": "murgolo-base", "train_subset": 48, "test_subset": 16}
    start(tmp_path, "run", **small, epochs=100)
    # the kinds of steps are captured by the fifth epoch; a leak of one image's batch an epoch, or
    # of the weights once, would be more
    assert len(sizes) == 100
    assert max(sizes[50:]) - max(sizes[4:20]) < 2 * 2**20
