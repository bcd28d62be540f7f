"""torch's own sample inputs for conv2d, batch_norm, max_pool2d, relu and leaky_relu, through our
ops."""

import pytest
import torch
from simt.conv_ops import as_ops
from torch.nn import functional as F
from torch_tables import import_tables

from fastcnn import ops
from fastcnn.ops.conv_autotune import FUSED, VENDOR

DTYPES = ops.DTYPES["cpu"]
# reference fp32, since torch computes a sum in another order
CLOSE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.fixture(scope="module")
def operators():
    return import_tables().op_db


def samples(operators, name, dtype):
    return [
        sample
        for info in operators
        if info.name == f"nn.functional.{name}"
        for sample in info.sample_inputs("cpu", dtype, requires_grad=True)
    ]


def channels_last(x):
    """The sample as an image or a matrix, which our ops take: (N, K), (N, K, L) or (N, K, P, Q)."""
    x = x.detach().unsqueeze(-1) if x.dim() == 3 else x.detach()
    form = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x.clone(memory_format=form).requires_grad_()


def assert_same(ours, torchs, x, plain, dtype):
    torch.testing.assert_close(ours.reshape(torchs.shape), torchs, rtol=CLOSE[dtype], atol=1e-5)
    dy = torch.randn_like(torchs)
    ours.backward(dy.reshape(ours.shape))
    torchs.backward(dy)
    tolerance = {"rtol": CLOSE[dtype], "atol": CLOSE[dtype]}
    torch.testing.assert_close(x.grad.reshape(plain.shape), plain.grad, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_norm(operators, dtype):
    count = 0
    for sample in samples(operators, "batch_norm", dtype):
        if sample.input.dim() < 2:
            continue  # (N,) without channels
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        channels = sample.input.shape[1]
        mean, var, weight, bias = (
            value.detach().to(wide) if value is not None else torch.full((channels,), default)
            for value, default in zip(sample.args, (0.0, 1.0, 1.0, 0.0), strict=True)
        )
        mean, var = mean.to(wide), var.to(wide).abs()  # a variance
        weight, bias = weight.to(wide), bias.to(wide)
        options = {"training": False, "momentum": 0.1, "eps": 1e-5} | sample.kwargs
        x, plain = channels_last(sample.input), sample.input.detach().clone().requires_grad_()
        statistics = (mean.clone(), var.clone())
        torchs = F.batch_norm(plain, mean, var, weight, bias, **options)
        ours = ops.bn_act(x, weight, bias, *statistics, *options.values())
        assert_same(ours, torchs, x, plain, dtype)
        torch.testing.assert_close(statistics, (mean, var), rtol=CLOSE[dtype], atol=1e-5)
        count += 1
    assert count == 20


def geometry_of(sample):
    """Stride and pads of a sample as our convolution has them, or None if it has no such thing."""
    options = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | sample.kwargs
    strides = torch.nn.modules.utils._pair(options["stride"])
    if options["dilation"] != 1 or options["groups"] != 1 or strides[0] != strides[1]:
        return None
    padding = 0 if options["padding"] == "valid" else options["padding"]
    return strides[0], (padding,) * 4


def check_conv2d(operators, dtype, plan):
    count = 0
    for sample in samples(operators, "conv2d", dtype):
        geometry = geometry_of(sample)
        if sample.input.dim() != 4 or geometry is None:
            continue  # groups, dilation and unequal strides are no part of our convolutions
        filters, bias = (None if t is None else t.detach() for t in sample.args)
        x, plain = channels_last(sample.input), sample.input.detach().clone().requires_grad_()
        torchs = F.conv2d(plain, filters, bias, **sample.kwargs)
        given = channels_last(filters).detach(), None if bias is None else bias.to(wide_of(dtype))
        ours = ops.conv_bias_act(x, *given, 1.0, *geometry, plan=plan)
        assert_same(ours, torchs, x, plain, dtype)
        count += 1
    assert count == 4


def wide_of(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plan", [VENDOR, FUSED], ids=["vendor", "fused"])
def test_conv2d(operators, dtype, plan):
    check_conv2d(operators, dtype, plan)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_conv2d_by_the_kernels(operators, kernels):
    with as_ops(kernels) as calls:
        check_conv2d(operators, torch.bfloat16, FUSED)
    assert calls["conv"] + calls["conv_bias_act_pool"] > 0
    assert calls["conv_data_gradient"] == 4


@pytest.mark.parametrize("dtype", DTYPES)
def test_max_pool2d(operators, dtype):
    count = 0
    for sample in samples(operators, "max_pool2d", dtype):
        options = {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False} | sample.kwargs
        window = options["kernel_size"]
        pool = [
            value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
            for value in (window, options["stride"] or window, options["padding"])
        ]
        ours_has = sample.input.dim() == 4 and all(isinstance(value, int) for value in pool)
        if not ours_has or options["ceil_mode"] or options["dilation"] != 1:
            continue  # rectangles, dilation and rounding up are no part of our pools
        x, plain = channels_last(sample.input), sample.input.detach().clone().requires_grad_()
        torchs = F.max_pool2d(plain, *pool)
        assert_same(ops.bias_act_pool(x, None, 1.0, tuple(pool)), torchs, x, plain, dtype)
        count += 1
    assert count >= 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "slope"), [("relu", 0.0), ("leaky_relu", 0.01)])
def test_activations(operators, name, slope, dtype):
    for sample in samples(operators, name, dtype):
        if sample.input.dim() != 2:
            continue
        slope = sample.kwargs.get("negative_slope", slope)
        x, plain = channels_last(sample.input), sample.input.detach().clone().requires_grad_()
        torchs = getattr(F, name)(plain, **sample.kwargs)
        assert_same(ops.bias_act(x, None, slope), torchs, x, plain, dtype)
