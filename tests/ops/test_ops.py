"""fastcnn.ops against the oracle, on every device there is: values, gradients, what torch asks."""

import dataclasses
import types

import augment_cases
import pytest
import torch
from conftest import GRADCHECK, LARGE_SHAPE, SMALL_SHAPES, TOLERANCE
from op_cases import (
    CASES,
    DEVICES,
    ON_EACH,
    SAME_BITS,
    Case,
    call,
    kinds,
    output_shape,
    run,
    tensors_of,
    wide,
)
from torch import nn
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F

from fastcnn import ops
from fastcnn.ops import norm_act, reference, tracing

# fp64 is the truth that others are judged by
ON_EACH_BELOW_FP64 = [each for each in ON_EACH if each.values[1] != torch.float64]
LARGE = Case(LARGE_SHAPE)
# the updates, which work on lists, and the convolutions have their own files: test_update_ops.py,
# test_conv_ops.py
NAMES = [n for n in ops.OP_NAMES if not n.endswith(("_", "_merge")) and not n.startswith("conv")]
SMALL_CASES = [case for shape in [*SMALL_SHAPES, (5, 3)] for case in kinds(shape, 0.2, 0.1)]


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.mark.parametrize("name", ops.OP_NAMES)
def test_every_op_has_its_kernels(name, library):
    # registered, and so compiled and linked, with or without a GPU
    keys = ["CPU", "CUDA"] if library.archs else ["CPU"]
    for key in keys:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastcnn::{name}", key)


@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_values_and_gradients_are_the_oracles(case):
    t = tensors_of(case, torch.float64)
    got, want = run(ops, case, t), run(reference, case, t)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float64])
    for name in {"y", "dx", "dresidual"} & got.keys() if len(case.shape) == 4 else ():
        assert got[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("device", "dtype"), ON_EACH_BELOW_FP64)
@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_errs_at_most_twice_as_much_as_torch(case, device, dtype):
    t = tensors_of(case, dtype, device)
    truth = run(reference, case, {name: value.double() for name, value in t.items()})
    ours, torchs = run(ops, case, t), run(reference, case, t)
    for name, true in truth.items():
        got, plain = ours[name], torchs[name]
        assert got.dtype == plain.dtype
        largest = true.abs().max()
        if name == "dx" and case.training:
            # of terms as large as dy, which nearly cancel where a channel has few values: its
            # rounding unit is theirs (torch on the CPU subtracts them in fp64)
            largest = torch.maximum(largest, t["dy"].abs().max())
        unit = torch.finfo(got.dtype).eps * largest
        error, allowed = (got - true).abs().max(), 2 * (plain - true).abs().max() + unit
        assert error <= allowed, f"{name}: {error:.3g}, torch {(plain - true).abs().max():.3g}"
        if name == "y":
            check_rounding(got, true)


def check_rounding(got, true):
    """Rounded to nearest: half a unit at most, a quarter on average, to both sides alike."""
    if got.dtype == torch.float32 or got.numel() < 500:
        return  # errs by its own arithmetic; too few to average
    # in units of a value's last place, at their largest
    error = (got - true) / (torch.finfo(got.dtype).eps * true.abs() + 1e-30)
    assert error.abs().mean() <= 0.26
    assert error.mean().abs() <= 0.06


def test_bf16_rounds_to_nearest_even():
    # between two neighbours, above, below and at the middle, of both signs
    bits = torch.arange(0x3F80, 0x4100, dtype=torch.int32).repeat_interleave(5) << 16
    bits += torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001], dtype=torch.int32).repeat(0x180)
    x = torch.cat([bits.view(torch.float32), -bits.view(torch.float32)])
    exact = x.bfloat16()
    # x = rounded + rest: the op adds the rest to a bf16 value and rounds
    rest = x - exact.float()
    for channels in (1, 8, 32):
        images = exact.view(-1, 1).expand(-1, channels).contiguous()
        for i in range(0, len(x), 97):
            y = ops.bias_act(images[i : i + 1], rest[i].expand(channels).contiguous(), 1.0)
            assert torch.equal(y, x[i].bfloat16().expand(1, channels))


