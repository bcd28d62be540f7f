"""Every operation of a step, an evaluation, Grad-CAM, an export's check and bench has a kernel on
CUDA for its dtype, and those of a captured step may be captured; as far as is known without a GPU.
"""

from itertools import cycle

import pytest
import torch
import torch.distributed as dist
from cuda_dtypes import Recorder, cuda_has, missing

from fastcnn.archs import NETWORKS, get_network
from fastcnn.archs.build import build
from fastcnn.archs.elementary import Elementary
from fastcnn.archs.fold import fold
from fastcnn.archs.plain import plain
from fastcnn.archs.spec import layer_table
from fastcnn.bench.rivals.check import Check
from fastcnn.bench.rivals.variants import Task, Workbench
from fastcnn.config import OptimConfig
from fastcnn.export.check import _comparison
from fastcnn.export.network import Exported
from fastcnn.insight.analysis.gradcam import choose_operation, enlarged, gradcam
from fastcnn.ops import reference
from fastcnn.train.evaluate import Evaluator
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.step import TrainStep

CPU = torch.device("cpu")
HALF = torch.bfloat16
FORMATS = [None, HALF, torch.float16]
OPTIONS = [
    {"optimizer": "adam", "clip_grad": 1.0, "mixup": 0.2, "ema": 0.9},
    {"optimizer": "sgd", "nesterov": True, "label_smoothing": 0.0, "loss": "softmax-twice"},
    {"optimizer": "adamw", "clip_grad": 1.0, "cutmix": 1.0},
    {"optimizer": "sgd", "momentum": 0.0, "nesterov": False, "decay": "decoupled", "ema": 0.9},
]
# of every kind of layer: norm, dropout, bias, leaky ReLU
FEW = ["murgolo-improved", "cnn-a", "mao-leaky", "tiny-f"]


def batch():
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    return images, torch.arange(2)


def recorded_step(name, number_format, options, backend="torch"):
    """What the captured part of a step runs."""
    model = build(NETWORKS[name], 32, 10, backend).train()
    config = OptimConfig(schedule="constant", **options)
    step = TrainStep(model, config, Precision(number_format), 3, 0, CPU, backend=backend)
    step._prepare()
    if backend == "fused":
        step._work(*batch())  # the warm-up before a capture, which may time convolutions
    with Recorder() as recorder:
        step._work(*batch())
    return recorder


def check(recorder):
    assert recorder.seen
    assert ", ".join(missing(recorder.seen)) == ""


@pytest.mark.parametrize(("name", "options"), list(zip(NETWORKS, cycle(OPTIONS))), ids=str)
def test_a_step_of_every_network(name, options):
    recorder = recorded_step(name, HALF, options)
    check(recorder)
    assert recorder.uncaptured == set()


@pytest.mark.full
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: o["optimizer"])
def test_a_step_with_every_option(options, number_format):
    for name in FEW:
        recorder = recorded_step(name, number_format, options)
        check(recorder)
        assert recorder.uncaptured == set()


@pytest.mark.parametrize("number_format", FORMATS[:2], ids=str)
def test_a_step_with_our_kernels(library, number_format):
    for name in FEW:
        recorder = recorded_step(name, number_format, OPTIONS[0], "fused")
        check(recorder)
        assert recorder.uncaptured == set()
        assert {"fastcnn::adam_", "fastcnn::find_nonfinite_"} <= {name for name, _ in recorder.seen}


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_an_evaluation(number_format):
    for name in (*FEW, "vgg11", "resnet18"):
        model = build(NETWORKS[name], 32, 10, "torch").eval()
        evaluator = Evaluator(model, None, 10, Precision(number_format), CPU, flip=True)
        with Recorder() as recorder, torch.no_grad():
            evaluator.folded.refresh()
            evaluator._work(*batch())
        check(recorder)
        assert recorder.uncaptured == set()


def test_gradcam_and_an_exports_check():
    for name in (*FEW, "vgg11", "resnet18"):
        network = get_network(name)
        model = build(network, 32, 10, "torch").eval()
        operation = choose_operation(layer_table(network, 32, 10), None)
        images, labels = batch()
        with Recorder() as recorder:
            enlarged(gradcam(Elementary(model), images, operation, labels), (32, 32))
            exported = Exported(plain(fold(model)), None, 32).eval()
            logits = exported(images).detach()
            _comparison(logits, logits, (2,), name)
        check(recorder)


@pytest.mark.parametrize("half", ["fp32", "bf16"])
def test_a_benchmark_and_its_check(library, half):
    """Ours, plain torch under autocast, and the truth in fp64."""
    if half == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("no bf16 on this CPU")
    for name in ("cnn-a", "cnn-a+norm"):
        task = Task(name, 4, "resident", ("eager", "fused"), half=half, images=12)
        with Recorder() as recorder:
            bench = Workbench(task)
            found = Check(bench)
            for backend in ("eager", "fused"):
                variant = bench.variant(backend, augment=True)
                found.why_wrong(backend, variant, found.run(variant))
        check(recorder)


def test_statistics_of_all_processes(tmp_path):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        for number_format in (torch.float32, HALF, torch.float16):
            x = torch.randn(4, 3, 5, 5).to(number_format).requires_grad_()
            vectors = [torch.rand(3, requires_grad=i < 2) for i in range(4)]
            with Recorder() as recorder:
                y = reference.bn_act(x, *vectors, True, across=dist.group.WORLD)
                y.sum().backward()
            check(recorder)
    finally:
        dist.destroy_process_group()


# errors that must be seen


def test_the_look_that_has_no_bf16_on_cuda_is_seen(monkeypatch):
    """The step as it was: it runs on the CPU, and would have ended in its first step on a GPU."""

    def as_it_was(grads, found_inf):
        one = torch.ones(())
        for dtype in {grad.dtype for grad in grads}:
            own = [grad for grad in grads if grad.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(own, found_inf, one)

    monkeypatch.setattr(reference, "find_nonfinite_", as_it_was)
    told = "aten::_amp_foreach_non_finite_check_and_unscale_ bfloat16"
    for number_format in FORMATS:
        found = missing(recorded_step("murgolo-improved", number_format, OPTIONS[1]).seen)
        assert found == ([told] if number_format == HALF else [])


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        ("histc", HALF),  # torch's table has it for others
        ("_convert_weight_to_int4pack_for_cpu", torch.int32),  # no table has it
        ("_amp_update_scale_", torch.float64),  # no such kernel in the library
        ("cholesky_inverse", torch.float16),
    ],
)
def test_what_cuda_lacks(operation, dtype):
    assert not cuda_has(f"aten::{operation}", dtype)


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (lambda x: x.sum().item(), "_local_scalar_dense"),
        (lambda x: bool((x > 0).any()), "_local_scalar_dense"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.masked_select(x > 0), "masked_select"),
        (lambda x: x * torch.tensor([1.0, 2.0]), "lift_fresh"),
        (lambda x: x.long().abs().bincount(), "bincount"),
    ],
)
def test_what_a_capture_does_not_allow_is_seen(work, name):
    with Recorder() as recorder:
        work(torch.randn(2))
    assert f"aten::{name}" in recorder.uncaptured
