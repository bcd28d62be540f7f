"""The convolution's kernels on a GPU: values, gradients, streams, graphs, whole networks.

Judged by fp64 on the CPU: at most twice torch's own error in the same dtype, and a rounding unit.
"""

import pytest
import torch
from conv_cases import ConvCase, gradients, input_in_torch, pending_of, product_in_torch, tensors_of
from torch.nn import functional as F

from fastcnn import ops
from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.ops import conv_autotune, reference
from fastcnn.train.numerics.half import half_network

pytestmark = pytest.mark.cuda
DEVICE = "cuda"
LIBRARY = torch.ops.fastcnn
DTYPES = [torch.float16, torch.bfloat16]
SAME_BITS = {"rtol": 0, "atol": 0}
GEOMETRIES = [
    ((4, 3, 32, 32), 64, (3, 3), 1, (1, 1, 1, 1)),
    ((4, 64, 32, 32), 64, (3, 3), 1, (1, 1, 1, 1)),
    ((4, 64, 16, 16), 128, (3, 3), 2, (1, 1, 1, 1)),
    ((4, 64, 16, 16), 128, (1, 1), 2, (0, 0, 0, 0)),
    ((7, 24, 9, 7), 100, (2, 2), 1, (0, 1, 0, 1)),
    ((2, 17, 11, 6), 65, (4, 3), 2, (1, 2, 0, 1)),
    ((5, 1, 8, 8), 1, (5, 5), 1, (2, 2, 2, 2)),
    ((3, 512, 4, 4), 512, (3, 3), 1, (1, 1, 1, 1)),
    ((7, 8, 1, 1), 16, (1, 1), 1, (0, 0, 0, 0)),
]
CASES = [ConvCase(*g, pending) for g in GEOMETRIES for pending in ("plain", "norm", "eval", "bias")]
OWN = (True, True)


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def conv(case, t, stats_slope=None):
    pending = pending_of(case, t)
    given = (t["filter"], t["bias"], *pending[1:], case.stride, case.pads, stats_slope, *OWN)
    return LIBRARY.conv(pending.x, *given)


def conv_pool(case, t):
    pending = pending_of(case, t)
    given = (t["filter"], t["bias"], *pending[1:], 0.1, case.stride, case.pads, *OWN)
    return LIBRARY.conv_bias_act_pool(pending.x, *given)[0]


def torchs(case, t):
    bias = t["bias"].to(t["x"].dtype)
    return reference.product(input_in_torch(case, t), t["filter"], bias, case.stride, case.pads)


def pooled(y):
    return F.max_pool2d(F.leaky_relu(y, 0.1), 2)


def on_device(tensors):
    return {name: value.to(DEVICE) for name, value in tensors.items()}


def exact(tensors):
    return {name: value.double() for name, value in tensors.items()}


def check(case, t, ours, plain, true):
    truth = gradients(case, true, exact(t))
    got, torchs_own = (gradients(case, call, on_device(t)) for call in (ours, plain))
    for name, want in truth.items():
        largest = want.abs().max()
        if name == "dx":  # of terms as large as dy, which nearly cancel through a norm
            largest = torch.maximum(largest, t["dy"].abs().max())
        unit = torch.finfo(t["x"].dtype).eps * largest
        error, allowed = ((g[name].cpu() - want).abs().max() for g in (got, torchs_own))
        assert error <= 2 * allowed + unit, f"{name}: {error:.3g}, torch {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_errs_at_most_twice_as_much_as_torch(case, dtype):
    t = tensors_of(case, dtype)
    check(
        *(case, t, lambda t: conv(case, t)[0], lambda t: torchs(case, t)),
        lambda t: product_in_torch(case, t),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in CASES if min(c.result[2:]) > 1], ids=str)
