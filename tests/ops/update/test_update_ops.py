"""sgd_ and adam_ against torch.optim, the oracle and fp64, on every device there is."""

import pytest
import torch
from op_cases import DEVICES, ON_EACH, SAME_BITS
from update_cases import (
    LR,
    RATE,
    RULES,
    Case,
    arguments_of,
    call,
    check_errors,
    combinations,
    each,
    in_fp64,
    run,
    wide,
)

from fastcnn import ops
from fastcnn.ops import reference

MODULES = [pytest.param(ops, id="fused"), pytest.param(reference, id="torch")]


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def copies_beside(device, dtype):
    if dtype == torch.float64:
        return None
    return torch.float16 if device == "cuda" and dtype != torch.bfloat16 else torch.bfloat16


# values


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
@pytest.mark.parametrize("rule", RULES)
def test_every_combination_against_the_oracle(rule, device, dtype):
    for case in combinations(rule, copies_beside(device, dtype)):
        arguments = arguments_of(case, dtype, device)
        ours, torchs = run(ops, case, arguments), run(reference, case, arguments)
        if dtype == torch.float64:
            torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-13)
            continue
        truth = run(reference, case, in_fp64(arguments))
        check_errors(ours, truth, torchs, arguments)
        torch.testing.assert_close(ours["grads"], arguments["grads"], **SAME_BITS)


def torchs_optimizer(rule, params):
    name, settings = RULES[rule]
    common = {"lr": LR, "weight_decay": settings["decay"], "fused": False, "foreach": False}
    if name == "sgd_":
        own = {"momentum": settings["momentum"], "nesterov": settings["nesterov"]}
        return torch.optim.SGD(params, **common, **own)
    own = {"betas": (settings["beta1"], settings["beta2"]), "eps": settings["eps"]}
    kind = torch.optim.AdamW if settings["decoupled"] else torch.optim.Adam
    return kind(params, **common, **own)


def twenty_steps(module, rule, arguments, gradients):
    """Weights after 20 steps from moments of zero; without a module, torch.optim's."""
    case, arguments = Case(rule), each(arguments, torch.clone)
    for name in ("momenta", "exp_avgs", "exp_avg_sqs"):
        for t in arguments.get(name, []):
            t.zero_()
    optimizer = None if module else torchs_optimizer(rule, arguments["params"])
    for step, grads in enumerate(gradients, 1):
        if optimizer is None:
            arguments["grads"] = grads
            if "steps" in arguments:
                arguments["steps"] = torch.tensor(float(step), device=arguments["rates"].device)
            call(module, case, arguments)
            continue
        for param, grad in zip(arguments["params"], grads, strict=True):
            param.grad = grad
        optimizer.step()
    return {"params": [t.detach() for t in arguments["params"]]}


