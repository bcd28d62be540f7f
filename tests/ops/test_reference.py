"""fastcnn.ops.reference against its formulas, gradcheck, and torch in half precision."""

import pytest
import torch
from conftest import GRADCHECK, LARGE_SHAPE, POOLS, SHAPES, SMALL_SHAPES, TOLERANCE
from torch import nn

from fastcnn.ops import reference

SLOPES = [(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.01, 1.0), (1.0, 0.01), (0.2, 0.1)]
EPS = 1e-5
# every shape with every pool whose window fits into it
POOLED = [(s, p) for s in SHAPES for p in POOLS if min(s[2:]) + 2 * p[2] >= p[0]]
SMALL_POOLED = [(s, p) for s, p in POOLED if s in SMALL_SHAPES]


def tensors(shape, dtype=torch.float64):
    """x, weight, bias, running mean and variance, residual."""
    channels = shape[1]
    x = torch.randn(shape, dtype=dtype)
    if x.dim() == 4:
        x = x.to(memory_format=torch.channels_last)
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    weight = torch.rand(channels, dtype=parameter) + 0.5
    bias = torch.randn(channels, dtype=parameter)
    mean = torch.randn(channels, dtype=parameter)
    var = torch.rand(channels, dtype=parameter) + 0.5
    return x, weight, bias, mean, var, torch.randn_like(x)


def activation(x, slope):
    return torch.where(x > 0, x, slope * x)


def per_channel(v, x):
    return v.view(1, -1, *[1] * (x.dim() - 2))


def bn_act_formula(x, weight, bias, mean, var, training, pre, post, residual=0.0):
    """The docstring of bn_act, written out; returns also the new running statistics."""
    x = activation(x, pre)
    rows = x.transpose(0, 1).flatten(1)
    if training:
        batch_mean = rows.sum(1) / rows.shape[1]
        squares = ((rows - batch_mean[:, None]) ** 2).sum(1)
        batch_var = squares / rows.shape[1]
        new = (0.9 * mean + 0.1 * batch_mean, 0.9 * var + 0.1 * squares / (rows.shape[1] - 1))
    else:
        batch_mean, batch_var, new = mean, var, (mean, var)
    y = (x - per_channel(batch_mean, x)) / per_channel(batch_var + EPS, x).sqrt()
    y = y * per_channel(weight, x) + per_channel(bias, x) + residual
    return activation(y, post), *new


def max_pool_formula(x, pool):
    size, stride, padding = pool
    x = nn.functional.pad(x, (padding,) * 4, value=-torch.inf)
    return x.unfold(2, size, stride).unfold(3, size, stride).amax((4, 5))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("pre", "post"), SLOPES)
@pytest.mark.parametrize("shape", [*SHAPES, LARGE_SHAPE, (5, 3)], ids=str)
def test_bn_act_is_its_formula(shape, pre, post, training):
    x, weight, bias, mean, var, residual = tensors(shape)
    want = bn_act_formula(x, weight, bias, mean, var, training, pre, post, residual)
    y = reference.bn_act(
        x, weight, bias, mean, var, training, pre_slope=pre, post_slope=post, residual=residual
    )
    torch.testing.assert_close((y, mean, var), want, **TOLERANCE[torch.float64])


@pytest.mark.parametrize(("shape", "pool"), [*POOLED, (LARGE_SHAPE, POOLS[2])], ids=str)
def test_bn_act_pool_is_its_formula(shape, pool):
    x, weight, bias, mean, var, _ = tensors(shape)
    want, *statistics = bn_act_formula(x, weight, bias, mean, var, True, 0.2, 0.1)
    y = reference.bn_act_pool(
        x, weight, bias, mean, var, True, pre_slope=0.2, post_slope=0.1, pool=pool
    )
    want = (max_pool_formula(want, pool), *statistics)
    torch.testing.assert_close((y, mean, var), want, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("slope", [1.0, 0.0, 0.01])
@pytest.mark.parametrize("shape", [*SHAPES, (5, 3)], ids=str)
def test_bias_act_is_its_formula(shape, slope):
    x, _, bias, _, _, residual = tensors(shape)
    before = x.clone()
    close = TOLERANCE[torch.float64]
    shifted = x + per_channel(bias, x)
    want = activation(shifted, slope)
    torch.testing.assert_close(reference.bias_act(x, bias, slope), want, **close)
    want = activation(shifted + residual, slope)
    torch.testing.assert_close(reference.bias_act(x, bias, slope, residual), want, **close)
    torch.testing.assert_close(reference.bias_act(x, None, slope), activation(x, slope), **close)
    assert torch.equal(x, before), "an op changed its input"


@pytest.mark.parametrize(("shape", "pool"), POOLED, ids=str)
def test_bias_act_pool_is_its_formula(shape, pool):
    x, _, bias, _, _, _ = tensors(shape)
    want = max_pool_formula(activation(x + per_channel(bias, x), 0.0), pool)
    got = reference.bias_act_pool(x, bias, 0.0, pool)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("pre", "post"), [(1.0, 0.0), (0.2, 0.1)])
