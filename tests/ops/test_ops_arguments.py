"""What fastcnn.ops accepts: memory layouts, shapes, dtypes; what it refuses, and how it says so."""

import dataclasses

import pytest
import torch
from op_cases import DEVICES, SAME_BITS, Case, call, kinds, output_shape, run, tensors_of

from fastcnn import ops
from fastcnn.ops import reference


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(),
        lambda x: x[:, :, ::2],
        lambda x: x[:, ::2],
        lambda x: x[:, :, :, 1:],
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x.transpose(2, 3),
    ],
)
def test_another_layout_is_an_error(change, device):
    t = tensors_of(Case((4, 6, 8, 10)), torch.float32, device)
    t["x"] = change(t["x"])
    t["bias"], t["weight"] = (t[n][: t["x"].shape[1]] for n in ("bias", "weight"))
    for name in ("running_mean", "running_var"):
        t[name] = t[name][: t["x"].shape[1]]
    for case in (Case(t["x"].shape), Case(t["x"].shape, norm=False, pool=(2, 2, 0))):
        with pytest.raises(RuntimeError, match="x: expected channels-last memory, got stride"):
            call(ops, case, t)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offset_into_memory(dtype, device):
    # a slice of images is channels-last; K·P·Q = 45 puts it off every vector's boundary
    for case in kinds((3, 5, 3, 3), 0.2, 0.1):
        t = tensors_of(dataclasses.replace(case, shape=(4, 5, 3, 3)), dtype, device)
        t["x"] = t["x"][1:]
        t["dy"] = tensors_of(case, dtype, device)["dy"]
        if case.residual:
            t["residual"] = t["residual"][1:]
        y = call(ops, case, t)
        copied = {n: v.clone(memory_format=torch.preserve_format) for n, v in t.items()}
        torch.testing.assert_close(y, call(ops, case, copied), equal_nan=False)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_any_layout(device):
    case = Case((4, 6, 8, 10))
    t = tensors_of(case, torch.float32, device)
    want = run(ops, case, t)
    for dy in (t["dy"].contiguous(), t["dy"].transpose(2, 3).contiguous().transpose(2, 3)):
        torch.testing.assert_close(run(ops, case, t | {"dy": dy}), want, **SAME_BITS)
    ones = torch.ones_like(t["dy"])
    expanded = torch.ones((), device=device).expand(case.shape)
    torch.testing.assert_close(
        run(ops, case, t | {"dy": expanded})["dx"], run(ops, case, t | {"dy": ones})["dx"]
    )


# errors, and what is none


@pytest.mark.parametrize("device", DEVICES)
def test_arguments_that_do_not_fit(device):
    case = Case((2, 3, 6, 6))
    t = tensors_of(case, torch.float32, device)
    wrong = {
        "bias": (t["bias"][:2], r"bias: expected contiguous \[3\], got \[2\]"),
        "weight": (t["weight"].double(), "weight: expected float32"),
        "running_var": (t["running_var"].bfloat16(), "running_var: expected float32"),
        "x": (t["x"].to(torch.int32), "x: expected a floating-point tensor"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(RuntimeError, match=message):
            call(ops, case, t | {name: value})
    with pytest.raises(RuntimeError, match=r"x: expected \(N, K, P, Q\) or \(N, K\)"):
        call(ops, case, t | {"x": t["x"][0]})
    with pytest.raises(RuntimeError, match=r"slope: expected >= 0, got -0\.1"):
        call(ops, dataclasses.replace(case, post_slope=-0.1), t)
    residual = torch.zeros(2, 3, 6, 6, device=device, dtype=torch.bfloat16)
    residual = residual.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="residual: expected the dtype of x"):
        call(ops, case, t | {"residual": residual})
    with pytest.raises(ValueError, match=r"residual: expected shape \[2, 3, 6, 6\]"):
        call(ops, case, t | {"residual": t["x"][:1]})


def test_dtypes_without_a_kernel():
    t = tensors_of(Case((2, 3, 6, 6)), torch.float16)
    with pytest.raises(RuntimeError, match="got float16; use backend torch"):
        call(ops, Case((2, 3, 6, 6)), t)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "pool", [(5, 2, 0), (3, 2, 2), (2, 0, 0), (12, 2, 0), (2, 2, -1), (2, 2**32 + 1, 0)]
)
def test_impossible_pools(pool, device):
    case = Case((2, 3, 4, 4), norm=False)
    t = tensors_of(case, torch.float32, device)
    with pytest.raises(RuntimeError, match="pool: expected"):
        call(ops, dataclasses.replace(case, pool=pool), t)


@pytest.mark.parametrize(
    "case", [Case((1, 3, 1, 1)), Case((1, 3)), Case((1, 3, 1, 1), pool=(3, 2, 1))], ids=str
)
def test_one_value_a_channel_is_torchs_error(case):
    t = tensors_of(case, torch.float32)
    with pytest.raises(ValueError, match="more than 1 value per channel") as torchs:
        call(reference, case, t)
    with pytest.raises(ValueError, match="more than 1 value per channel") as ours:
        call(ops, case, t)
    assert str(ours.value) == str(torchs.value)


@pytest.mark.parametrize(
    "case", [Case((2, 0, 4, 4), training=False), Case((2, 0, 4, 4), norm=False)]
)
def test_no_channels(case):
    for pooled in (case, dataclasses.replace(case, pool=(2, 2, 0))):
        t = tensors_of(pooled, torch.float32)
        assert call(ops, pooled, t).shape == output_shape(pooled)


@pytest.mark.parametrize("case", [*kinds((2, 3, 4, 4), -0.1, 0.1), *kinds((2, 3, 4, 4), 0.1, -0.1)])
def test_negative_slopes(case):
    if case.pre_slope >= 0 and case.post_slope >= 0:
        return  # a bias has no pre_slope
    with pytest.raises(RuntimeError, match="slope: expected >= 0"):
        call(ops, case, tensors_of(case, torch.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_no_images(device):
    for case in kinds((0, 6, 5, 5), 0.2, 0.1):
        t = tensors_of(case, torch.float32, device)
        torch.testing.assert_close(run(ops, case, t), run(reference, case, t))


def test_second_derivative_is_refused():
    case = Case((2, 3, 4, 4))
    t = tensors_of(case, torch.float64)
    x = t["x"].requires_grad_()
    y = call(ops, case, t)
    with pytest.raises(RuntimeError, match="fastcnn ops have no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_forward_mode_and_transforms_are_refused():
    case = Case((2, 3, 4, 4), norm=False)
    t = tensors_of(case, torch.float32)

    def op(x):
        return ops.bias_act(x, t["bias"], 0.1)

    with pytest.raises(RuntimeError, match="use backend torch"):
        torch.func.jvp(op, (t["x"],), (t["x"],))
    with pytest.raises(RuntimeError, match="use backend torch"):
        torch.func.grad(lambda x: op(x).sum())(t["x"])
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        op(torch.autograd.forward_ad.make_dual(t["x"], t["x"]))