@pytest.mark.full
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("rule", [rule for rule in RULES if "-decoupled" not in rule])
def test_twenty_steps_as_torch_optim(rule, module, device):
    arguments = arguments_of(Case(rule), torch.float32, device)
    gradients = [
        arguments_of(Case(rule), torch.float32, device, seed=i)["grads"] for i in range(20)
    ]
    wide_gradients = [[t.double() for t in grads] for grads in gradients]
    truth = twenty_steps(None, rule, in_fp64(arguments), wide_gradients)
    found = twenty_steps(module, rule, arguments, gradients)
    check_errors(found, truth, twenty_steps(None, rule, arguments, gradients), arguments)
    if device == "cpu":
        found = twenty_steps(module, rule, in_fp64(arguments), wide_gradients)
        torch.testing.assert_close(found, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("rule", ["sgd-decoupled", "momentum-decoupled"])
def test_decoupled_decay_of_sgd(rule, module):
    """w · (1 - lr · decay), then the step without decay."""
    case, plain = Case(rule), Case(rule.removesuffix("-decoupled"))
    arguments = arguments_of(case, torch.float64)
    shrunk = arguments | {"params": [t * (1 - LR * 0.1) for t in arguments["params"]]}
    found, want = run(module, case, arguments), run(module, plain, shrunk)
    torch.testing.assert_close(found, want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("steps", [1.0, 2.0, 1e4, 1e7])
def test_bias_correction_loses_no_digits(steps):
    """1 - beta^t of a beta next to 1, which a difference in fp32 would cancel."""
    case = Case("adam", steps=steps)
    arguments = arguments_of(case, torch.float32)
    settings = RULES["adam"][1] | {"beta1": 1 - 1e-5, "beta2": 1 - 1e-6}
    ours, truth = each(arguments, torch.clone), in_fp64(arguments)
    ops.adam_(**ours, **settings)
    reference.adam_(**truth, **settings)
    moved = [new - old for new, old in zip(ours["params"], arguments["params"], strict=True)]
    true = [new - old for new, old in zip(truth["params"], arguments["params"], strict=True)]
    for step, true_step, weight in zip(moved, true, arguments["params"], strict=True):
        bound = 3e-6 * true_step.abs() + 2e-7 * (weight.abs() + true_step.abs())
        assert ((step - true_step).abs() <= bound).all()


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
def test_without_beta1_the_first_moment_is_the_gradient(device, dtype):
    case = Case("adam-no-first-moment")
    arguments = arguments_of(case, dtype, device)
    found = run(ops, case, arguments)["exp_avgs"]
    torch.testing.assert_close(found, [t.to(wide(dtype)) for t in arguments["grads"]], **SAME_BITS)


# copies, averages, factor, found_inf


def special_weights():
    """Values at, beside and between bf16's, NaN, infinities, zeros, denormals, the largest."""
    bits = torch.arange(0x3F80, 0x4100, dtype=torch.int32).repeat_interleave(5) << 16
    bits += torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001], dtype=torch.int32).repeat(0x180)
    near = bits.view(torch.float32)
    odd = torch.tensor([torch.nan, -torch.nan, torch.inf, 0.0, 1e-40, 3.4e38, 65519.0, 65520.0])
    return torch.cat([near, -near, odd, -odd])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", ["sgd", "momentum", "adam"])
def test_copies_are_the_rounded_weights(rule, device):
    formats = [torch.bfloat16] if device == "cpu" else [torch.bfloat16, torch.float16]
    for dtype in formats:
        arguments = arguments_of(Case(rule, dtype, averages=True), torch.float32, device)
        weights = special_weights().to(device)
        for name in ("params", "grads", "momenta", "exp_avgs", "exp_avg_sqs", "averages"):
            if arguments.get(name):
                arguments[name].append(weights if name == "params" else torch.ones_like(weights))
        arguments["copies"].append(torch.ones_like(weights, dtype=dtype))
        found = run(ops, Case(rule), arguments)
        for weight, rounded in zip(found["params"], found["copies"], strict=True):
            torch.testing.assert_close(rounded, weight.to(dtype), **SAME_BITS)


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
@pytest.mark.parametrize("rule", ["nesterov-l2", "adamw"])
def test_averages_follow_the_new_weights(rule, device, dtype):
    case = Case(rule, averages=True)
    arguments = arguments_of(case, dtype, device)
    found = run(ops, case, arguments)
    alone = run(ops, Case(rule), arguments | {"averages": []})
    torch.testing.assert_close(found | {"averages": []}, alone, **SAME_BITS)
    for i, old in enumerate(arguments["averages"]):
        true = old.double() + RATE * (found["params"][i].double() - old.double())
        unit = torch.finfo(old.dtype).eps
        torch.testing.assert_close(found["averages"][i].double(), true, rtol=unit, atol=unit)
    still = arguments | {"rates": torch.tensor([LR, 0.0], device=device)}
    torch.testing.assert_close(
        run(ops, case, still)["averages"], arguments["averages"], **SAME_BITS
    )


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
@pytest.mark.parametrize("rule", ["sgd", "nesterov-l2", "adamw"])
def test_factor_scales_the_gradients(rule, device, dtype):
    case = Case(rule, factor=0.25)
    arguments = arguments_of(case, dtype, device)
    scaled = arguments | {"grads": [t / 4 for t in arguments["grads"]], "factor": None}
    found, want = run(ops, case, arguments)["params"], run(ops, case, scaled)["params"]
    torch.testing.assert_close(found, want, **SAME_BITS)
    assert not torch.equal(found[0], run(ops, case, arguments | {"factor": None})["params"][0])


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
@pytest.mark.parametrize("rule", ["sgd-decoupled", "nesterov-l2", "adamw"])
def test_found_inf_keeps_all_but_the_averages(rule, device, dtype, module):
    case = Case(rule, copies_beside(device, dtype), True, found_inf=1.0)
    arguments = arguments_of(case, dtype, device)
    for grad in arguments["grads"]:
        grad.view(-1)[:1].fill_(torch.inf) if grad.dim() < 2 else None
    found = run(module, case, arguments)
    for name in found.keys() - {"averages"}:
        torch.testing.assert_close(found[name], arguments[name], **SAME_BITS)
    for i, old in enumerate(arguments["averages"]):
        want = old + RATE * (arguments["params"][i] - old)
        torch.testing.assert_close(found["averages"][i], want)
    zero = arguments | {"found_inf": torch.tensor(0.0, device=device)}
    assert not torch.equal(run(module, case, zero)["params"][0], arguments["params"][0])


