"""Whole runs on a GPU: every precision, no waiting inside an epoch, resumption, same bits."""

import copy

import pytest
import torch

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.fold import Folded, fold
from fastcnn.archs.init import initialise
from fastcnn.config import AugmentConfig, DataConfig, OptimConfig, PlaceConfig
from fastcnn.data import Images, Normalization, make_loader
from fastcnn.recipes import resolve
from fastcnn.train import run
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.evaluate import Evaluator, evaluate
from fastcnn.train.graph import recorder_for
from fastcnn.train.host import make_deterministic
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.step import TrainStep

pytestmark = pytest.mark.cuda
GPU = torch.device("cuda")
SMALL = {
    "arch": "vgg11",
    "data": "digits",
    "train_subset": 256,
    "test_subset": 64,
    "batch_size": 64,
    "epochs": 2,
    "device": "cuda",
}


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    # "auto" takes the fused ops where the library is loaded
    return library


def start(tmp_path, name, **options):
    place = PlaceConfig(output=str(tmp_path), name=name)
    return run.start(resolve(SMALL | options), place, ["test"], quiet=True)


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "fp32"),
        ({"amp": True}, "bf16"),
        ({"amp": True, "amp_dtype": "fp16"}, "fp16"),
        ({"amp": True, "ema": 0.9, "mixup": 0.4, "cutmix": 1.0, "clip_grad": 1.0}, "bf16"),
        ({"amp": True, "amp_dtype": "fp16", "decay": "decoupled", "clip_grad": 1.0}, "fp16"),
    ],
)
def test_a_run_learns_in_every_precision(tmp_path, options, precision):
    summary = start(tmp_path, "run", epochs=6, **options).summary
    assert summary["precision"] == precision
    assert summary["test_top1"] > 0.5


BACKENDS = ["fused", "torch"]


def loader_of(number_format, samples=500, backend="auto", **augment):
    images = torch.randint(0, 256, (samples, 32, 32, 3), dtype=torch.uint8).numpy()
    found = Images(images, torch.arange(samples).numpy() % 10)
    return make_loader(
        found,
        DataConfig(),
        AugmentConfig(**augment),
        Normalization.fit(found, "zscore"),
        batch_size=64,
        device=GPU,
        dtype=number_format or torch.float32,
        seed=0,
        shuffle=True,
        drop_last=False,
        backend=backend,
    )


EVERYTHING = {"ema": 0.99, "mixup": 0.4, "cutmix": 1.0, "clip_grad": 1.0}


def step_of(loader, number_format, graph, arch="vgg11", backend="auto", **options):
    torch.manual_seed(0)
    model = build(NETWORKS[arch], 32, 10, backend)
    initialise(model, "he", torch.Generator().manual_seed(0))
    config = OptimConfig(lr=0.02, **options)
    precision = Precision(number_format)
    settings = (model.to(GPU), config, precision, len(loader), 0, GPU)
    return TrainStep(*settings, graph=graph, backend=backend)


