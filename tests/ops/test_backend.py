"""The layers' backends: which one is taken, and that they train the same network."""

import os
import re

import pytest
import torch
from commands_apart import SMALL as APART
from commands_apart import command
from conftest import STRUCTURES
from small_runs import SMALL, resume, start

from fastcnn import ops
from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.archs.layers import ConvNormAct
from fastcnn.archs.spec import Conv
from fastcnn.config import PlaceConfig
from fastcnn.data import Normalization, load_dataset, make_loader
from fastcnn.errors import BuildError
from fastcnn.ops import backend, conv_autotune, reference
from fastcnn.recipes import resolve
from fastcnn.train import run
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.step import TrainStep

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.fixture
def no_library(monkeypatch):
    def fail():
        raise BuildError("no C++ compiler: install g++")

    monkeypatch.setattr(ops, "load", fail)
    monkeypatch.setattr("fastcnn.ops.loading._loaded", False)


def test_auto_takes_the_library():
    assert backend.choose_backend("auto", CPU, None) == ("fused", "")
    assert backend.choose_backend("fused", CPU, torch.bfloat16) == ("fused", "")
    assert backend.choose_backend("torch", CPU, None) == ("torch", "")
    assert backend.ops_for("auto", torch.zeros(2, 3)) is ops
    assert backend.ops_for("torch", torch.zeros(2, 3)) is reference


def test_auto_takes_torch_where_there_is_no_kernel():
    model = build(NETWORKS["mao-batchnorm"], 32, 10).bfloat16().eval()
    x = torch.randn(2, 3, 32, 32).bfloat16().to(memory_format=torch.channels_last)
    assert model(x).dtype == torch.bfloat16  # its parameters are not fp32
    plain = build(NETWORKS["mao-batchnorm"], 32, 10).eval()
    _, tangent = torch.func.jvp(plain, (x.float(),), (x.float(),))
    assert tangent.abs().max() > 0


def test_auto_says_why_it_takes_torch(no_library):
    assert backend.choose_backend("auto", CPU, None) == (
        "torch",
        "backend torch: no C++ compiler: install g++",
    )
    assert backend.ops_for("auto", torch.zeros(1)) is reference
    with pytest.raises(BuildError, match="--backend fused: no C\\+\\+ compiler: install g"):
        backend.choose_backend("fused", CPU, None)


class NoCompiler:
    """A machine without compilers, and without a library that was built before."""

    def __init__(self, cache):
        self.cache = str(cache)

    def __call__(self):
        os.environ.update(FASTCNN_CACHE=self.cache, PATH="/nowhere")
        os.environ.pop("CXX", None)


@pytest.mark.full
def test_without_a_compiler_a_run_says_so_and_trains_in_plain_torch(tmp_path):
    reason = "no C++ compiler: install g++"
    for name, code in (("auto", 0), ("fused", BuildError.exit_code)):
        words = [*APART, "--backend", name, "--epochs", "1", "--output", str(tmp_path / name)]
        log, before = tmp_path / f"{name}.log", NoCompiler(tmp_path / "cache")
        with command(log, *words, before=before) as process:
            assert process.ended() == code, process.output
        lines = process.output.splitlines()
        if code:
            assert lines[-1].startswith("fastcnn: --backend fused: the native library cannot be b")
            assert reason in lines[-1]
            assert not (tmp_path / name).exists()
        else:
            [note] = [line for line in lines if reason in line]
            assert note.startswith("note: backend torch: ")
            assert lines[-2].startswith("Test top-1 ")


def test_a_dtype_without_kernels():
    chosen, note = backend.choose_backend("auto", CPU, torch.float16)
    assert chosen == "torch"
    assert "no kernels for float16 on the CPU" in note
    with pytest.raises(BuildError, match="float16"):
        backend.choose_backend("fused", CPU, torch.float16)
    half = torch.zeros(2, 3, dtype=torch.float16)
    assert backend.ops_for("auto", half) is reference
    assert backend.ops_for("fused", half) is ops


def test_library_without_code_for_the_gpu(monkeypatch, library):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(ops, "has_kernels", lambda device_type: True)
    chosen, note = backend.choose_backend("auto", gpu, torch.float16)
    assert chosen == "torch"
    built = ops.load().archs
    holds = f"holds CUDA code for {', '.join(built)}" if built else "was built for the CPU alone"
    reason = f"the native library {holds}, which this GPU (compute capability 7.5) cannot run; "
    remedy = "`fastcnn build --archs 7.5` builds for it"
    assert note == f"backend torch: {reason}{remedy}"
    with pytest.raises(BuildError, match=re.escape(f"--backend fused: {reason}{remedy}")):
        backend.choose_backend("fused", gpu, torch.float16)
    monkeypatch.setattr(ops, "has_kernels", lambda device_type: False)
    with pytest.raises(BuildError, match="no CUDA kernels"):
        backend.choose_backend("fused", gpu, None)


