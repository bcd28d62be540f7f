"""One optimisation step: learning on every family, clipping, loss scaling, precision."""

import pytest
import torch
from conftest import STRUCTURES
from torch import nn
from torch.nn import functional as F

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.config import OptimConfig
from fastcnn.errors import UsageError
from fastcnn.train.evaluate import evaluate, predict
from fastcnn.train.numerics import precision
from fastcnn.train.numerics.precision import Precision, choose_device, choose_precision
from fastcnn.train.step import TrainStep

CPU = torch.device("cpu")
PLAIN = {"schedule": "constant", "label_smoothing": 0.0, "weight_decay": 0.0}


def make_step(model, number_format=None, **options):
    config = OptimConfig(**(PLAIN | options))
    return TrainStep(model, config, Precision(number_format), 4, 0, CPU)


def batch(count, size=32, classes=10):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, 3, size, size, generator=generator)
    labels = torch.arange(count) % classes
    return images.contiguous(memory_format=torch.channels_last), labels


# with the solver that the modern recipe of each family has
FAMILIES = {
    "cnn-a": {"optimizer": "adam", "lr": 1e-3},
    "murgolo-improved": {"optimizer": "adam", "lr": 1e-3},
    "mao-batchnorm": {"optimizer": "adam", "lr": 1e-3},
    "tiny-d": {"optimizer": "adam", "lr": 1e-3},
    "vgg11": {"optimizer": "sgd", "lr": 0.02},
}


@pytest.mark.full
@pytest.mark.parametrize("name", FAMILIES)
def test_one_batch_is_learnt_by_heart(name):
    network = NETWORKS[name]
    model = build(network, network.image_sizes[0], 10)
    initialise(model, "he", torch.Generator().manual_seed(0))
    step = make_step(model, **FAMILIES[name])
    images, labels = batch(10, network.image_sizes[0])
    top1 = 0.0
    while top1 < 0.99 and step.step < 80:
        for _ in range(10):
            step(images, labels)
        top1 = evaluate(model, [(images, labels)], 10, step.precision, CPU).figures.top1
    assert top1 >= 0.99


@pytest.mark.full
@pytest.mark.parametrize("name", STRUCTURES)
def test_networks_take_a_step_at_every_size(name):
    network = NETWORKS[name]
    for size in network.image_sizes:
        model = build(network, size, 10)
        initialise(model, "he", torch.Generator().manual_seed(0))
        before = [p.detach().clone() for p in model.parameters()]
        step = make_step(model, optimizer="sgd", lr=1e-3, momentum=0.0)
        step(*batch(4, size))
        assert step.metrics.read().images == 4
        assert all(torch.isfinite(p).all() for p in model.parameters())
        changed = [not torch.equal(b, p) for b, p in zip(before, model.parameters(), strict=True)]
        assert sum(changed) > len(changed) / 2


OPTIMIZERS = [
    {"optimizer": "sgd", "lr": 0.02},
    {"optimizer": "sgd", "lr": 0.02, "decay": "decoupled"},
    {"optimizer": "adam", "lr": 1e-3},
    {"optimizer": "adamw", "lr": 1e-3},
]


# a norm, a bias and norm, a bias alone behind the frozen product
@pytest.mark.full
@pytest.mark.parametrize("name", ["vgg11", "tiny-f", "cnn-a"])
@pytest.mark.parametrize("backend", ["torch", "fused"])
@pytest.mark.parametrize("options", OPTIMIZERS, ids=lambda o: " ".join(map(str, o.values())))
def test_a_frozen_convolution_stays_and_all_else_learns(name, backend, options, library):
    network = NETWORKS[name]
    model = build(network, network.image_sizes[0], 10, backend)
    initialise(model, "he", torch.Generator().manual_seed(0))
    model.conv1.conv.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    step = make_step(
        model.train(), **(options | {"weight_decay": 0.1, "clip_grad": 1.0, "ema": 0.5})
    )
    for _ in range(3):
        step(*batch(8, network.image_sizes[0]))
    after, shadow = model.state_dict(), step.ema.model.state_dict()
    stays = {
        key for key in after if "num_batches" not in key and torch.equal(after[key], before[key])
    }
    expected = {"conv1.conv.weight"} | (
        {"conv1.conv.bias"} if "conv1.conv.bias" in after else set()
    )
    assert stays == expected
    assert all(torch.equal(shadow[key], before[key]) for key in stays)
    assert torch.isfinite(torch.stack([p.abs().max() for p in model.parameters()])).all()


def linear_step(**options):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    images = torch.arange(48.0).view(4, 3, 2, 2)
    return model, make_step(model, momentum=0.0, nesterov=False, **options), images


@pytest.mark.parametrize("mixing", [{}, {"mixup": 1.0}])
def test_the_step_descends_the_loss_that_is_asked_for(mixing):
    weights = {}
    for loss in ("cross-entropy", "softmax-twice"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(3, 10))
        step = make_step(model, optimizer="sgd", lr=1.0, momentum=0.0, loss=loss, **mixing)
        images, labels = batch(20, 1)
        before = model[1].weight.detach().clone()
        step(images, labels)
        weights[loss] = model[1].weight.detach() - before
        reached = step.metrics.read().loss
        if loss == "softmax-twice":
            assert 1.46 < reached < 2.47  # ln(9 + e) - 1 to ln(9 + e)
    assert weights["softmax-twice"].norm() < 0.5 * weights["cross-entropy"].norm()