def test_conv_bias_act_pool_errs_at_most_twice_as_much_as_torch(case, dtype):
    t = tensors_of(case, dtype)
    t["dy"] = torch.randn_like(pooled(t["dy"].double())).to(dtype)

    truth = gradients(case, lambda t: pooled(product_in_torch(case, t)), exact(t))
    got = gradients(case, lambda t: conv_pool(case, t), on_device(t))
    plain = gradients(case, lambda t: pooled(torchs(case, t)), on_device(t))
    for name, true in truth.items():
        # in the mean: rounding makes another value the winner of a window, here and with torch
        error, allowed = ((g[name].cpu() - true).norm() for g in (got, plain))
        assert error <= 2 * allowed + 4 * torch.finfo(dtype).eps * true.norm(), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_statistics_are_those_of_a_pass_over_the_result(case, dtype):
    y, partials = conv(case, on_device(tensors_of(case, dtype)), stats_slope=0.3)
    running = [torch.zeros(case.k, device=DEVICE), torch.ones(case.k, device=DEVICE)]
    count = y.numel() // case.k
    got = LIBRARY.bn_stats_merge(partials, count, *running, 0.3, 1e-3)
    values = F.leaky_relu(y.double(), 0.3).transpose(0, 1).reshape(case.k, -1)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(got[0], values.mean(1), **close)
    rstd = (values.var(1, correction=0) + 1e-3).rsqrt()
    torch.testing.assert_close(got[1], rstd, **close)
    torch.testing.assert_close(running[0], 0.3 * values.mean(1), **close)


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", GEOMETRIES[:-1], ids=str)
def test_conv_affine_act_errs_at_most_twice_as_much_as_torch(geometry, dtype, pool):
    case = ConvCase(*geometry)
    t = tensors_of(case, dtype)
    t["scale"], t["shift"] = 0.5 + t["bias"].abs(), t["bias"] + 1

    def plain(t):
        y = F.leaky_relu(torchs(case, t), 0.3)
        wide = t["scale"].view(-1, 1, 1) * y + t["shift"].view(-1, 1, 1)
        y = F.leaky_relu(wide if pool else wide + t["dy"], 0.1).to(t["x"].dtype)
        return F.max_pool2d(y, 2) if pool else y

    ours = on_device(t)
    residual = None if pool else ours["dy"]
    given = [ours[name] for name in ("filter", "bias", "scale", "shift")]
    rest = (residual, 0.3, 0.1, case.stride, case.pads, pool)
    got = LIBRARY.conv_affine_act(ours["x"], *given, *rest)
    truth = plain(exact(t))
    error, allowed = ((y.cpu() - truth).abs().max() for y in (got, plain(ours)))
    assert error <= 2 * allowed + torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("case", CASES[4:8], ids=str)
def test_repeats_are_bit_equal(case):
    t = on_device(tensors_of(case, torch.bfloat16))
    first = gradients(case, lambda t: conv(case, t)[0], t)
    for _ in range(20):
        again = gradients(case, lambda t: conv(case, t)[0], t)
        torch.testing.assert_close(again, first, **SAME_BITS)


@pytest.mark.parametrize("case", CASES[4:8], ids=str)
def test_side_stream(case):
    t = on_device(tensors_of(case, torch.bfloat16))
    want = gradients(case, lambda t: conv(case, t)[0], t)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # work that is still under way when the op is called: another stream would not wait for it
        slow = {n: v.clone(memory_format=torch.preserve_format) for n, v in t.items()}
        slow["x"].zero_()
        torch.cuda._sleep(20_000_000)
        slow["x"].copy_(t["x"])
        got = gradients(case, lambda t: conv(case, t)[0], slow)
    stream.synchronize()
    torch.testing.assert_close(got, want, **SAME_BITS)