@pytest.mark.parametrize("shape", [*SMALL_SHAPES, (5, 3)], ids=str)
def test_gradient_of_bn_act(shape, pre, post, training):
    x, weight, bias, mean, var, residual = tensors(shape)

    def op(x, weight, bias, residual):
        statistics = (mean.clone(), var.clone())
        return reference.bn_act(
            x, weight, bias, *statistics, training, 0.1, EPS, pre, post, residual
        )

    check_gradient(op, x, weight, bias, residual)


@pytest.mark.parametrize(("shape", "pool"), SMALL_POOLED, ids=str)
def test_gradient_of_pooling_ops(shape, pool):
    x, weight, bias, mean, var, _ = tensors(shape)

    def with_norm(x, weight, bias):
        statistics = (mean.clone(), var.clone())
        return reference.bn_act_pool(x, weight, bias, *statistics, True, 0.1, EPS, 0.2, 0.1, pool)

    check_gradient(with_norm, x, weight, bias)
    check_gradient(lambda x, bias: reference.bias_act_pool(x, bias, 0.1, pool), x, bias)


@pytest.mark.parametrize("shape", [*SMALL_SHAPES, (5, 3)], ids=str)
def test_gradient_of_bias_act(shape):
    x, _, bias, _, _, residual = tensors(shape)
    check_gradient(lambda x, bias, r: reference.bias_act(x, bias, 0.0, r), x, bias, residual)


def check_gradient(op, *inputs):
    torch.autograd.gradcheck(op, [x.requires_grad_() for x in inputs], **GRADCHECK)


def plain_bn(x, weight, bias, mean, var, pre, post, residual):
    """The same in torch.nn modules, as a user writes it."""
    norm = nn.BatchNorm2d(len(weight), dtype=weight.dtype)
    norm.load_state_dict(
        {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}, strict=False
    )
    return nn.LeakyReLU(post)(norm(nn.LeakyReLU(pre)(x)) + residual)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, LARGE_SHAPE], ids=str)
def test_half_precision_errs_at_most_twice_as_much_as_torch(shape, dtype):
    x, *parameters, residual = tensors(shape, dtype)
    dy = torch.randn_like(x)

    def run(op, x, *rest):
        x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        y = op(x, *[t.clone() for t in rest])
        y.backward(dy.to(y.dtype))
        return y.detach(), x.grad

    def op(x, weight, bias, mean, var, residual):
        return reference.bn_act(x, weight, bias, mean, var, True, 0.1, EPS, 0.1, 0.1, residual)

    def plain(x, *rest):
        return plain_bn(x, *rest[:-1], 0.1, 0.1, rest[-1])

    wide = [t.double() for t in (x, *parameters, residual)]
    results = zip(
        run(op, x, *parameters, residual),
        run(plain, x, *parameters, residual),
        run(op, *wide),
        strict=True,
    )
    for ours, torchs, truth in results:
        assert ours.dtype == dtype
        unit = torch.finfo(dtype).eps * truth.abs().max()
        assert (ours - truth).abs().max() <= 2 * (torchs - truth).abs().max() + unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_keep_dtype_and_channels_last(dtype):
    x, weight, bias, mean, var, residual = tensors((2, 17, 6, 7), dtype)
    results = [
        reference.bn_act(x, weight, bias, mean, var, True, 0.1, EPS, 0.0, 0.01, residual),
        reference.bn_act_pool(x, weight, bias, mean, var, True, pool=(3, 2, 1)),
        reference.bias_act(x, bias, 0.0, residual),
        reference.bias_act_pool(x, bias, 0.01, (2, 2, 0)),
    ]
    for y in results:
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert mean.dtype == var.dtype == torch.float32


def test_nan_and_infinity_pass():
    x = torch.tensor([[[[torch.nan, 1.0], [2.0, 3.0]], [[torch.inf, 1.0], [2.0, 3.0]]]])
    y = reference.bias_act_pool(x, torch.zeros(2), 0.0, (2, 2, 0)).flatten()
    assert y[0].isnan()
    assert y[1].isinf()


def test_one_value_a_channel_is_torchs_error():
    x, weight, bias, mean, var, _ = tensors((1, 3, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel") as torchs:
        nn.BatchNorm2d(3)(x)
    with pytest.raises(ValueError, match="more than 1 value per channel") as ours:
        reference.bn_act(x, weight, bias, mean, var, True)
    assert str(ours.value) == str(torchs.value)


def test_residual_of_another_shape():
    x, weight, bias, mean, var, _ = tensors((2, 3, 4, 4))
    message = r"residual: expected shape \[2, 3, 4, 4\], got \[2, 3, 1, 1\]"
    residual = torch.zeros(2, 3, 1, 1, dtype=x.dtype)
    with pytest.raises(ValueError, match=message):
        reference.bn_act(x, weight, bias, mean, var, True, residual=residual)
    with pytest.raises(ValueError, match=message):
        reference.bias_act(x, bias, residual=residual)


def test_bias_and_window_that_do_not_fit():
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(RuntimeError):
        reference.bias_act(x, torch.zeros(2))
    with pytest.raises(RuntimeError):
        reference.bias_act_pool(x, torch.zeros(3), 0.0, (5, 2, 0))