def check_gradient(case):
    t = tensors_of(case, torch.float64)
    names = [n for n in ("x", "weight", "bias", "residual") if n in t]

    def op(*values):
        fixed = {n: t[n].clone() for n in ("running_mean", "running_var") if n in t}
        return call(ops, case, fixed | dict(zip(names, values, strict=True)))

    inputs = [t[n].clone(memory_format=torch.preserve_format).requires_grad_() for n in names]
    torch.autograd.gradcheck(op, inputs, **GRADCHECK)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_gradcheck(case):
    check_gradient(case)


@pytest.mark.parametrize("name", [name for name in ops.OP_NAMES if name.endswith("_backward")])
def test_gradcheck_sees_an_error_of_1e_4(name, monkeypatch):
    """The planted error: dx of every op too large by a factor of 1 + 1e-4."""

    def wrong(*arguments):
        dx, *rest = getattr(torch.ops.fastcnn, name)(*arguments)
        return dx * (1 + 1e-4), *rest

    others = {n: getattr(torch.ops.fastcnn, n) for n in ops.OP_NAMES}
    monkeypatch.setattr(norm_act, "_ops", types.SimpleNamespace(**others | {name: wrong}))
    case = Case((2, 3, 4, 4), norm="bn" in name, pool=(2, 2, 0) if "pool" in name else None)
    with pytest.raises(GradcheckError):
        check_gradient(case)


def op_arguments(device="cpu", dtype=torch.float32):
    """Arguments of every op of the library, by name."""
    case = Case((2, 8, 5, 6), residual=True)
    pooled = dataclasses.replace(case, pool=(3, 2, 1), residual=False)
    t, dy = tensors_of(case, dtype, device), tensors_of(pooled, dtype, device)["dy"]
    x, weight, bias, residual = (t[n] for n in ("x", "weight", "bias", "residual"))
    mean, rstd = t["running_mean"], t["running_var"]
    code = torch.zeros_like(dy, dtype=torch.uint8)
    pool, norm = (3, 2, 1), (mean, rstd, weight, bias)
    return {
        "bn_stats": (x, mean.clone(), rstd.clone(), True, 0.1, 1e-5, 0.1),
        "bn_act": (x, *norm, residual, True, 0.2, 0.1),
        "bn_act_backward": (t["dy"], x, residual, *norm, True, 0.2, 0.1),
        "bn_act_backward_sums": (t["dy"], x, residual, *norm, 0.2, 0.1),
        "bn_act_backward_apply": (t["dy"], x, residual, *norm, bias, mean, 0.2, 0.1),
        "bn_act_pool": (x, *norm, True, 0.2, 0.1, *pool),
        "bn_act_pool_backward": (dy, code, x, mean, rstd, weight, True, 0.2, 0.1, *pool),
        "bn_act_pool_backward_sums": (dy, code, x, mean, rstd, weight, 0.2, 0.1, *pool),
        "bn_act_pool_backward_apply": (
            *(dy, code, x, mean, rstd, weight, bias, mean, 0.2, 0.1, *pool),
        ),
        "bias_act": (x, bias, residual, 0.1),
        "bias_act_backward": (t["dy"], x, True, 0.1),
        "bias_act_pool": (x, bias, 0.1, *pool),
        "bias_act_pool_backward": (dy, code, 5, 6, True, 0.1, *pool),
        "augment": augment_arguments(augment_cases.FULL, device, dtype),
    }


def augment_arguments(case, device, dtype):
    t = augment_cases.tensors_of(case, device)
    tensors = [t[name] for name in ("images", "labels", "order", "at")]
    parameters = [t[name] for name in ("scale", "bias", "fill")]
    return (*tensors, 9, *parameters, 2**40, 4, True, 1, 5, case.gathered, dtype)


def check_op(name, device, arguments=None):
    arguments = list(arguments or op_arguments(device)[name])
    for i, argument in enumerate(arguments):
        floating = torch.is_tensor(argument) and argument.is_floating_point()
        if floating and name in ("bn_act", "bn_act_pool", "bias_act", "bias_act_pool"):
            arguments[i] = argument.detach().requires_grad_()
    torch.library.opcheck(getattr(torch.ops.fastcnn, name).default, tuple(arguments))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, device):
    check_op(name, device)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_of_gathered_images(device):
    case = dataclasses.replace(augment_cases.FULL, gathered=True)
    check_op("augment", device, augment_arguments(case, device, torch.float32))