# shapes, layouts, many tensors


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_no_tensors(rule, device, module):
    for case in combinations(rule, torch.bfloat16):
        call(module, case, arguments_of(case, torch.float32, device, shapes=[]))
        call(module, case, arguments_of(case, torch.float32, device, shapes=[(0,), (2, 0)]))


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
@pytest.mark.parametrize("rule", ["nesterov-l2", "adamw"])
def test_200_tensors(rule, device, dtype):
    shapes = [((i * 37) % 300,) for i in range(190)] + [(9000,), ()] * 5
    case = Case(rule, copies_beside(device, dtype), True)
    arguments = arguments_of(case, dtype, device, shapes)
    found = run(ops, case, arguments)
    for i in range(200):
        one = {n: v[i : i + 1] if isinstance(v, list) else v for n, v in arguments.items()}
        alone = run(ops, case, one)
        for name, tensors in alone.items():
            torch.testing.assert_close(found[name][i : i + 1], tensors, **SAME_BITS)


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
@pytest.mark.parametrize("rule", ["nesterov-l2", "adamw"])
def test_bits_do_not_depend_on_where_a_value_lies(rule, device, dtype):
    """Off every vector's boundary, and in a tail instead of the middle."""
    case = Case(rule, copies_beside(device, dtype), True, 0.375)
    arguments = arguments_of(case, dtype, device)
    want = run(ops, case, arguments)
    moved = arguments_of(case, dtype, device, offset=1)
    call(ops, case, moved)
    torch.testing.assert_close({n: moved[n] for n in want}, want, **SAME_BITS)
    for length in (1, 2, 7, 15, 1023, 16385):
        parts = each(arguments, lambda t: t[-length:] if t.dim() == 1 else t)  # noqa: B023
        found = run(ops, case, parts)
        for name, tensors in found.items():
            for part, whole in zip(tensors, want[name], strict=True):
                whole = whole[-length:] if whole.dim() == 1 else whole
                torch.testing.assert_close(part, whole, **SAME_BITS)


