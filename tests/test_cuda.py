"""Whole runs on a GPU: every precision, no waiting inside an epoch, resumption, same bits."""

import pytest
import torch

from fastcnn.archs import NETWORKS
from fastcnn.archs.init import initialise
from fastcnn.archs.spec import build
from fastcnn.config import AugmentConfig, DataConfig, OptimConfig, PlaceConfig
from fastcnn.data import Images, Normalization, make_loader
from fastcnn.recipes import resolve
from fastcnn.train import checkpoint, run
from fastcnn.train.precision import Precision
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


@pytest.mark.parametrize("number_format", [None, torch.bfloat16, torch.float16])
def test_steps_do_not_wait_for_the_device(number_format):
    images = torch.randint(0, 256, (512, 32, 32, 3), dtype=torch.uint8).numpy()
    samples = Images(images, torch.arange(512).numpy() % 10)
    augment = AugmentConfig(rotation=10, cutout=8, color_jitter=0.2)
    loader = make_loader(
        samples,
        DataConfig(),
        augment,
        Normalization.fit(samples, "zscore"),
        batch_size=64,
        device=GPU,
        seed=0,
        shuffle=True,
        drop_last=False,
    )
    model = build(NETWORKS["vgg11"], 32, 10)
    initialise(model, "he", torch.Generator().manual_seed(0))
    config = OptimConfig(ema=0.99, mixup=0.4, cutmix=1.0, clip_grad=1.0)
    step = TrainStep(model.to(GPU), config, Precision("cuda", number_format), len(loader), 0, GPU)
    batches = iter(loader)
    step(*next(batches))  # the order and the draws of an epoch are uploaded once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            step(*batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.metrics.read().images == 512


def test_deterministic_and_resumed_runs_are_bit_equal(tmp_path, monkeypatch):
    from fastcnn.train.interrupt import Interrupted, StopAtStepEdge

    options = {"deterministic": True, "amp": True, "ema": 0.9}
    looks = iter(range(1, 1000))

    def check(self):
        if next(looks) == 3:
            raise Interrupted(15)

    try:
        first = start(tmp_path, "first", **options).folder.last
        second = start(tmp_path, "second", **options).folder.last
        with monkeypatch.context() as patch:
            patch.setattr(StopAtStepEdge, "check", check)
            with pytest.raises(Interrupted):
                start(tmp_path, "third", **options)
        place = PlaceConfig(resume=str(tmp_path / "third"))
        third = run.resume(place, {}, ["test"], quiet=True).folder.last
    finally:
        torch.use_deterministic_algorithms(False)
    weights = [checkpoint.load(path)["model"] for path in (first, second, third)]
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
        assert torch.equal(tensor, weights[2][name]), name


def test_gpu_and_cpu_follow_the_same_loss(tmp_path):
    options = {"epochs": 1, "optimizer": "sgd", "lr": 0.01}
    curves = [
        checkpoint.load(start(tmp_path, device, device=device, **options).folder.last)["progress"]
        for device in ("cuda", "cpu")
    ]
    losses = [curve["history"][0]["train_loss"] for curve in curves]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