def test_clipping_limits_the_norm_of_the_gradient():
    labels = torch.tensor([0, 1, 2, 0])
    for clip, expected in ((0.5, 0.5), (0.0, None)):
        model, step, images = linear_step(optimizer="sgd", lr=1.0, clip_grad=clip)
        step(images, labels)
        norm = torch.cat([p.detach().flatten() for p in model.parameters()]).norm().item()
        if expected:
            assert norm == pytest.approx(expected, rel=1e-4)
        else:
            assert norm > 5


@pytest.mark.parametrize("clip", [0.0, 1000.0])
def test_fp16_scales_the_loss_and_the_update_does_not_see_it(clip):
    labels = torch.tensor([0, 1, 2, 0])
    plain_model, plain, images = linear_step(optimizer="sgd", lr=0.01, clip_grad=clip)
    model, step, _ = linear_step(optimizer="sgd", lr=0.01, clip_grad=clip)
    half = TrainStep(model, step.config, Precision(torch.float16), 4, 0, CPU)
    half.scale.scale.fill_(16.0)
    plain(images, labels)
    half(images, labels)
    torch.testing.assert_close(plain_model[1].weight, model[1].weight, rtol=5e-3, atol=1e-4)


def test_fp16_overflow_skips_the_step_and_halves_the_scale():
    model, step, images = linear_step(optimizer="sgd", lr=0.01)
    half = TrainStep(model, step.config, Precision(torch.float16), 4, 0, CPU)
    half(images * 1e4, torch.tensor([0, 1, 2, 0]))
    assert torch.equal(model[1].weight, torch.zeros(3, 12))
    assert half.scale.scale.item() == 2.0**15


def test_mixed_targets_are_weighted():
    _model, step, images = linear_step(optimizer="sgd", lr=1e-9, mixup=1.0)
    step(images, torch.tensor([0, 1, 2, 0]))
    assert step.metrics.read().loss == pytest.approx(
        F.cross_entropy(torch.zeros(1, 3), torch.tensor([0])).item()
    )


def test_evaluation_of_both_directions_is_the_mean_of_their_logits():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 4)).double()
    images, labels = torch.randn(40, 3, 4, 4).double(), torch.arange(40) % 4
    batches = [(images[:24], labels[:24]), (images[24:], labels[24:])]
    found = [evaluate(model, batches, 4, Precision(), CPU, flip=f) for f in (False, True)]
    mirrored = torch.stack([images[..., column] for column in (3, 2, 1, 0)], 3)
    with torch.no_grad():
        one, other = model(images), model(mirrored)
    for result, logits in zip(found, (one, (one + other) / 2), strict=True):
        assert result.figures.loss == pytest.approx(F.cross_entropy(logits, labels).item())
        counts = torch.zeros(4, 4, dtype=torch.int64)
        for true, predicted in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
            counts[true, predicted] += 1
        assert torch.equal(result.confusion, counts)
        assert result.figures.top1 == counts.trace().item() / 40
    assert found[0].figures != found[1].figures


def test_logits_of_both_directions_are_averaged_in_fp32():
    class Half(nn.Module):
        def forward(self, images):
            return images[:, 0, 0, :1].to(torch.bfloat16)

    images = torch.tensor([1.0, 1.0 + 2**-7]).expand(1, 3, 2, 2)
    assert predict(Half(), images, True).item() == 1.0 + 2**-8
    assert predict(Half(), images, False).dtype is torch.bfloat16


@pytest.mark.parametrize("backend", ["torch", "fused"])
def test_mirrored_images_keep_the_layout_that_the_ops_take(backend, library):
    model = build(NETWORKS["mao-batchnorm"], 32, 10, backend).eval()
    images, _ = batch(4)
    with torch.no_grad():
        found = predict(model, images, True)
        torch.testing.assert_close(found, predict(model, images.flip(3), True))
        assert not torch.allclose(found, predict(model, images, False))


def test_bf16_keeps_fp32_weights_and_loss():
    model = build(NETWORKS["murgolo-base"], 32, 10)
    step = make_step(model, torch.bfloat16, optimizer="sgd", lr=0.01)
    step(*batch(8))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_amp_runs_in_fp32_where_the_cpu_would_emulate(monkeypatch):
    monkeypatch.setattr(precision, "cpu_computes_in", lambda dtype: False)
    chosen = choose_precision(CPU, True, "bf16")
    assert chosen.dtype is None
    assert chosen.note == "--amp: this CPU has no bf16 instructions; training runs in fp32"
    monkeypatch.setattr(precision, "cpu_computes_in", lambda dtype: True)
    assert choose_precision(CPU, True, "bf16") == Precision(torch.bfloat16)
    assert choose_precision(CPU, True, "fp16").scales_loss
    assert choose_precision(CPU, False, "fp16") == Precision()


def test_amp_on_a_gpu_takes_bf16_only_where_it_is_native(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(precision, "gpu_computes_in_bf16", lambda device: False)
    assert choose_precision(gpu, True, "bf16").dtype is torch.float16
    monkeypatch.setattr(precision, "gpu_computes_in_bf16", lambda device: True)
    assert choose_precision(gpu, True, "bf16") == Precision(torch.bfloat16)


def test_a_named_gpu_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.cuda, "get_arch_list", list)
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    choose_device("cpu")
    assert len(current) == 1


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_that_torch_has_no_code_for_is_one_line(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    words = r"holds CUDA code for 7\.5, 9\.0, 12\.0\+PTX, which this GPU \(compute capability 6\.1"
    with pytest.raises(UsageError, match=rf"^--device cuda(:0)?: torch \S+ {words}\) cannot run; "):
        choose_device(name)
    for served in ((7, 5), (9, 0), (12, 1)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=served: c)
        assert choose_device(name).type == "cuda"


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:99", "cuda"])
def test_a_device_that_is_not_there_is_one_line(name):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UsageError, match="--device"):
        choose_device(name)
