"""A kernel that costs the process its GPU ends what would go on after a refusal."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from fake_cuda import FakeCuda
from test_conv_measurement import layer_of

from fastcnn.bench.data_rate import Rates
from fastcnn.bench.kernels import conv_layers, interleaved
from fastcnn.bench.kernels.cases import Case
from fastcnn.bench.steps import Steps
from fastcnn.errors import CheckpointError
from fastcnn.ops.conv_autotune import measurement as plan_measure
from fastcnn.ops.gpu_faults import GpuError, require_alive
from fastcnn.train import distributed
from fastcnn.train.graph import CudaRecorder, Replay
from fastcnn.train.loop import Training

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ILLEGAL = "CUDA error: an illegal memory access was encountered\nSearch for `cudaErrorIllegal"
HUNG = "CUDA error: the launch timed out and was terminated"


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


def failing(*_, **__):
    raise RuntimeError(ILLEGAL)


def measured():
    return plan_measure.measure(layer_of(), GPU).note  # its tensors ask for a GPU, which fails


def captured():
    replay = Replay(CudaRecorder(GPU), warm_up=0)
    broken = [failing]
    replay.run("kind", lambda: broken.pop()() if broken else None)
    return replay.note


def compared():
    return conv_layers._refused({"eager": failing}, failing, GPU)["eager"]


def viewed():
    layers = SimpleNamespace(training=layer_of(), inference=layer_of(), name="conv1")
    _, _, wrong = conv_layers.measured_parts(layers, None, GPU, 1)
    return wrong[0]["why"]


def checked(monkeypatch):
    inputs = SimpleNamespace(to=lambda dtype: None)
    monkeypatch.setattr(interleaved, "make_inputs", lambda *_: inputs)
    monkeypatch.setattr(interleaved, "results_of", lambda function, inputs: function and function())
    monkeypatch.setattr(interleaved, "function_of", lambda *_: None)
    return interleaved.check(Case("bn_act", (1, 1, 1, 1)), {"ours": failing}, torch.float32, GPU)[
        "ours"
    ]


def prepared(monkeypatch):
    monkeypatch.setattr("fastcnn.bench.steps.release", lambda device: None)
    task = SimpleNamespace(budget_s=None)
    steps = SimpleNamespace(task=task, wrong={}, device=GPU, _prepared=failing)
    Steps._add(steps, "fused")
    return steps.wrong["fused"]


def judged(monkeypatch):
    for name, fake in {"Workbench": lambda task: None, "Check": failing}.items():
        monkeypatch.setattr(f"fastcnn.bench.steps.{name}", fake)
    monkeypatch.setattr("fastcnn.bench.steps.release", lambda device: None)
    task = SimpleNamespace(device="cuda", inference=False, check=True, backends=["fused"])
    return Steps(task).wrong["fused"]


def fed():
    rates = SimpleNamespace(device=GPU, note="")
    plain = SimpleNamespace(step=None)
    bench = SimpleNamespace(variant=lambda name, augment: failing() if name == "graph" else plain)
    Rates._step(rates, bench)
    return rates.note


def gone_on():
    setup = SimpleNamespace(device=GPU)
    try:
        Training.restore(SimpleNamespace(setup=setup, _restore=failing), {}, "last.pt")
    except CheckpointError as error:
        return str(error)


CATCHERS = [measured, captured, compared, viewed, checked, judged, prepared, fed, gone_on]


@pytest.mark.parametrize("catcher", CATCHERS, ids=lambda f: f.__name__)
def test_where_an_error_is_taken_for_a_refusal_a_lost_gpu_is_not(cuda, monkeypatch, catcher):
    monkeypatch.setattr(plan_measure, "draw", failing)
    monkeypatch.setattr("fastcnn.ops.conv_autotune.decision_for", lambda layer, device: None)
    given = (monkeypatch,) * (catcher.__code__.co_argcount)
    assert "illegal memory access" in catcher(*given)
    cuda.lost = ILLEGAL
    with pytest.raises(GpuError, match=r"a kernel has failed on cuda, .*: start again with CUDA_"):
        catcher(*given)


@pytest.mark.parametrize(
    ("catcher", "doing"),
    [
        (measured, "measuring convolution bfloat16 2x7x6x8 by 12x3x3 stride 1 "),
        (captured, "capturing a CUDA graph: "),
    ],
)
def test_what_failed_and_what_does_without_it_are_named_in_a_line(cuda, catcher, doing):
    cuda.lost = ILLEGAL
    with pytest.raises(GpuError) as raised:
        catcher()
    assert str(raised.value).startswith(doing)
    assert "(CUDA error: an illegal memory access was encountered): start" in str(raised.value)
    assert str(raised.value).endswith("which shows the kernel, or with --conv vendor")


LOST = """
import torch
from fastcnn.ops.gpu_faults import GpuError
from fastcnn.train.graph import CudaRecorder
recorder = CudaRecorder(torch.device("cuda"))
torch.zeros(3, device="cuda")[torch.tensor([5], device="cuda")]  # an assertion in a kernel
try:
    recorder.capture(lambda: None)
except GpuError as error:
    print(error)
"""


@pytest.mark.cuda
def test_a_gpu_says_itself_that_it_is_lost():
    command = [sys.executable, "-c", LOST]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "which takes no more work of this process (CUDA error: device-side" in ended.stdout


def test_nothing_waits_for_a_gpu_on_a_cpu(cuda):
    cuda.lost = ILLEGAL
    require_alive(CPU, RuntimeError("a refusal"), "anything")


def test_a_gpu_that_hangs_is_not_another_rank_that_is_out_of_reach(monkeypatch):
    monkeypatch.setattr(distributed, "launched", lambda: distributed.Distributed(0, 2))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.Distributed, "all_gather_object", lambda self, value: [])
    monkeypatch.setattr(distributed.Distributed, "gone", lambda self: "")
    for error, raised in (
        (torch.AcceleratorError(HUNG), torch.AcceleratorError),
        (RuntimeError("gloo: connection timed out"), distributed.ProcessLost),
    ):
        with pytest.raises(raised), distributed.joined():
            raise error