def check_tracing(name, dtype):
    """What tracing is told of CUDA tensors, made without a GPU, against the CPU's results."""
    arguments = op_arguments()[name]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [
            t.to("cuda", dtype if t.dim() == 4 and t.is_floating_point() else t.dtype)
            if torch.is_tensor(t)
            else (dtype if isinstance(t, torch.dtype) else t)
            for t in arguments
        ]
        told = getattr(torch.ops.fastcnn, name)(*fakes)
    real = getattr(torch.ops.fastcnn, name)(*arguments)
    many = isinstance(real, tuple)
    for fake, true in zip(told if many else [told], real if many else [real], strict=True):
        assert fake.device.type == "cuda"
        assert fake.dtype == (dtype if true.dim() == 4 and true.is_floating_point() else true.dtype)
        assert (fake.shape, fake.stride()) == (true.shape, true.stride())


@pytest.mark.parametrize("dtype", ops.DTYPES["cuda"])
@pytest.mark.parametrize("name", NAMES)
def test_tracing_tells_the_results_layout(name, dtype):
    check_tracing(name, dtype)


WITH_IMAGES = [n for n in NAMES if n not in ("bn_stats", "augment") and not n.endswith("_sums")]


@pytest.mark.parametrize("name", WITH_IMAGES)
def test_wrong_strides_in_tracing_are_seen(name, monkeypatch):
    """The planted error: tracing is told NCHW memory. (opcheck looks at strides on CUDA alone.)"""
    monkeypatch.setattr(tracing, "like", lambda x: x.new_empty(x.shape))
    monkeypatch.setattr(tracing, "image", lambda x, shape, dtype: x.new_empty(shape, dtype=dtype))
    with pytest.raises(AssertionError):
        check_tracing(name, torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiles_without_graph_breaks(device, backend):
    cases = [Case((2, 8, 6, 6), residual=True), Case((2, 8, 6, 6), norm=False)]
    cases += [dataclasses.replace(c, pool=(2, 2, 0), residual=False) for c in cases]
    for case in cases:
        t = tensors_of(case, torch.float32, device)
        compiled = torch.compile(call, fullgraph=True, backend=backend)
        want, got = run(ops, case, t), run(ops, case, t, compiled)
        torch.testing.assert_close(got, want, **SAME_BITS)
    torch.compiler.reset()


@pytest.mark.full
@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
def test_repeats_are_bit_equal(device, dtype):
    for case in kinds((5, 65, 17, 9), 0.2, 0.1):
        t = tensors_of(case, dtype, device)
        first = run(ops, case, t)
        for _ in range(20):
            torch.testing.assert_close(run(ops, case, t), first, **SAME_BITS)


def test_threads_do_not_change_bits():
    for case in [*kinds((5, 24, 31, 33), 0.2, 0.1), *kinds((3, 17, 12, 9), 1.0, 0.0)]:
        t = tensors_of(case, torch.float32)
        torch.set_num_threads(1)
        one = run(ops, case, t)
        torch.set_num_threads(3)
        torch.testing.assert_close(run(ops, case, t), one, **SAME_BITS)


# values that are none, and equal ones


def special(shape, seed, device, dtype):
    """Small integers, so that windows have ties, with NaN and both infinities among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, shape, generator=generator).double()
    for value, share in ((torch.nan, 0.05), (torch.inf, 0.05), (-torch.inf, 0.1)):
        x[torch.rand(shape, generator=generator) < share] = value
    return x.to(device, dtype, memory_format=torch.channels_last)


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
@pytest.mark.parametrize("pool", [(2, 2, 0), (3, 2, 0), (3, 2, 1), (2, 1, 0), (3, 1, 1), (2, 3, 1)])
def test_pool_is_torchs_index_for_index(pool, device, dtype):
    for seed, shape in enumerate([(2, 3, 7, 9), (2, 32, 8, 8), (1, 17, 3, 4)]):
        x = special(shape, seed, device, dtype)
        results = []
        for ours in (True, False):
            x = x.detach().requires_grad_()
            y = ops.bias_act_pool(x, None, 1.0, pool) if ours else F.max_pool2d(x, *pool)
            dy = torch.arange(1.0, y.numel() + 1, device=device).view(y.shape) % 8
            (dx,) = torch.autograd.grad(y, x, dy.to(dtype))
            results.append((y.detach(), dx))
        torch.testing.assert_close(*results, **SAME_BITS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slope", [0.0, 0.01, 1.0])
def test_nan_and_infinity_as_torch(slope, device):
    for case in kinds((2, 32, 6, 6), slope, slope):
        t = tensors_of(case, torch.float32, device)
        t["x"] = special(case.shape, 0, device, torch.float32)
        t["bias"] = torch.zeros_like(t["bias"])
        if case.norm and case.training:  # each special value in a channel of its own
            x = tensors_of(case, torch.float32, device, seed=1)["x"]
            x[0, 3, 2, 2], x[0, 4, 2, 2], x[1, 5, 0, 0] = torch.nan, torch.inf, -torch.inf
            t["x"] = x
        got, want = run(ops, case, t), run(reference, case, t)
        for name in ("y", "dx"):
            torch.testing.assert_close(
                got[name], want[name], rtol=1e-4, atol=1e-4, equal_nan=True, msg=f"{case} {name}"
            )


# precision and memory


@pytest.mark.parametrize("device", DEVICES)
def test_under_autocast_x_decides_the_dtype(device):
    t = tensors_of(Case((2, 8, 6, 6)), torch.float32, device)
    conv = nn.Conv2d(8, 8, 3, device=device).to(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16):
        assert call(ops, Case((2, 8, 6, 6)), t).dtype == torch.float32
        y = call(ops, Case((2, 8, 4, 4), pool=(2, 2, 0)), t | {"x": conv(t["x"])})
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert conv.weight.grad.dtype == torch.float32


def saved_bytes(ops_module, case, tensors):
    """Bytes of the distinct storages that the backward keeps, beside the parameters."""
    storages = {}

    def pack(saved):
        storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = call(ops_module, case, tensors)
    del y
    return sum(storages.values())


@pytest.mark.parametrize("dtype", ops.DTYPES["cpu"])
@pytest.mark.parametrize(
    ("case", "share"),
    [
        (Case((4, 32, 16, 16), pool=(2, 2, 0)), 0.6),
        (Case((4, 32, 16, 16)), 0.6),  # x against x and y
        (Case((4, 32, 16, 16), residual=True), 1.0),
        (Case((4, 32, 16, 16), norm=False), 1.0),  # y, which the next layer keeps anyway
        (Case((4, 32, 16, 16), norm=False, pool=(2, 2, 0)), 0.3),
    ],
    ids=str,
)
def test_saved_memory_as_a_share_of_torchs(case, share, dtype):
    t = tensors_of(case, dtype)
    t["x"] = (t["x"].requires_grad_() * 1).contiguous(memory_format=torch.channels_last)
    t["bias"].requires_grad_()
    ours, torchs = (saved_bytes(module, case, t) for module in (ops, reference))
    assert ours <= share * torchs


@pytest.mark.full
def test_more_values_than_32_bits_count():
    torch.set_num_threads(2)
    # zeros take no memory until they are written, and windows of 11 x 11 leave few results
    x = torch.zeros(33, 1012, 1012, 64, dtype=torch.bfloat16).permute(0, 3, 1, 2)
    assert x.numel() > 2**31
    x[-1, -1, 1001, 1001] = 5.0
    y = ops.bias_act_pool(x, None, 1.0, (11, 11, 0))
    assert y[-1, -1, -1, -1] == 5.0
    assert y.count_nonzero() == 1


@pytest.mark.parametrize("dtype", ops.DTYPES["cpu"])
def test_parameters_are_wide(dtype):
    results = run(ops, Case((2, 8, 4, 4)), tensors_of(Case((2, 8, 4, 4)), dtype))
    assert results["y"].dtype == results["dx"].dtype == dtype
    for name in ("dweight", "dbias", "running_mean", "running_var"):
        assert results[name].dtype == wide(dtype)
    assert results["y"].shape == output_shape(Case((2, 8, 4, 4)))
