"""Batch norm over several processes (gloo, CPU): the whole batch's in one, in values and gradients.

across_cases.py holds the cases and the program whose processes run them, once for this file.
"""

import copy
import os
import subprocess
import sys

import across_cases
import pytest
import torch
import torch.distributed as dist
from across_cases import BY_IMAGE, CASES, DTYPES, EXTREMES, MODULES, NETWORK_SHARDS, PLANTS
from conftest import TOLERANCE
from op_cases import DEVICES, ON_EACH, SAME_BITS, Case, kinds, run, tensors_of
from torch import nn

from fastcnn import ops
from fastcnn.archs.layers import ConvNormAct, synchronise
from fastcnn.archs.spec import Conv
from fastcnn.ops import conv_autotune, reference

DOUBLE = TOLERANCE[torch.float64]


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.fixture(scope="module")
def found(library, tmp_path_factory):
    """What the processes have found, by rank."""
    folder = tmp_path_factory.mktemp("across")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, across_cases.__file__, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(across_cases.RANKS)]


def joined(parts):
    """The results of all processes as those of one: images one after the other, sums added up."""
    whole = {}
    for name, first in parts[0].items():
        each = [part[name] for part in parts]
        if name in BY_IMAGE:
            whole[name] = torch.cat(each)
        elif "running" in name:
            for other in each[1:]:  # to the bit, so that they never drift apart
                torch.testing.assert_close(other, first, **SAME_BITS)
            whole[name] = first
        else:
            whole[name] = torch.stack(each).sum(0)
    return whole


def whole_batch(sharded, dtype):
    """torch.nn.functional.batch_norm on all images, in fp64 and in dtype."""
    t = sharded.tensors(dtype)
    wide = {name: value.double() for name, value in t.items()}
    return run(reference, sharded.case, wide), run(reference, sharded.case, t)


def parts_of(found, sharded, key):
    return [found[rank][key] for rank in range(len(sharded.shards))]


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("sharded", [*CASES, *EXTREMES], ids=str)
def test_processes_together_are_one(found, sharded, backend):
    got = joined(parts_of(found, sharded, f"{backend} {torch.float64} {sharded}"))
    truth, _ = whole_batch(sharded, torch.float64)
    assert got.keys() == truth.keys()
    size = 1 + sharded.mean  # of what is rounded
    close = {name: size * value for name, value in DOUBLE.items()}
    torch.testing.assert_close(got, truth, **close)


@pytest.mark.parametrize("backend", MODULES)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("sharded", CASES, ids=str)
def test_errs_at_most_twice_as_much_as_one_process(found, sharded, dtype, backend):
    got = joined(parts_of(found, sharded, f"{backend} {dtype} {sharded}"))
    truth, plain = whole_batch(sharded, dtype)
    dy = sharded.tensors(dtype)["dy"].abs().max()
    for name, true in truth.items():
        assert got[name].dtype == plain[name].dtype
        largest = true.abs().max()
        if name == "dx" and sharded.case.training:
            largest = torch.maximum(largest, dy)  # as in test_ops.py
        unit = torch.finfo(got[name].dtype).eps * largest
        error, torchs = ((each[name] - true).abs().max() for each in (got, plain))
        assert error <= 2 * torchs + unit, f"{name}: {error:.3g}, one process {torchs:.3g}"


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_error_is_seen(found, plant):
    """Counts and sums of this process in place of all; means of what has unequal counts."""
    planted = across_cases.PLANTED
    truth, _ = whole_batch(planted, torch.float64)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            joined(parts_of(found, planted, plant)), truth, rtol=0, atol=0.01
        )


@pytest.mark.parametrize("backend", MODULES)
def test_one_value_of_all_processes_is_an_error_on_each(found, backend):
    for part in found[:2]:
        assert "more than 1 value per channel when training" in part[f"{backend} one value"]


@pytest.mark.parametrize("key", ["fused network", "torch network", "everything fused"])
def test_a_network_over_processes(found, key):
    """Plans and deferring as with --conv fused ("everything fused") do not reach such layers."""
    model, images = across_cases.network_and_images("torch")
    truth = across_cases.step(model, images, across_cases.LABELS)
    got = joined([part[key] for part in found[: len(NETWORK_SHARDS)]])
    assert got.keys() == truth.keys()
    torch.testing.assert_close(got, truth, rtol=1e-9, atol=1e-9)


# one process


