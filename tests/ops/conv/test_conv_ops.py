"""The convolution's ops on the CPU against plain torch: values, gradients, what torch asks.

The composites that run here say what the kernels must compute; the gradients' formulas are the same
for both.
"""

import types

import pytest
import torch
from conftest import GRADCHECK, TOLERANCE
from conv_cases import (
    BOTH,
    CASES,
    EPS,
    GEOMETRIES,
    PENDING,
    ConvCase,
    Noted,
    gradients,
    input_in_torch,
    pending_of,
    product_in_torch,
    tensors_of,
)
from op_cases import SAME_BITS, wide
from torch.autograd.gradcheck import GradcheckError
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from fastcnn import ops
from fastcnn.ops import conv_composites, conv_library, reference, tracing

NAMES = [n for n in ops.OP_NAMES if n.startswith("conv") or n.endswith("_merge")]
LIBRARY = torch.ops.fastcnn
CLOSE = TOLERANCE[torch.float64]
SMALL = [ConvCase((2, 2, 3, 3), 2, pending=pending) for pending in PENDING]
SMALL += [ConvCase((1, 2, 5, 4), 2, (4, 3), 2, (1, 2, 0, 1), pending) for pending in PENDING]
SMALL += [ConvCase(*GEOMETRIES[1], pending) for pending in PENDING]


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def conv(case, t, own=(True, True), stats_slope=None):
    pending = pending_of(case, t)
    given = (t["filter"], t["bias"], *pending[1:], case.stride, case.pads, stats_slope, *own)
    return LIBRARY.conv(pending.x, *given)


def conv_pool(case, t, own=(True, True), slope=0.1):
    pending = pending_of(case, t)
    given = (t["filter"], t["bias"], *pending[1:], slope, case.stride, case.pads, *own)
    return LIBRARY.conv_bias_act_pool(pending.x, *given)


def pooled(y, slope=0.1):
    return F.max_pool2d(F.leaky_relu(y, slope), 2)


# values and gradients


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conv_is_torchs(case):
    t = tensors_of(case, torch.float64)
    want = gradients(case, lambda t: product_in_torch(case, t), t)
    for own in BOTH:
        got = gradients(case, lambda t, own=own: conv(case, t, own)[0], t)
        torch.testing.assert_close(got, want, **CLOSE)
        assert got["y"].is_contiguous(memory_format=torch.channels_last)
        assert got["dx"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", [c for c in CASES if min(c.result[2:]) >= 2], ids=str)
def test_conv_bias_act_pool_is_torchs(case):
    t = tensors_of(case, torch.float64)
    t["dy"] = torch.randn_like(pooled(t["dy"]))
    want = gradients(case, lambda t: pooled(product_in_torch(case, t)), t)
    for own in BOTH:
        got = gradients(case, lambda t, own=own: conv_pool(case, t, own)[0], t)
        torch.testing.assert_close(got, want, **CLOSE)


def torchs_product(case, t):
    # with torch's own padding: it takes another algorithm for a padded image
    bias = t["bias"].to(t["x"].dtype)
    return reference.product(input_in_torch(case, t), t["filter"], bias, case.stride, case.pads)


def shape_of(case):
    return (case.k, case.x[1], *case.kernel), case.stride, case.pads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_errs_at_most_twice_as_much_as_torch(case, dtype):
    """But where F(4x4, 3x3) computes in fp32: at most 5e-5 of the largest value."""
    takes = conv_composites.has_kernels(torch.empty(case.x, dtype=dtype), *shape_of(case))
    t = tensors_of(case, dtype)
    exact = {name: value.double() for name, value in t.items()}
    truth = gradients(case, lambda t: product_in_torch(case, t), exact)
    torchs = gradients(case, lambda t: torchs_product(case, t), t)
    ours = gradients(case, lambda t: conv(case, t)[0], t)
    for name, true in truth.items():
        assert ours[name].dtype == torchs[name].dtype
        largest = true.abs().max()
        if name == "dx":  # of terms as large as dy, which nearly cancel through a norm
            largest = torch.maximum(largest, t["dy"].abs().max())
        unit = 5e-5 * largest if takes else torch.finfo(dtype).eps * largest
        error, allowed = (ours[name] - true).abs().max(), 2 * (torchs[name] - true).abs().max()
        assert error <= allowed + unit, name
    # summed in fp32, where torch's is rounded
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours["dbias"].double(), truth["dbias"], **close)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_statistics_are_those_of_a_pass_over_the_result(case, dtype):
    y, partials = conv(case, tensors_of(case, dtype), stats_slope=0.3)
    assert partials.dtype == wide(dtype)
    statistics = [[torch.zeros(case.k), torch.ones(case.k)] for _ in range(2)]
    statistics = [[s.to(wide(dtype)) for s in pair] for pair in statistics]
    count = y.numel() // case.k
    got = LIBRARY.bn_stats_merge(partials, count, *statistics[0], 0.3, EPS)
    want = LIBRARY.bn_stats(y, *statistics[1], True, 0.3, EPS, 0.3)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.float64 else CLOSE
    if count == 1:
        statistics = [[pair[0]] for pair in statistics]  # the variance of one value
    torch.testing.assert_close((got, statistics[0]), (want, statistics[1]), **close)