@pytest.mark.parametrize("case", CASES[4:8], ids=str)
def test_captured_in_a_graph_without_waiting(case):
    t = on_device(tensors_of(case, torch.bfloat16))
    want = gradients(case, lambda t: conv(case, t)[0], t)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            gradients(case, lambda t: conv(case, t)[0], t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(case, lambda t: conv(case, t)[0], t)
    for result in got.values():
        result.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(got, want, **SAME_BITS)


def test_arguments_that_do_not_fit():
    case = ConvCase(*GEOMETRIES[1])
    t = on_device(tensors_of(case, torch.float16))
    wrong = {
        "x": (t["x"].float(), "x: expected float16 or bfloat16 on a GPU"),
        "filter": (t["filter"].contiguous(), "filter: expected channels-last memory"),
        "bias": (t["bias"].cpu(), "bias: expected the device of x"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            conv(case, t | {name: value})
    large = ConvCase((1, 648, 4, 4), 8, pending="norm")
    with pytest.raises(RuntimeError, match="at most 640 channels of a pending input, got 648"):
        conv(large, on_device(tensors_of(large, torch.float16)))


def test_no_images():
    case = ConvCase((0, 3, 8, 8), 16)
    t = on_device(tensors_of(case, torch.float16))
    got = gradients(case, lambda t: conv(case, t)[0], t)
    assert not any(g.any() for g in got.values())


def step(model, x, labels):
    torch.manual_seed(1)  # dropout
    logits = model(x).double()
    gradients = torch.autograd.grad(F.cross_entropy(logits, labels), list(model.parameters()))
    buffers = [b.clone() for n, b in model.named_buffers() if n.endswith(("mean", "var"))]
    return [logits.detach(), *gradients, *buffers]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["cnn-b", "mao-batchnorm", "tiny-d", "vgg13", "resnet18"])
def test_networks_err_at_most_twice_as_much_as_torch(name, dtype, monkeypatch):
    monkeypatch.setattr(conv_autotune, "plan_for", lambda *a, **k: conv_autotune.FUSED)
    monkeypatch.setattr(conv_autotune, "may_defer", lambda x: True)
    network = NETWORKS[name]
    size = network.image_sizes[0]
    found = []
    for backend in ("fused", "torch", "torch"):
        model = build(network, size, 10, backend)
        initialise(model, "he", torch.Generator().manual_seed(0))
        model = model.to(DEVICE)
        torch.manual_seed(0)
        x = torch.randn(16, 3, size, size).to(DEVICE, memory_format=torch.channels_last)
        if len(found) < 2:
            model, x = half_network(model, dtype)[0], x.to(dtype)
        else:
            model, x = model.double(), x.double()
        found.append(step(model, x, torch.arange(16, device=DEVICE) % 10))
    for ours, plain, true in zip(*found, strict=True):
        error, allowed = ((g.double() - true).norm() for g in (ours, plain))
        assert error <= 2 * allowed + 1e-2 * true.norm()


@pytest.mark.parametrize("name", ["conv", "conv_data_gradient", "conv_weight_gradient"])
def test_opcheck(name):
    case = ConvCase(*GEOMETRIES[4], "norm")
    t = on_device(tensors_of(case, torch.float16))
    x, *block = pending_of(case, t)
    geometry = (case.stride, list(case.pads))
    arguments = {
        "conv": (x, t["filter"], t["bias"], *block, *geometry, 0.2, True, True),
        "conv_data_gradient": (t["dy"], t["filter"], x, *block, *geometry),
        "conv_weight_gradient": (t["dy"], x, *block, 2, 2, *geometry),
    }[name]
    torch.library.opcheck(getattr(LIBRARY, name).default, arguments)


def test_two_ways_of_a_layer_agree():
    case = ConvCase(*GEOMETRIES[1])
    t = on_device(tensors_of(case, torch.float16))
    running = [torch.zeros(64, device=DEVICE), torch.ones(64, device=DEVICE)]
    weight, bias = t["bias"].abs() + 0.5, t["bias"]
    results = []
    for plan in (conv_autotune.VENDOR, conv_autotune.FUSED):
        moved = [r.clone() for r in running]
        y = ops.conv_bn_act(
            *(t["x"], t["filter"], None, weight, bias, *moved, True),
            **{"post_slope": 0.0, "pads": case.pads, "pool": (2, 2, 0), "plan": plan},
        )
        results.append((y, moved))
    torch.testing.assert_close(*results, rtol=2e-2, atol=2e-2)