@pytest.mark.parametrize("device", DEVICES)
def test_any_order_of_dimensions_without_gaps(device):
    case = Case("nesterov-l2", torch.bfloat16, True)
    arguments = arguments_of(case, torch.float32, device, [(6, 5, 4, 3), (7, 9), (1, 8, 1, 1)])
    turned = each(arguments, lambda t: t.transpose(0, 1))
    found, want = run(ops, case, turned), run(ops, case, arguments)
    torch.testing.assert_close(
        found, {n: [t.transpose(0, 1) for t in v] for n, v in want.items()}, **SAME_BITS
    )
    # strides of sizes of 1 mean nothing
    odd = torch.empty_strided((1, 8, 1, 1), (3, 1, 5, 7), device=device)
    odd.copy_(arguments["grads"][2])
    replaced = arguments | {"grads": [*arguments["grads"][:2], odd]}
    torch.testing.assert_close(run(ops, case, replaced)["params"], want["params"], **SAME_BITS)


# repeats, threads, torch's own checks


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
@pytest.mark.parametrize("rule", ["nesterov-l2", "adamw"])
def test_repeats_are_bit_equal(rule, device, dtype):
    case = Case(rule, copies_beside(device, dtype), True, 0.375, 0.0)
    arguments = arguments_of(case, dtype, device, [(300001,), (7,), (64, 32, 3, 3)])
    first = run(ops, case, arguments)
    for _ in range(5):
        torch.testing.assert_close(run(ops, case, arguments), first, **SAME_BITS)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ops.DTYPES["cpu"])
@pytest.mark.parametrize("rule", ["nesterov-l2", "adamw"])
def test_threads_do_not_change_bits(rule, dtype):
    case = Case(rule, copies_beside("cpu", dtype), True, 0.375)
    arguments = arguments_of(case, dtype, shapes=[(300001,), (7,), (64, 32, 3, 3), (33,)])
    torch.set_num_threads(1)
    one = run(ops, case, arguments)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        torch.testing.assert_close(run(ops, case, arguments), one, **SAME_BITS)


def positional(case, arguments):
    name, settings = RULES[case.rule]
    return getattr(torch.ops.fastcnn, name).default, (*arguments.values(), *settings.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", ["sgd", "nesterov-l2", "adamw"])
def test_opcheck(rule, device):
    case = Case(rule, torch.bfloat16, True, 0.375, 0.0)
    shapes = [(4,), (2, 3, 3, 3), ()]
    torch.library.opcheck(*positional(case, arguments_of(case, torch.float32, device, shapes)))


@pytest.mark.parametrize("rule", ["nesterov-l2", "adamw"])
def test_tracing_with_cuda_tensors(rule):
    case = Case(rule, torch.float16, True, 0.375, 0.0)
    op, arguments = positional(case, arguments_of(case, torch.float16))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [
            [t.cuda() for t in a] if isinstance(a, list) else a.cuda() if torch.is_tensor(a) else a
            for a in arguments
        ]
        assert op(*fakes) is None


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_a_backward_after_the_update_is_refused(rule):
    case = Case(rule)
    arguments = arguments_of(case, torch.float32, shapes=[(4,)])
    weight = arguments["params"][0].requires_grad_()
    loss = (weight * weight.exp()).sum()
    call(ops, case, arguments)
    assert weight.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# errors that must be seen


def test_a_factor_that_is_left_out_is_seen():
    case = Case("momentum", factor=0.375)
    arguments = arguments_of(case, torch.float32)
    wrong = run(ops, case, arguments | {"factor": None})
    truth = run(reference, case, in_fp64(arguments))
    with pytest.raises(AssertionError, match=r"params\[0\]"):
        check_errors(wrong, truth, run(reference, case, arguments), arguments)


@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_is_wrong_by_1e_4_is_seen(rule):
    arguments = arguments_of(Case(rule), torch.float32)
    truth = run(reference, Case(rule), in_fp64(arguments))
    wrong = run(ops, Case(rule), arguments | {"rates": arguments["rates"] * (1 + 1e-4)})
    with pytest.raises(AssertionError, match="params"):
        check_errors(wrong, truth, run(reference, Case(rule), arguments), arguments)