def test_partials_of_many_rows_are_merged():
    values = torch.randn(60, 5, dtype=torch.float64) * 3 + 100
    parts = values.split([1, 20, 0, 39])
    partials = torch.stack(
        [
            torch.stack([p.sum(0) / max(len(p), 1) for p in parts]),
            torch.stack([(p - p.sum(0) / max(len(p), 1)).square().sum(0) for p in parts]),
            torch.stack([torch.full((5,), len(p)).double() for p in parts]),
        ]
    )
    for count in (60, None):  # None: as many as the rows say
        running = [torch.zeros(5).double(), torch.ones(5).double()]
        mean, rstd = LIBRARY.bn_stats_merge(partials, count, *running, 0.3, EPS)
        torch.testing.assert_close(mean, values.mean(0), **CLOSE)
        torch.testing.assert_close(rstd, (values.var(0, correction=0) + EPS).rsqrt(), **CLOSE)
        torch.testing.assert_close(running[0], 0.3 * values.mean(0), **CLOSE)
        torch.testing.assert_close(running[1], 0.7 + 0.3 * values.var(0), **CLOSE)


@pytest.mark.parametrize("count", [0, None])
def test_partials_of_nothing_leave_the_running_statistics(count):
    running = [torch.zeros(5), torch.full((5,), 2.0)]
    mean, rstd = LIBRARY.bn_stats_merge(torch.zeros(3, 2, 5), count, *running, 0.3, EPS)
    found = torch.stack([mean, rstd, *running])
    assert torch.equal(found, torch.tensor([0.0, 1.0, 0.0, 2.0]).view(4, 1).expand(4, 5))


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("with_vectors", [False, True])
@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g[0][2] > 1], ids=str)
def test_conv_affine_act_is_torchs(geometry, with_vectors, pool):
    case = ConvCase(*geometry)
    t = tensors_of(case, torch.float64)
    product = product_in_torch(case, t)
    if pool and min(product.shape[2:]) < 2:
        return
    scale, shift = t["bias"] * 0.7, t["bias"] + 1
    residual = None if pool else t["dy"]
    y = F.leaky_relu(product, 0.3)
    if with_vectors:
        y = y * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
    y = F.leaky_relu(y if pool else y + residual, 0.1)
    vectors = (scale, shift) if with_vectors else (None, None)
    given = (t["filter"], t["bias"], *vectors, residual, 0.3, 0.1, case.stride, case.pads, pool)
    torch.testing.assert_close(
        LIBRARY.conv_affine_act(t["x"], *given), F.max_pool2d(y, 2) if pool else y, **CLOSE
    )


def check_gradient(case, own, pool=False):
    t = tensors_of(case, torch.float64)
    statistics = pending_of(case, t)  # of this x; gradcheck moves x, and so they must move as well
    names = ["x", "filter", "bias"] + ["in_weight"] * (statistics.weight is not None)
    names += ["in_bias"] * (statistics.bias is not None)

    def op(*values):
        moved = t | dict(zip(names, values, strict=True))
        return conv_pool(case, moved, own)[0] if pool else conv(case, moved, own)[0]

    inputs = [t[n].clone(memory_format=torch.preserve_format).requires_grad_() for n in names]
    torch.autograd.gradcheck(op, inputs, **GRADCHECK)


@pytest.mark.parametrize("own", BOTH)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case, own):
    check_gradient(case, own)


@pytest.mark.parametrize("own", BOTH)
@pytest.mark.parametrize("pending", PENDING)
def test_gradcheck_with_a_pool(pending, own):
    check_gradient(ConvCase((1, 2, 3, 3), 2, pads=(0, 1, 1, 1), pending=pending), own, pool=True)