@pytest.mark.parametrize("number_format", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("graph", ["on", "off"])
@pytest.mark.parametrize("augment", [{"cutout": 8}, {"rotation": 10, "color_jitter": 0.2}])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_epoch_does_not_wait_for_the_device(number_format, graph, augment, backend):
    loader = loader_of(number_format, backend=backend, **augment)
    step = step_of(loader, number_format, graph, backend=backend, **EVERYTHING)
    for _ in range(4):  # the last batch's kind is captured in the fourth epoch
        for _ in step.epoch(loader):
            pass
    step.metrics.reset()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in step.epoch(loader):
            step.metrics.peek()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.replay.captured == (2 if graph == "on" else 0)
    assert step.metrics.read().images == 500


@pytest.fixture
def deterministic():
    make_deterministic()


@pytest.mark.parametrize("number_format", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("arch", ["vgg11", "murgolo-improved"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_and_eager_steps_give_the_same_bits(number_format, arch, backend, deterministic):
    ends = []
    for graph in ("on", "off"):
        loader = loader_of(number_format, backend=backend, cutout=8)
        step = step_of(loader, number_format, graph, arch, backend, **EVERYTHING)
        while step.step < 200:
            for _ in step.epoch(loader):
                pass
        assert step.replay.captured == (2 if graph == "on" else 0)
        ends.append({**step.model.state_dict(), **{f"ema {i}": p for i, p in
                     enumerate(step.ema.parameters)}, "sums": step.metrics.sums})  # fmt: skip
    for name, tensor in ends[0].items():
        assert torch.equal(tensor, ends[1][name]), name


def test_after_a_capture_that_failed_steps_go_on_eagerly(monkeypatch):
    original = TrainStep._forward

    def waiting(self, images, labels, row):
        loss, logits = original(self, images, labels, row)
        loss.item()
        return loss, logits

    stream = torch.cuda.current_stream()
    loader = loader_of(torch.bfloat16)
    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "_forward", waiting)
        step = step_of(loader, torch.bfloat16, "auto", "vgg16")  # with dropout
        for _ in step.epoch(loader):
            pass
        for _ in step.epoch(loader):
            pass
    assert "one kernel at a time" in step.replay.note
    assert torch.cuda.current_stream() == stream
    assert step.metrics.read().images == 1000
    # and a graph can be captured again, with its own random numbers
    step = step_of(loader, torch.bfloat16, "on", "vgg16")
    for _ in step.epoch(loader):
        pass
    assert step.replay.captured == 1


def test_a_capture_that_failed_is_out_of_the_allocator():
    recorder, total = recorder_for(GPU, "on"), torch.zeros(1, device=GPU)
    before = recorder.capture(lambda: total.add_(torch.ones(1, device=GPU)))
    pool = recorder.pool
    with pytest.raises(RuntimeError, match="captur"):
        recorder.capture(lambda: torch.ones(1, device=GPU).item())
    with pytest.raises(RuntimeError, match="not currently recording"):
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
    after = recorder.capture(lambda: total.add_(torch.ones(1, device=GPU)))
    for replay in (before, after, before):
        replay()
    assert total.item() == 3


def test_evaluation_by_graphs_gives_the_same_figures():
    loader = loader_of(torch.bfloat16, samples=300)
    model = step_of(loader, torch.bfloat16, "off").model
    precision = Precision(torch.bfloat16)
    plain = evaluate(model, loader, 10, precision, GPU, flip=True)
    recorder = recorder_for(GPU, "on")
    evaluator = Evaluator(model, loader, 10, precision, GPU, True, recorder)
    found = [evaluator() for _ in range(6)]
    assert evaluator.replay.captured == 2
    for one in found:
        assert one.figures.top1 == plain.figures.top1
        assert torch.equal(one.confusion, plain.confusion)
        assert one.figures.loss == pytest.approx(plain.figures.loss, rel=1e-3)


def test_graphs_of_evaluation_follow_the_weights():
    loader = loader_of(torch.bfloat16, samples=300)
    model = step_of(loader, torch.bfloat16, "off", "vgg16").model
    precision = Precision(torch.bfloat16)
    evaluator = Evaluator(model, loader, 10, precision, GPU, False, recorder_for(GPU, "on"))
    for number in range(6):
        found, fresh = evaluator(), evaluate(model, loader, 10, precision, GPU)
        assert found.figures.loss == pytest.approx(fresh.figures.loss, rel=1e-3)
        with torch.no_grad():
            model.conv3.norm.running_mean.add_(number)
            model.conv3.norm.running_var.mul_(1.5)
            model.conv3.conv.weight.mul_(0.9)
    assert evaluator.replay.captured == 2


def test_a_fold_is_refreshed_without_waiting():
    model = step_of(loader_of(torch.bfloat16), torch.bfloat16, "off", "vgg16").model
    folded = Folded(model, torch.bfloat16)
    with torch.no_grad():
        model.conv2.norm.running_var.mul_(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        folded.refresh()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = fold(copy.deepcopy(model).cpu(), torch.bfloat16).state_dict()
    for name, tensor in folded.network.state_dict().items():
        torch.testing.assert_close(tensor.cpu(), wanted[name], rtol=2**-8, atol=0)


@pytest.mark.parametrize("graph", ["on", "off"])
def test_device_memory_does_not_grow_over_epochs(tmp_path, monkeypatch, graph):
    from fastcnn.train import loop

    sizes, original = [], loop.Training._record

    def record(self, trained, evaluation):
        original(self, trained, evaluation)
        sizes.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    monkeypatch.setattr(loop.Training, "_record", record)
    start(tmp_path, "run", epochs=100, arch="cnn-a", amp=True, graph=graph)
    assert len(sizes) == 100
    assert sizes[-1] == sizes[4]  # by then every kind of step is captured


def test_deterministic_and_resumed_runs_are_bit_equal(tmp_path, monkeypatch):
    from fastcnn.train.interrupt import Interrupted, StopAtStepEdge

    options = {"deterministic": True, "amp": True, "ema": 0.9}
    looks = iter(range(1, 1000))

    def check(self):
        if next(looks) == 3:
            raise Interrupted(15)

    first = start(tmp_path, "first", **options).folder.last
    second = start(tmp_path, "second", **options).folder.last
    with monkeypatch.context() as patch:
        patch.setattr(StopAtStepEdge, "check", check)
        with pytest.raises(Interrupted):
            start(tmp_path, "third", **options)
    place = PlaceConfig(resume=str(tmp_path / "third"))
    third = run.resume(place, {}, ["test"], quiet=True).folder.last
    weights = [checkpoint.load(path)["model"] for path in (first, second, third)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
        assert torch.equal(tensor, weights[2][name]), name


def test_graphs_and_eager_steps_follow_the_same_loss(tmp_path):
    curves = []
    for graph in ("on", "off"):
        options = {"epochs": 8, "optimizer": "sgd", "lr": 0.01, "graph": graph}
        folder = start(tmp_path, graph, **options).folder
        history = checkpoint.load(folder.last)["progress"]["history"]
        curves.append([row["train_loss"] for row in history])
    assert curves[0] == pytest.approx(curves[1], rel=1e-2)


def test_gpu_and_cpu_follow_the_same_loss(tmp_path):
    options = {"epochs": 1, "optimizer": "sgd", "lr": 0.01}
    curves = [
        checkpoint.load(start(tmp_path, device, device=device, **options).folder.last)["progress"]
        for device in ("cuda", "cpu")
    ]
    losses = [curve["history"][0]["train_loss"] for curve in curves]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