GPU = torch.device("cuda", 0)


@pytest.fixture
def mode():
    return conv_autotune.mode


@pytest.fixture
def with_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: True)


def test_convolutions_by_measurement_or_the_vendors_are_a_choice_everywhere(mode):
    for chosen in ("vendor", "auto"):
        backend.choose_convolution(chosen, "torch", CPU, None)
        assert mode() == chosen


def test_fused_convolutions_where_there_are_kernels(mode, with_kernels):
    backend.choose_convolution("fused", "fused", GPU, torch.bfloat16)
    assert mode() == "fused"


@pytest.mark.parametrize(
    ("chosen", "device", "dtype", "says"),
    [
        ("torch", GPU, torch.bfloat16, "needs --backend fused.*; use --conv auto"),
        ("fused", CPU, torch.bfloat16, "bfloat16: .* float32's on the CPU; use --conv auto"),
        ("fused", GPU, None, "float32: .* half precision's; add --amp, or use --conv auto"),
    ],
)
def test_fused_convolutions_that_cannot_be_had(mode, with_kernels, chosen, device, dtype, says):
    with pytest.raises(BuildError, match=f"--conv fused: {says}"):
        backend.choose_convolution("fused", chosen, device, dtype)
    assert mode() == "auto"


def test_fused_convolutions_need_a_gpu_and_a_library_that_have_them(
    mode, with_kernels, monkeypatch
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(BuildError, match=r"capability 7\.5: the fused kernels need 8\.0; use"):
        backend.choose_convolution("fused", "fused", GPU, torch.float16)
    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
    with pytest.raises(BuildError, match="no CUDA kernels; `fastcnn doctor` says why; use --conv"):
        backend.choose_convolution("fused", "fused", GPU, torch.float16)


def test_a_run_and_an_evaluation_choose_their_convolutions(tmp_path, mode):
    with pytest.raises(BuildError, match="--conv fused: needs --backend fused"):
        start(tmp_path, epochs=1, conv="fused", backend="torch")
    folder = start(tmp_path, epochs=1, conv="vendor").folder.path
    assert mode() == "vendor"
    assert "conv: vendor" in (folder / "config.yaml").read_text()
    conv_autotune.set_mode("auto")
    run.evaluate_run(str(folder))
    assert mode() == "vendor"
    run.evaluate_run(str(folder), overrides={"conv": "auto"})
    assert mode() == "auto"
    torchs = {"backend": "torch"}
    with pytest.raises(BuildError, match="--conv fused: needs --backend fused"):
        run.evaluate_run(str(folder), overrides={"conv": "fused"} | torchs)
    state = checkpoint.load(folder / "last.pt")
    for deterministic, without in ((True, "vendor"), (False, "auto")):
        state["config"] |= {"conv": "fused", "deterministic": deterministic}
        checkpoint.save(state, folder / "last.pt")
        for options, wanted in ((torchs, without), ({}, "fused")):
            run.evaluate_run(str(folder), overrides=options)
            assert mode() == wanted


@pytest.mark.parametrize(
    ("conv", "deterministic", "wanted"),
    [
        ("auto", False, "auto"),
        ("auto", True, "vendor"),
        ("vendor", False, "vendor"),
        ("fused", False, "fused"),
        ("fused", True, "fused"),
    ],
)
def test_an_evaluation_follows_its_run(with_kernels, conv, deterministic, wanted):
    here = ("fused", GPU, torch.bfloat16)
    assert backend.convolution_of_run(conv, deterministic, *here) == wanted
    without = "auto" if conv == "fused" else conv
    assert backend.convolution_of_run(conv, deterministic, "fused", CPU, None) == wanted
    missing = (("torch", GPU, torch.bfloat16), ("fused", GPU, None), ("fused", CPU, torch.bfloat16))
    for there in missing:
        found = backend.convolution_of_run(conv, deterministic, *there)
        assert found == ("vendor" if without == "auto" and deterministic else without)


def test_a_resumed_run_keeps_its_choice_or_takes_another(tmp_path, mode, monkeypatch):
    folder = start(tmp_path, epochs=1, conv="vendor").folder.path
    (folder / "summary.json").unlink()
    conv_autotune.set_mode("auto")
    resume(folder)
    assert mode() == "vendor"
    (folder / "summary.json").unlink()
    resume(folder, conv="auto")  # without --allow-changes
    assert mode() == "auto"


def test_the_plans_of_a_run_are_said_once_after_its_first_step(tmp_path, monkeypatch, capsys):
    steps = []
    work = TrainStep._work

    def plan_and_work(self, images, labels):
        steps.append(None)
        for taken in conv_autotune._noting:
            taken.extend([conv_autotune.FUSED, conv_autotune.VENDOR])
        work(self, images, labels)

    monkeypatch.setattr(TrainStep, "_work", plan_and_work)
    place = PlaceConfig(output=str(tmp_path), name="run")
    run.start(resolve(SMALL), place, ["test"])
    lines = [line for line in capsys.readouterr().err.splitlines() if "convolutions" in line]
    assert lines == ["convolutions: 1 of 2 fused (measured; `fastcnn bench --layers` shows why)"]
    assert len(steps) > 1


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected one of auto, fused, torch, got 'cuda'"):
        ConvNormAct(3, Conv(8), "cuda")


@pytest.mark.full
@pytest.mark.parametrize("name", STRUCTURES)
def test_networks_compute_the_same_with_both(name):
    network = NETWORKS[name]
    size = network.image_sizes[0]
    torch.manual_seed(0)
    plain = build(network, size, 10, "torch").double()
    initialise(plain, "he", torch.Generator().manual_seed(0))
    fused = build(network, size, 10, "fused").double()
    fused.load_state_dict(plain.state_dict())
    # images enough that no statistics are of two values, which nothing but luck reproduces
    x = torch.randn(8, 3, size, size, dtype=torch.float64)
    x = x.to(memory_format=torch.channels_last)
    gradients = []
    for model in (plain, fused):
        torch.manual_seed(1)  # dropout
        y = model(x)
        y.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        gradients[-1] += [y.detach(), *model.buffers(), model.eval()(x).detach()]
    for fused_value, plain_value in zip(*gradients, strict=True):
        scale = float(plain_value.abs().max()) if plain_value.numel() else 1.0
        torch.testing.assert_close(fused_value, plain_value, rtol=1e-8, atol=1e-8 * max(scale, 1))


def loss_curve(backend_name, arch, dtype, batch_size, steps=50, **options):
    """Training loss of each of the first steps on digits."""
    config = resolve({"arch": arch, "data": "digits", "batch_size": batch_size} | options)
    images = load_dataset(config.data, 32).train
    loader = make_loader(
        images,
        config.data,
        config.augment,
        Normalization.fit(images, "zscore"),
        batch_size=batch_size,
        device=CPU,
        seed=0,
        shuffle=True,
        drop_last=True,
    )
    model = build(NETWORKS[arch], 32, 10, backend_name).to(dtype)
    initialise(model, "he", torch.Generator().manual_seed(0))
    step = TrainStep(model.train(), config.optim, Precision(), len(loader), 0, CPU)
    losses = []
    while len(losses) < steps:
        for pixels, labels in loader:
            step.metrics.reset()
            torch.manual_seed(len(losses))  # dropout
            step(pixels.to(dtype), labels)
            losses.append(step.metrics.read().loss)
    return torch.tensor(losses[:steps])


GENTLE = {"optimizer": "sgd", "schedule": "constant", "lr": 1e-4, "label_smoothing": 0.0}


@pytest.mark.full
@pytest.mark.parametrize(
    ("arch", "dtype", "batch_size", "options"),
    [
        ("mao-default", torch.float32, 128, GENTLE),
        # with batch norm and a real learning rate, fp32 training is chaotic: torch leaves its own
        # curve by more than 1e-2 after a change of the weights by 1e-7
        ("mao-batchnorm", torch.float64, 16, {}),
    ],
)
def test_fifty_steps_follow_the_same_losses(arch, dtype, batch_size, options):
    curves = [loss_curve(name, arch, dtype, batch_size, **options) for name in ("fused", "torch")]
    assert curves[1][-5:].mean() < 0.5 * curves[1][:5].mean()
    torch.testing.assert_close(*curves, rtol=1e-4, atol=0)


def test_a_checkpoint_moves_between_backends(tmp_path):
    trained = start(tmp_path, backend="fused", amp=False, epochs=3)
    assert trained.summary["backend"] == "fused"
    results = [
        run.evaluate_run(str(trained.folder.path), overrides={"backend": name})
        for name in ("fused", "torch")
    ]
    assert [r["backend"] for r in results] == ["fused", "torch"]
    assert results[0]["top1"] == results[1]["top1"] == trained.summary["test_top1"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)


@pytest.mark.full
def test_same_accuracy_within_noise(tmp_path):
    options = {"arch": "mao-batchnorm", "epochs": 3, "train_subset": 700, "test_subset": 300}
    found = {
        name: start(tmp_path, name, backend=name, **options).summary["test_top1"]
        for name in ("fused", "torch")
    }
    # a binomial standard error of 300 images at 0.9 is 0.017
    assert min(found.values()) > 0.8
    assert abs(found["fused"] - found["torch"]) < 0.05