OPS_OF_GRADIENTS = {
    "conv_data_gradient": (True, True),
    "conv_weight_gradient": (True, True),
    "bn_act_backward": (False, False),
    "bias_act_backward": (False, False),
}


@pytest.mark.parametrize("name", OPS_OF_GRADIENTS)
def test_gradcheck_sees_an_error_of_1e_4(name, monkeypatch):
    """The planted error: a gradient too large by a factor of 1 + 1e-4."""

    def wrong(*arguments):
        found = getattr(LIBRARY, name)(*arguments)
        if isinstance(found, tuple):
            return found[0] * (1 + 1e-4), *found[1:]
        return found * (1 + 1e-4)

    others = {n: getattr(LIBRARY, n) for n in ops.OP_NAMES}
    monkeypatch.setattr(conv_library, "_ops", types.SimpleNamespace(**others | {name: wrong}))
    pending = "bias" if name == "bias_act_backward" else "norm"
    with pytest.raises(GradcheckError):
        check_gradient(ConvCase((2, 3, 4, 4), 2, pending=pending), OPS_OF_GRADIENTS[name])


# what torch asks of an op


def op_arguments(name, dtype=torch.float32):
    case = ConvCase((2, 8, 6, 5), 16, stride=1, pads=(1, 1, 0, 1), pending="norm")
    t = tensors_of(case, dtype)
    x, *block = pending_of(case, t)
    geometry = (case.stride, list(case.pads))
    return {
        "conv": (x, t["filter"], t["bias"], *block, *geometry, 0.2, True, False),
        "conv_bias_act_pool": (x, t["filter"], t["bias"], *block, 0.2, *geometry, True, True),
        "conv_affine_act": (
            *(x, t["filter"], t["bias"], t["bias"] + 1, t["bias"], t["dy"], 0.2, 0.1),
            *(*geometry, False),
        ),
        "conv_data_gradient": (t["dy"], t["filter"], x, *block, *geometry),
        "conv_weight_gradient": (t["dy"], x, *block, 3, 3, *geometry),
        "bn_stats_merge": (
            *(torch.rand(3, 4, 16), 60, torch.zeros(16), torch.ones(16), 0.1, 1e-5),
        ),
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name):
    arguments = op_arguments(name)
    if name in ("conv", "conv_bias_act_pool"):
        arguments = tuple(
            a.detach().requires_grad_() if torch.is_tensor(a) and i not in (3, 4) else a
            for i, a in enumerate(arguments)
        )
    torch.library.opcheck(getattr(LIBRARY, name).default, arguments)


def check_tracing(name, dtype):
    """What tracing is told of CUDA tensors, made without a GPU, against the CPU's results."""
    arguments = op_arguments(name)
    with torch._subclasses.FakeTensorMode(shape_env=ShapeEnv()):
        fakes = [
            torch.empty_strided(a.shape, a.stride(), device="cuda").to(
                dtype if a.dim() == 4 else a.dtype
            )
            if torch.is_tensor(a)
            else a
            for a in arguments
        ]
        told = getattr(LIBRARY, name)(*fakes)
    real = getattr(LIBRARY, name)(*arguments)
    many = isinstance(real, tuple)
    for fake, true in zip(told if many else [told], real if many else [real], strict=True):
        assert fake.device.type == "cuda"
        floating = true.dim() == 4 and true.is_floating_point()
        assert fake.dtype == (dtype if floating else true.dtype)
        if true.dim() == 3:  # partials, whose rows the kernel decides
            assert (fake.shape[0], fake.shape[2]) == (true.shape[0], true.shape[2])
        else:
            assert (fake.shape, fake.stride()) == (true.shape, true.stride())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_tracing_tells_the_results_layout(name, dtype):
    check_tracing(name, dtype)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "bn_stats_merge"])
def test_wrong_strides_in_tracing_are_seen(name, monkeypatch):
    """The planted error: tracing is told NCHW memory."""
    monkeypatch.setattr(tracing, "like", lambda x: x.new_empty(x.shape))
    monkeypatch.setattr(tracing, "image", lambda x, shape, dtype: x.new_empty(shape, dtype=dtype))
    with pytest.raises(AssertionError):
        check_tracing(name, torch.float16)


@pytest.mark.parametrize("dtype", ops.DTYPES["cpu"])
def test_repeats_are_bit_equal(dtype):
    for case in CASES[10:15]:
        t = tensors_of(case, dtype)
        first = gradients(case, lambda t, case=case: conv(case, t)[0], t)
        for _ in range(5):
            again = gradients(case, lambda t, case=case: conv(case, t)[0], t)
            torch.testing.assert_close(again, first, **SAME_BITS)