@pytest.fixture
def alone(tmp_path):
    """A group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_group_of_one(alone, module):
    for case in kinds((3, 17, 6, 5), 0.2, 0.1):
        if case.norm:
            t = tensors_of(case, torch.float64)
            got = run(module, case, t, lambda *given: across_cases.call(*given, across=alone))
            torch.testing.assert_close(got, run(reference, case, t), **DOUBLE)
    case = Case((1, 3))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        across_cases.call(module, case, tensors_of(case, torch.float32), alone)


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_compiled(alone, module):
    """A gradient that tracing loses: see reference.norm_across._summed."""
    case = Case((3, 8, 4, 4), pre_slope=0.2, post_slope=0.1, residual=True)

    def over(*given):
        return across_cases.call(*given, across=alone)

    t = tensors_of(case, torch.float32)
    want = run(module, case, t, over)
    got = run(module, case, t, torch.compile(over, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.compiler.reset()


def test_second_derivative_is_refused(alone):
    for pool in (None, (2, 2, 0)):
        case = Case((2, 3, 4, 4), pool=pool)
        t = tensors_of(case, torch.float64)
        x = t["x"].requires_grad_()
        y = across_cases.call(ops, case, t, alone)
        with pytest.raises(RuntimeError, match="fastcnn ops have no second derivative"):
            torch.autograd.grad(y.sum(), x, create_graph=True)


def test_without_a_group_nothing_is_exchanged(monkeypatch):
    """across=None and evaluation: the ops as they are, and no process group is needed."""
    monkeypatch.setattr("fastcnn.ops.norm_across._statistics", None)
    monkeypatch.setattr("fastcnn.ops.reference.batch_norm_across", None)
    for module in MODULES.values():
        for case, across in (
            (Case((2, 3, 4, 4)), None),
            (Case((2, 3, 4, 4), training=False), "no"),
        ):
            t = tensors_of(case, torch.float32)
            got = run(module, case, t, lambda *given, a=across: across_cases.call(*given, across=a))
            torch.testing.assert_close(got, run(module, case, t), **SAME_BITS)


# the two parts of a backward


def parts_and_whole(case, dtype, device):
    """dx, dweight, dbias and, with a residual, its gradient: by the parts, and by one op."""
    fastcnn = torch.ops.fastcnn
    t = tensors_of(case, dtype, device)
    x, dy, weight, bias = (t[name] for name in ("x", "dy", "weight", "bias"))
    settings = (case.pre_slope, case.post_slope)
    statistics = (t["running_mean"], t["running_var"], True, 0.1, 1e-5, case.pre_slope)
    norm = (*fastcnn.bn_stats(x, *statistics), weight, bias)
    if case.pool:
        settings = (*settings, *case.pool)
        _, code = fastcnn.bn_act_pool(x, *norm, True, *settings)
        given = (dy, code, x, *norm[:3])
        dweight, dbias = fastcnn.bn_act_pool_backward_sums(*given, *settings)
        dx = fastcnn.bn_act_pool_backward_apply(*given, dweight, dbias, *settings)
        return (dx, dweight, dbias), fastcnn.bn_act_pool_backward(*given, True, *settings)
    residual = t.get("residual")
    y = fastcnn.bn_act(x, *norm, residual, True, *settings)
    given = (dy, x, None if residual is None else y, *norm)
    dweight, dbias = fastcnn.bn_act_backward_sums(*given, *settings)
    dx, dresidual = fastcnn.bn_act_backward_apply(*given, dweight, dbias, *settings)
    whole = fastcnn.bn_act_backward(*given, True, *settings)
    return (dx, dweight, dbias, dresidual), whole


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
def test_the_parts_have_the_bits_of_the_whole(device, dtype):
    for shape in [(5, 65, 17, 9), (3, 32, 8, 8), (7, 100), (0, 6, 5, 5)]:
        for case in kinds(shape, 0.2, 0.1):
            if case.norm and case.training:
                parts, whole = parts_and_whole(case, dtype, device)
                torch.testing.assert_close(parts, whole, **SAME_BITS)


@pytest.mark.parametrize("device", DEVICES)
def test_arguments_of_the_parts_that_do_not_fit(device):
    case = Case((2, 3, 6, 6))
    t = tensors_of(case, torch.float32, device)
    norm = [t[name] for name in ("running_mean", "running_var", "weight", "bias")]
    sums, apply = torch.ops.fastcnn.bn_act_backward_sums, torch.ops.fastcnn.bn_act_backward_apply
    with pytest.raises(RuntimeError, match="dy: expected shape"):
        sums(t["dy"][:1], t["x"], None, *norm, 1.0, 0.0)
    with pytest.raises(RuntimeError, match="x: expected channels-last memory"):
        sums(t["dy"], t["x"].contiguous(), None, *norm, 1.0, 0.0)
    with pytest.raises(RuntimeError, match=r"dweight: expected contiguous \[3\], got \[2\]"):
        apply(t["dy"], t["x"], None, *norm, norm[0][:2], norm[0], 1.0, 0.0)
    with pytest.raises(RuntimeError, match="dbias: expected float32"):
        apply(t["dy"], t["x"], None, *norm, norm[0], norm[0].double(), 1.0, 0.0)
    code = torch.zeros_like(t["dy"][:, :, ::2, ::2], dtype=torch.uint8)
    given = (t["dy"], code, t["x"], *norm[:3])
    pool = (1.0, 0.0, 2, 2, 0)
    with pytest.raises(RuntimeError, match="code: expected uint8"):
        torch.ops.fastcnn.bn_act_pool_backward_sums(*given, *pool)
    given = (t["dy"], torch.zeros_like(t["dy"], dtype=torch.uint8), t["x"], *norm[:3])
    with pytest.raises(RuntimeError, match="dy: expected the pooled shape of x"):
        torch.ops.fastcnn.bn_act_pool_backward_apply(*given, *norm[:2], *pool)


# layers


def test_synchronise_reaches_every_norm_and_takes_itself_back(alone):
    model, _ = across_cases.network_and_images("torch")
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)]
    layers = [m for m in model.modules() if getattr(m, "norm", None) is not None]
    assert synchronise(model, alone) == len(norms) == len(layers) == 6
    assert all(layer.across.group is alone for layer in layers)
    assert model.conv3.across is None
    # averages and half-precision copies of a network are copied; the group cannot be
    twin = copy.deepcopy(model)
    assert twin.conv1.across.group is alone
    synchronise(model, None)
    assert all(layer.across is None for layer in layers)
    assert twin.conv1.across.group is alone


def test_a_layer_over_processes_is_never_left_to_the_next(alone, monkeypatch):
    monkeypatch.setattr(conv_autotune, "plan_for", lambda *a, **k: conv_autotune.FUSED)
    monkeypatch.setattr(conv_autotune, "may_defer", lambda x: True)
    layer = ConvNormAct(3, Conv(8, 3, norm=True, post_slope=0.0), "fused")
    layer = layer.to(memory_format=torch.channels_last)
    layer.defers = True
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    assert isinstance(layer(x), ops.Pending)
    synchronise(layer, alone)
    assert torch.is_tensor(layer(x))
    assert isinstance(layer.eval()(x), ops.Pending)
    norm = layer.norm
    arguments = (norm.weight, norm.bias, norm.running_mean, norm.running_var, True)
    for wrong in ({"defer": True}, {"plan": conv_autotune.FUSED}):
        with pytest.raises(ValueError, match="across: expected neither defer nor a fused plan"):
            ops.conv_bn_act(x, layer.conv.weight, None, *arguments, **wrong, across=alone)


# a GPU


@pytest.fixture
def nccl(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_torchs_synchronised_batch_norm(nccl, module, dtype):
    # the module takes plain batch norm in a group of one; its function does not
    from torch.nn.modules._functions import SyncBatchNorm

    case = Case((8, 24, 9, 7))

    def torchs(_, case, t):
        running = (t["running_mean"], t["running_var"])
        rest = (across_cases.EPS, across_cases.MOMENTUM, nccl, 1)
        return SyncBatchNorm.apply(t["x"], t["weight"], t["bias"], *running, *rest).relu()

    t = tensors_of(case, dtype, "cuda")
    truth = run(reference, case, {name: value.double() for name, value in t.items()})
    got = run(module, case, t, lambda *given: across_cases.call(*given, across=nccl))
    plain = run(module, case, t, torchs)
    for name, true in truth.items():
        largest = torch.maximum(true.abs().max(), t["dy"].abs().max())
        error, allowed = ((each[name] - true).abs().max() for each in (got, plain))
        assert error <= 2 * allowed + torch.finfo(got[name].dtype).eps * largest, name


@pytest.mark.cuda
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("pool", [None, (3, 2, 1)], ids=str)
def test_captured_in_a_graph_without_waiting(nccl, module, pool):
    case = Case((8, 24, 9, 7), pre_slope=0.2, post_slope=0.1, residual=pool is None, pool=pool)
    t = tensors_of(case, torch.bfloat16, "cuda")

    def over(*given):
        return across_cases.call(*given, across=nccl)

    want = run(module, case, t, over)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(module, case, t, over)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(module, case, t, over)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(module, case, t, over)
    for result in got.values():
        result.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(got, want, **SAME_BITS)
