"""conv_bn_act and conv_bias_act on the CPU against the oracle, whoever computes them."""

import re

import pytest
import torch
from conftest import TOLERANCE
from conv_cases import EPS, GEOMETRIES, ConvCase, Noted, drawn, pending_of, tensors_of
from op_cases import SAME_BITS, wide

from fastcnn import ops
from fastcnn.ops import conv_autotune, reference
from fastcnn.ops.conv_autotune import FUSED, VENDOR, Plan
from fastcnn.ops.native import library

LIBRARY = torch.ops.fastcnn
CLOSE = TOLERANCE[torch.float64]


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def layer_tensors(case, dtype=torch.float64, seed=0):
    t = tensors_of(case, dtype, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for name in ("weight", "shift", "running_mean", "running_var"):
        t[name] = drawn((case.k,), wide(dtype), generator)
    t["running_var"] = t["running_var"].abs() + 0.5
    t["residual"] = drawn(case.result, dtype, generator)
    return t


def conv_bn_act(module, case, t, training=True, pool=None, residual=False, plan=None, **rest):
    arguments = [t[n] for n in ("weight", "shift", "running_mean", "running_var")]
    slopes = (0.2, 0.1)
    return module.conv_bn_act(
        t["x"],
        t["filter"],
        t["bias"].to(t["x"].dtype),
        *(*arguments, training, 0.3, EPS, *slopes, case.stride, case.pads, pool),
        t["residual"] if residual else None,
        plan=plan,
        **rest,
    )


def conv_bias_act(module, case, t, pool=None, residual=False, plan=None, slope=0.1, **rest):
    return module.conv_bias_act(
        t["x"],
        t["filter"],
        t["bias"],
        *(slope, case.stride, case.pads, pool, t["residual"] if residual else None),
        plan=plan,
        **rest,
    )


def results(call, module, case, tensors, names, **options):
    t = {n: v.clone(memory_format=torch.preserve_format) for n, v in tensors.items()}
    for name in names:
        t[name].requires_grad_()
    y = call(module, case, t, **options)
    if torch.is_grad_enabled():
        y.square().sum().backward()
    return [y.detach(), *(t[n].grad for n in names), t["running_mean"], t["running_var"]]


LAYERS = [ConvCase(*geometry) for geometry in GEOMETRIES[:1] + GEOMETRIES[2:6]]
PLANS = [VENDOR, FUSED, Plan("fused", "vendor", "fused"), Plan("fused", "fused", "vendor")]
REST = [{}, {"pool": (2, 2, 0)}, {"pool": (3, 2, 1)}, {"residual": True}]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("rest", REST, ids=str)
def test_public_functions_are_the_oracles(rest, plan):
    for case in LAYERS:
        t = layer_tensors(case)
        names = ["x", "filter"]
        names += ["residual"] if "residual" in rest else []
        for training in (True, False):
            options = {"training": training, **rest}
            norms = [*names, "weight", "shift"]
            got = results(conv_bn_act, ops, case, t, norms, plan=plan, **options)
            want = results(conv_bn_act, reference, case, t, norms, **options)
            torch.testing.assert_close(got, want, **CLOSE)
        for slope in (0.1, 1.0):
            biased = [*names, "bias"]
            got = results(conv_bias_act, ops, case, t, biased, plan=plan, slope=slope, **rest)
            want = results(conv_bias_act, reference, case, t, biased, slope=slope, **rest)
            torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("plan", PLANS[:2], ids=str)
@pytest.mark.parametrize("rest", REST, ids=str)
def test_inference_is_the_oracles(rest, plan):
    for case in LAYERS:
        t = layer_tensors(case)
        with torch.no_grad():
            got = results(conv_bn_act, ops, case, t, [], training=False, plan=plan, **rest)
            want = results(conv_bn_act, reference, case, t, [], training=False, **rest)
            torch.testing.assert_close(got, want, **CLOSE)
            got = results(conv_bias_act, ops, case, t, [], plan=plan, **rest)
            want = results(conv_bias_act, reference, case, t, [], **rest)
            torch.testing.assert_close(got, want, **CLOSE)


@pytest.mark.parametrize("plan", PLANS[:2], ids=str)
def test_inference_defers_nothing(plan):
    case = LAYERS[0]
    t = layer_tensors(case)
    with torch.no_grad():
        for training in (True, False):
            y = conv_bn_act(ops, case, t, training=training, defer=True, plan=plan)
            assert isinstance(y, ops.Pending) == training
        assert torch.is_tensor(conv_bias_act(ops, case, t, defer=True, plan=plan))
    assert isinstance(conv_bias_act(ops, case, t, defer=True, plan=plan), ops.Pending)


@pytest.mark.parametrize("plan", PLANS[:2], ids=str)
def test_a_bias_that_is_left_to_the_next_layer_is_added_once(plan):
    for case in LAYERS:
        t = layer_tensors(case)
        left = conv_bias_act(ops, case, t, slope=1.0, defer=True, plan=plan)
        assert isinstance(left, ops.Pending)
        wanted = conv_bias_act(reference, case, t, slope=1.0)
        torch.testing.assert_close(left.applied(), wanted, **CLOSE)


def test_inference_is_one_kernel(monkeypatch):
    noted = Noted()
    monkeypatch.setattr("fastcnn.ops.convolution._ops", noted)
    monkeypatch.setattr("fastcnn.ops.norm_act._ops", noted)
    case = LAYERS[0]
    t = layer_tensors(case)
    with torch.no_grad():
        for rest in ({}, {"pool": (2, 2, 0)}, {"residual": True}, {"defer": True}):
            conv_bn_act(ops, case, t, training=False, plan=FUSED, **rest)
            assert noted.called == ["conv_affine_act"]
            noted.called.clear()
            conv_bias_act(ops, case, t, plan=FUSED, **rest)
            assert noted.called == ["conv_affine_act"]
            noted.called.clear()


@pytest.mark.parametrize("dtype", ops.DTYPES["cpu"])
@pytest.mark.parametrize("rest", REST, ids=str)
def test_the_vendors_way_is_the_sequence_of_ops_bit_for_bit(rest, dtype):
    for case in (ConvCase(*GEOMETRIES[0]), ConvCase(*GEOMETRIES[4])):
        t = layer_tensors(case, dtype)
        pool = rest.get("pool")
        last = pool or (t["residual"] if "residual" in rest else None)
        moved = {n: t[n].clone() for n in ("running_mean", "running_var")}
        got = conv_bn_act(ops, case, t | moved, **rest)
        y = reference.product(t["x"], t["filter"], t["bias"].to(dtype), case.stride, case.pads)
        after = ops.bn_act_pool if pool else ops.bn_act
        statistics = (t["running_mean"], t["running_var"], True, 0.3, EPS, 0.2, 0.1)
        want = after(y, t["weight"], t["shift"], *statistics, last)
        torch.testing.assert_close(got, want, **SAME_BITS)
        torch.testing.assert_close(moved, {n: t[n] for n in moved}, **SAME_BITS)


def test_autocast_casts_as_for_torchs_convolution(monkeypatch):
    case, seen = ConvCase(*GEOMETRIES[0]), []

    def plan_for(x, filter, *rest, **more):
        seen.append((x.dtype, filter.dtype))
        return FUSED

    t = layer_tensors(case, torch.float32)
    for name in ("x", "filter", "weight"):
        t[name].requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        want = conv_bn_act(reference, case, t, False)
        vendor = conv_bn_act(ops, case, t, False)
        monkeypatch.setattr(conv_autotune, "plan_for", plan_for)
        fused = conv_bn_act(ops, case, t, False)
    assert vendor.dtype == fused.dtype == want.dtype == torch.bfloat16
    assert seen == [(torch.bfloat16, torch.bfloat16)]
    torch.testing.assert_close(fused, want, rtol=0.05, atol=0.05)
    fused.sum().backward()
    assert t["filter"].grad.dtype == t["weight"].grad.dtype == torch.float32


def test_the_plan_is_asked_for_what_the_layer_does(monkeypatch):
    asked = []

    def plan_for(x, filter, *rest):
        asked.append((x.shape, filter.shape, *rest))
        return FUSED

    monkeypatch.setattr(conv_autotune, "plan_for", plan_for)
    case = ConvCase((2, 3, 6, 5), 4, stride=2, pads=(1, 0, 1, 1))
    t = layer_tensors(case)
    pending = {"x": pending_of(ConvCase(case.x, 4, pending="norm"), t)}
    wanted = {"x": t["x"].clone(memory_format=torch.preserve_format).requires_grad_()}
    pool, other = {"pool": (2, 2, 0)}, {"pool": (3, 1, 1)}
    for call, changes, options, grad, want in (
        (conv_bn_act, {}, {}, True, ("bn", False, True, False, True)),
        (conv_bn_act, wanted, pool, True, ("bn", False, True, True, True)),
        (conv_bn_act, pending, {"training": False}, True, ("bn", True, False, True, True)),
        (conv_bn_act, {}, {"training": False}, False, ("inference", False, False, False, True)),
        (conv_bn_act, {}, {"training": False} | other, False, ("bn", False, False, False, True)),
        (conv_bias_act, wanted, {}, True, ("bias", False, True, True, False)),
        (conv_bias_act, {}, {"slope": 1.0}, True, ("bias", False, True, False, True)),
        (conv_bias_act, pending, pool, True, ("bias-pool", True, True, True, True)),
        (conv_bias_act, {}, other, True, ("bias", False, True, False, False)),
        (conv_bias_act, {}, pool, False, ("inference-pool", False, False, False, True)),
    ):
        with torch.set_grad_enabled(grad):
            call(ops, case, t | changes, **options)
        assert asked.pop() == ((2, 3, 6, 5), (4, 3, 3, 3), 2, (1, 0, 1, 1), *want)


def test_pending_channels_that_a_kernel_has_no_room_for_are_activated_before(monkeypatch, tmp_path):
    header = (library.source_dir() / "kernels.h").read_text("utf-8")
    case = ConvCase((2, 3, 6, 5), 4)
    t = layer_tensors(case)
    pending = pending_of(ConvCase(case.x, 4, pending="norm"), t)
    noted = Noted()
    monkeypatch.setattr("fastcnn.ops.convolution._ops", noted)
    for channels, plain in ((3, False), (2, True)):
        source = tmp_path / str(channels)
        source.mkdir()
        limit = re.sub(r"(?<=kPendingChannels = )\d+", str(channels), header)
        (source / "kernels.h").write_text(limit, "utf-8")
        monkeypatch.setattr(library, "source_dir", lambda source=source: source)
        given = []
        monkeypatch.setattr(noted, "conv", lambda *a, given=given: given.append(a), raising=False)
        with pytest.raises(TypeError):  # nothing is returned
            conv_bn_act(ops, case, t | {"x": pending}, plan=FUSED)
        assert ops.Pending(given[0][0], *given[0][3:10]).is_plain == plain


# errors, and what is none


def test_impossible_layers():
    case = ConvCase(*GEOMETRIES[0])
    t = layer_tensors(case)
    for call in (conv_bn_act, conv_bias_act):
        for module in (ops, reference):
            with pytest.raises(ValueError, match="residual: expected none in a layer that pools"):
                call(module, case, t, pool=(2, 2, 0), residual=True)
        for plan in (VENDOR, FUSED):
            with pytest.raises(ValueError, match=r"residual: expected shape \[2, 4, 6, 5\], got"):
                call(ops, case, t | {"residual": t["residual"][:1]}, residual=True, plan=plan)
        with pytest.raises(ValueError, match="defer: expected neither a pool nor a residual"):
            call(ops, case, t, pool=(2, 2, 0), defer=True)
    single = ConvCase((1, 3, 1, 1), 4)
    for plan in (VENDOR, FUSED):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            conv_bn_act(ops, single, layer_tensors(single), plan=plan)


@pytest.mark.parametrize("plan", PLANS[:2], ids=str)
def test_no_images(plan):
    case = ConvCase((0, 3, 6, 5), 4)
    t = layer_tensors(case)
    for rest in REST:
        names = ["x", "filter", "weight", "shift"]
        got = results(conv_bn_act, ops, case, t, names, plan=plan, **rest)
        assert got[0].shape[0] == 0
        assert not any(g.any() for g in got[1:5])
        torch.testing.assert_close(got[5:], [t["running_mean"], t["running_var"]], **SAME_BITS)
        got = results(conv_bias_act, ops, case, t, ["x", "filter", "bias"], plan=plan, **rest)
        assert not any(g.any() for g in got[1:4])


def test_derivatives_without_a_rule_are_refused():
    case = ConvCase((2, 3, 6, 5), 4)
    t = layer_tensors(case)
    t["x"].requires_grad_()
    y = conv_bias_act(ops, case, t, plan=FUSED, slope=1.0)
    with pytest.raises(RuntimeError, match="fastcnn ops have no second derivative"):
        torch.autograd.grad(y.sum(), t["x"], create_graph=True)
    x = t["x"].detach()

    for call in (conv_bn_act, conv_bias_act):

        def layer(x, call=call):
            return call(ops, case, t | {"x": x}, pool=(2, 2, 0), plan=FUSED)

        with pytest.raises(RuntimeError, match="use backend torch"):
            torch.func.jvp(layer, (x,), (x,))
        forward_ad = torch.autograd.forward_ad
        with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
            layer(forward_ad.make_dual(x, x))
    given = (t["filter"], None, None, None, None, 1.0, 1.0, 1, case.pads, False)
    with pytest.raises(RuntimeError, match="conv_affine_act: expected no backward"):
        LIBRARY.conv_affine_act(t["x"], *given).sum().backward()