# which gradients are computed, and what is kept for them


@pytest.mark.parametrize("own", [True, False])
def test_gradients_that_nobody_wants_are_not_computed(own, monkeypatch):
    case = ConvCase((2, 3, 6, 5), 4, pending="norm")
    noted, vendor = Noted(), []
    monkeypatch.setattr(conv_library, "_ops", noted)
    original = conv_library.vendor_gradients

    def watched(*arguments):
        vendor.append(arguments[-1])
        return original(*arguments)

    monkeypatch.setattr(conv_library, "vendor_gradients", watched)
    for wanted, ours, vendors in (
        ("filter", "conv_weight_gradient", (False, True)),
        ("x", "conv_data_gradient", (True, False)),
    ):
        t = tensors_of(case, torch.float64)
        t[wanted].requires_grad_()
        y, _ = conv(case, t, (own, own))
        noted.called.clear()
        vendor.clear()
        y.backward(t["dy"])
        assert vendor == ([] if own else [vendors])
        products = [name for name in noted.called if name.startswith("conv")]
        assert products == ([ours] if own else [])


def test_what_is_pending_is_not_kept_for_the_backward():
    case = ConvCase((2, 16, 8, 8), 16, pending="norm")
    t = tensors_of(case, torch.float64)
    for name in ("x", "filter", "in_weight", "in_bias"):
        t[name].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s) or s, lambda s: s):
        conv(case, t)
    images = [s for s in kept if s.dim() == 4 and s.shape == t["x"].shape]
    assert [s.data_ptr() for s in images] == [t["x"].data_ptr()]


# errors


def conv_error(case, t, message, **changes):
    with pytest.raises(RuntimeError, match=message):
        conv(case, t | changes)


def test_arguments_that_do_not_fit():
    case = ConvCase((2, 3, 6, 5), 4, pending="norm")
    t = tensors_of(case, torch.float32)
    large = torch.zeros(4, 3, 9, 9).to(memory_format=torch.channels_last)
    conv_error(case, t, "x: expected channels-last memory, got", x=t["x"].contiguous())
    conv_error(case, t, "filter: expected channels-last", filter=t["filter"].contiguous())
    conv_error(
        case,
        t,
        "filter: expected 3 channels, as x has, got 2",
        filter=large[:, :2].contiguous(memory_format=torch.channels_last),
    )
    conv_error(case, t, "filter: expected the dtype of x", filter=t["filter"].bfloat16())
    conv_error(case, t, r"bias: expected contiguous \[4\], got \[3\]", bias=t["bias"][:3])
    conv_error(case, t, "in_weight: expected float32", in_weight=t["in_weight"].double())
    conv_error(case, t, r"in_bias: expected contiguous \[3\]", in_bias=t["bias"])
    conv_error(ConvCase((2, 3, 6, 5), 4, stride=0), t, "conv: expected a stride >= 1 and four pads")
    conv_error(ConvCase((2, 3, 6, 5), 4, pads=(1, -1, 0, 0)), t, r"pads >= 0, got 1 and \[1, -1")
    conv_error(case, t, "filter: expected at most 8 x 7, the padded image", filter=large)
    half = {n: t[n].half() for n in ("x", "filter")}
    conv_error(case, t, "got float16; use backend torch", **half)
    pending = ops.Pending(t["x"], t["in_mean"])
    given = (t["filter"], None, *pending[1:], 1, case.pads, None, True, True)
    with pytest.raises(RuntimeError, match="expected all of them, the bias alone or none"):
        LIBRARY.conv(t["x"], *given)
    given = (t["filter"], None, *[None] * 4, True, 1.0, 1.0, 1, case.pads, None, True, True)
    with pytest.raises(RuntimeError, match="in_batch_stats: expected false without in_mean"):
        LIBRARY.conv(t["x"], *given)
    with pytest.raises(RuntimeError, match=r"slope: expected >= 0, got -0\.1"):
        conv(case, t, stats_slope=-0.1)
    dy = t["dy"][:, :, 1:].contiguous(memory_format=torch.channels_last)
    for name, place in (("conv_data_gradient", 0), ("conv_weight_gradient", 0)):
        arguments = list(op_arguments(name))
        arguments[place] = dy
        with pytest.raises(RuntimeError, match="dy: expected shape"):
            getattr(LIBRARY, name)(*arguments)
