"""The measurement behind a plan: on CPU tensors, where the fused ops are composites of torch's."""

import itertools

import pytest
import torch

from fastcnn.archs import get_network
from fastcnn.archs.build import build
from fastcnn.archs.layers import ConvNormAct
from fastcnn.ops import conv_autotune, conv_composites
from fastcnn.ops.conv_autotune import measurement as plan_measure
from fastcnn.ops.conv_autotune import plan_cache
from fastcnn.ops.conv_autotune.measurement import ConvLayer, measure
from fastcnn.train.numerics.half import half_network

CPU = torch.device("cpu")
KINDS = ("bn", "bias", "bias-pool")
INFERENCE = ("inference", "inference-pool")


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def layer_of(kind="bn", pending=False, training=True, dtype=torch.bfloat16, **other):
    sizes = (dtype, 2, 7, 6, 8, 12, 3, 3, 1, (1, 1, 1, 1))
    return ConvLayer(*sizes, kind, pending, training, True, False)._replace(**other)


class Ticks:
    """A clock that says what it is told of a function by name, and counts."""

    def __init__(self, **seconds):
        self.seconds, self.order = seconds, []

    def __call__(self, function, calls):
        function()
        name = f"{type(function.__self__).__name__}.{function.__name__}"
        self.order.append((name, calls))
        return self.seconds.get(name, 2e-3)


CASES = [
    *(layer_of(kind, pending) for kind, pending in itertools.product(KINDS, (False, True))),
    *(layer_of(kind, training=False) for kind in (*KINDS, *INFERENCE)),
    layer_of("bn", True, with_bias=True),
    layer_of("bn", True, r=2, s=2, pads=(0, 1, 0, 1)),
    layer_of("bias", True, r=2, s=1, pads=(1, 0, 0, 0)),
    layer_of("bn", True, r=1, s=1, stride=2, pads=(0, 0, 0, 0)),
    layer_of("bn", True, h=9, r=5, s=5, stride=2, pads=(2, 2, 2, 2)),
    layer_of("bn", c=3, k=1, wants_data_gradient=False),
    layer_of("bias-pool", c=17, k=65),
    layer_of("bn", True, dtype=torch.float32),
]


@pytest.mark.parametrize("layer", CASES, ids=str)
def test_every_kind_of_layer_is_measured_and_the_composites_agree(layer):
    measured = measure(layer, CPU)
    assert measured.note == ""
    assert measured.times["forward"].keys() == {"vendor", "fused"}
    assert ("data_gradient" in measured.times) == (layer.training and layer.wants_data_gradient)
    assert ("weight_gradient" in measured.times) == layer.training
    if layer.training:
        recomputed = {"recomputed"} if layer.pending else set()
        assert measured.times["weight_gradient"].keys() == {"vendor", "fused"} | recomputed
    assert all(value > 0 for part in measured.times.values() for value in part.values())
    # a file must give back what plans wants
    assert conv_autotune._times_of({"times": measured.times}, layer) == measured.times
    conv_autotune.plan_of(measured.times)


def test_the_shape_of_the_result_is_torchs():
    for layer in CASES:
        t = plan_measure.draw(layer, CPU)
        (y, *_) = plan_measure.Vendor(layer._replace(kind="bias"), t).forward()
        assert y.shape == t.dy.shape == (layer.n, layer.k, *layer.pixels)


def test_everything_is_timed_in_turn_and_medians_are_told():
    clock = Ticks(**{"Fused.forward": 0.5e-3})
    times = measure(layer_of("bias"), CPU, clock).times
    assert times["forward"] == {"vendor": 2e-3, "fused": 0.5e-3}
    assert conv_autotune.plan_of(times) == conv_autotune.Plan("fused", "vendor", "vendor")
    names = [name for name, _ in clock.order]
    a_round = [
        *("Vendor.forward", "Fused.forward", "Vendor.data_gradient", "Fused.data_gradient"),
        *("Vendor.weight_gradient", "Fused.weight_gradient"),
    ]
    assert names == a_round * (1 + plan_measure.ROUNDS)  # one to learn how long a call takes
    # a millisecond of calls, at least one
    assert dict(clock.order[6:]) == dict.fromkeys(a_round, 1) | {"Fused.forward": 2}


def test_a_call_is_repeated_no_more_often_than_the_launch_queue_takes():
    clock = Ticks(**{"Fused.forward": 1e-9})
    measure(layer_of("bias"), CPU, clock)
    assert max(calls for _, calls in clock.order) == plan_measure.MOST_CALLS


def wrong(op, change):
    """Return the call of the composite `op` with one of its results changed."""
    right = getattr(conv_composites, f"_{op}")

    def call(*arguments):
        found = right(*arguments)
        return change(found)

    return call


WRONG = {
    "forward": ("conv", lambda found: (found[0] * 1.1, found[1])),
    "data_gradient": ("conv_data_gradient", lambda f: (f[0].roll(1, 2), *f[1:])),
    "weight_gradient": ("conv_weight_gradient", lambda found: found.roll(1, 3)),
}


class Ops:
    """torch.ops.fastcnn with one op changed."""

    def __init__(self, op, call):
        self._op, self._call, self._ops = op, call, torch.ops.fastcnn

    def __getattr__(self, name):
        return self._call if name == self._op else getattr(self._ops, name)


def with_op(monkeypatch, op, call):
    monkeypatch.setattr(torch.ops, "fastcnn", Ops(op, call))


@pytest.mark.parametrize("part", WRONG)
def test_numbers_that_are_off_are_found_before_anything_is_timed(monkeypatch, part):
    op, change = WRONG[part]
    with_op(monkeypatch, op, wrong(op, change))
    clock = Ticks()
    measured = measure(layer_of("bn", True), CPU, clock)
    assert measured.note.startswith(f"{part}: fused is off by ")
    assert (measured.times, clock.order) == ({}, [])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_off(monkeypatch, value):
    def spoil(found):
        found[0][0, 0, 0, 0] = value
        return found

    with_op(monkeypatch, "conv", wrong("conv", spoil))
    assert "fused is off" in measure(layer_of("bias"), CPU).note


@pytest.mark.parametrize("index", [0, 1])
def test_statistics_that_are_off_are_found(monkeypatch, index):
    def merge(*arguments):
        found = list(torch.ops.fastcnn._ops.bn_stats_merge(*arguments))
        found[index] = found[index] + 0.1
        return tuple(found)

    with_op(monkeypatch, "bn_stats_merge", merge)
    assert measure(layer_of("bn"), CPU).note.startswith("forward: fused is off by ")


@pytest.mark.parametrize(
    ("error", "note"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "too little memory to measure it in"),
        (RuntimeError("conv: no kernel\nmore"), "cannot be measured: conv: no kernel"),
    ],
)
def test_what_cannot_be_measured_is_a_note(monkeypatch, error, note):
    def fail(*_):
        raise error

    with_op(monkeypatch, "conv", fail)
    assert measure(layer_of("bn"), CPU).note == note


def test_nothing_is_left_of_a_measurement(monkeypatch):
    state, seen = torch.get_rng_state(), []
    conv = torch.ops.fastcnn.conv

    def note(*arguments):
        settings = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        seen.append((*settings, torch.backends.cudnn.benchmark))
        return conv(*arguments)

    with_op(monkeypatch, "conv", note)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measure(layer_of("bn", dtype=torch.float32), CPU).note == ""
        assert torch.is_autocast_enabled("cpu")
    assert set(seen) == {(False, False, True)}
    assert torch.is_grad_enabled()
    assert not torch.backends.cudnn.benchmark
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def measured_on_the_cpu(monkeypatch, tmp_path):
    """CPU tensors in half precision count as those of a GPU; the file of their measurements."""
    path = plan_cache.file_of(tmp_path, {})
    planner = conv_autotune.Planner(CPU, path, {})
    monkeypatch.setattr(conv_autotune, "why_vendor", lambda device, dtype: "")
    monkeypatch.setattr(conv_autotune, "_can_be_fused", lambda x: x.dtype in conv_autotune.HALVES)
    monkeypatch.setattr(conv_autotune, "_takes", lambda *shape: True)
    monkeypatch.setattr(conv_autotune, "_planner_of", lambda device: planner)
    yield path
    conv_autotune.set_mode("auto")


@pytest.mark.parametrize("name", ["mao-batchnorm", "cnn-a"])
def test_a_network_is_measured_in_its_first_step_and_trains_alike(measured_on_the_cpu, name):
    network = get_network(name)
    model = build(network, 32, 10, "fused")
    for layer in model.modules():
        if hasattr(layer, "dropout"):
            layer.dropout = 0.0
    model, _ = half_network(model, torch.bfloat16)
    x = torch.randn(4, 3, 32, 32).bfloat16().to(memory_format=torch.channels_last)

    def gradients():
        with conv_autotune.noted() as taken:
            y = model(x)
        return taken, torch.autograd.grad(y.float().square().mean(), list(model.parameters()))

    taken, _ = gradients()
    convolutions = sum(isinstance(layer, ConvNormAct) for layer in model.modules())
    assert len(taken) == convolutions
    known = plan_cache.read(measured_on_the_cpu)
    assert len(known) == len(set(known)) > 0
    again, _ = gradients()
    assert again == taken
    assert plan_cache.read(measured_on_the_cpu) == known
    results = {}
    for mode in ("vendor", "fused"):
        conv_autotune.set_mode(mode)
        noted, results[mode] = gradients()
        assert {plan.forward for plan in noted} == {mode}
    for vendor, fused in zip(results["vendor"], results["fused"], strict=True):
        # a max-pool of values that rounding has made equal may choose another of them
        assert (fused - vendor).float().norm() <= 0.1 * vendor.float().norm() + 1e-6


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", conv_autotune.HALVES)
@pytest.mark.parametrize("layer", [case for case in CASES if case.dtype != torch.float32], ids=str)
def test_on_a_gpu_the_kernels_agree_and_memory_is_given_back(layer, dtype):
    device = torch.device("cuda", 0)
    state = torch.cuda.get_rng_state(device)
    before = torch.cuda.memory_allocated(device)
    measured = measure(layer._replace(dtype=dtype), device)
    assert measured.note == ""
    assert torch.cuda.memory_allocated(device) == before
    assert torch.equal(torch.cuda.get_rng_state(device), state)


@pytest.mark.cuda
def test_on_a_gpu_a_clock_times_the_device_and_not_the_host():
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    clock = plan_measure.DeviceClock(a.device)
    clock(lambda: a @ a, 1)
    one, ten = clock(lambda: a @ a, 10), clock(lambda: [a @ a for _ in range(10)], 1)
    assert ten == pytest.approx(10 * one, rel=0.3)
