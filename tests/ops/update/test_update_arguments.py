"""What sgd_ and adam_ refuse, and how they say so; nothing is changed then."""

import pytest
import torch
from op_cases import DEVICES, SAME_BITS
from update_cases import Case, arguments_of, call, each

from fastcnn import ops

SHAPES = [(4,), (6, 5, 3, 3), (7, 2)]
LISTS = {"nesterov-l2": ["momenta"], "adamw": ["exp_avgs", "exp_avg_sqs"]}
NAMES = [
    (rule, name) for rule, own in LISTS.items() for name in [*own, "grads", "copies", "averages"]
]


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def refused(rule, arguments, message, **settings):
    """The call is an error of one line that matches, and leaves all tensors as they were."""
    before = each(arguments, torch.clone)
    with pytest.raises(RuntimeError, match=message) as raised:
        call(ops, Case(rule), arguments | settings)
    # torch adds where in its own code an error of a stable op came through
    assert "bindings" not in str(raised.value).splitlines()[0]
    torch.testing.assert_close(arguments, before, **SAME_BITS)


def arguments(rule, device="cpu", **rest):
    return arguments_of(Case(rule, torch.bfloat16, True, 0.5, 0.0), torch.float32, device, **rest)


def with_third(given, name, tensor):
    return given | {name: [*given[name][:2], tensor]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rule", "name"), NAMES)
def test_lists_that_do_not_fit(rule, name, device):
    given = arguments(rule, device, shapes=SHAPES)
    third = given[name][2]
    short = given | {name: given[name][:2]}
    refused(rule, short, rf"{name}: expected 3 tensors, got 2")
    refused(rule, with_third(given, name, third[:6]), rf"{name}\[2\]: expected the shape of .*7, 2")
    turned = third.t().contiguous().t()
    refused(rule, with_third(given, name, turned), rf"{name}\[2\]: expected the strides of .*2, 1")
    refused(rule, with_third(given, name, third.to(torch.int32)), rf"{name}\[2\]: expected ")
    if name != "grads":
        first = [given[name][0].double(), *given[name][1:]]
        refused(rule, given | {name: first}, f"{name}.*: expected .*float64")
    if device == "cuda":
        refused(rule, with_third(given, name, third.cpu()), rf"{name}\[2\]: expected the device")
    # nothing beside no parameters
    nothing = {n: [] if isinstance(v, list) else v for n, v in given.items()}
    refused(rule, nothing | {name: given[name]}, f"{name}: expected 0 tensors, got 3")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", LISTS)
def test_gradients_of_another_layout(rule, device):
    given = arguments(rule, device, shapes=SHAPES)
    given["grads"][1] = given["grads"][1].contiguous()
    message = r"grads\[1\]: expected the strides of its parameter, \[45, 1, 15, 5\], got \[45, 9"
    refused(rule, given, message)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "change",
    [
        lambda t: t[:, ::2],
        lambda t: t[:, :1],
        lambda t: t[:1].expand(6, -1, -1, -1),
        lambda t: t[..., 1:],
    ],
)
def test_memory_with_gaps_or_overlap(change, device):
    given = arguments("nesterov-l2", device, shapes=SHAPES)
    for name in ("params", "grads", "momenta", "copies", "averages"):
        given[name][1] = change(given[name][1])
    refused(
        "nesterov-l2", given, r"params\[1\]: expected memory without gaps or overlap, got shape"
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", LISTS)
def test_dtypes(rule, device):
    given = arguments(rule, device, shapes=SHAPES)
    halves = given | {"params": [t.bfloat16() for t in given["params"]]}
    refused(rule, halves, "params: expected float32.*, got bfloat16; use backend torch")
    mixed = with_third(given, "params", given["params"][2].bfloat16())
    refused(rule, mixed, r"params\[2\]: expected float32, got bfloat16")
    mixed = with_third(given, "grads", given["grads"][2].bfloat16())
    refused(rule, mixed, r"grads\[2\]: expected float32, got bfloat16")
    doubles = given | {"grads": [t.double() for t in given["grads"]]}
    refused(rule, doubles, "grads: expected float32.* beside float32 parameters, got float64")
    floats = given | {"copies": [t.float() for t in given["copies"]]}
    refused(rule, floats, "copies: expected bfloat16.* got float32 beside float32; use backend")
    if device == "cpu":
        for name in ("grads", "copies"):
            halves = given | {name: [t.half() for t in given[name]]}
            refused(rule, halves, f"{name}: expected .*bfloat16.* got float16")
        doubles = each(given, torch.Tensor.double) | {"copies": given["copies"]}
        refused(rule, doubles, "copies: expected bfloat16 beside float32 parameters, got")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rule", LISTS)
def test_scalars(rule, device):
    given = arguments(rule, device, shapes=SHAPES)
    for rates in (given["rates"].double(), given["rates"][:1], given["rates"].view(2, 1)):
        refused(rule, given | {"rates": rates}, r"rates: expected contiguous float32 \[2\], got")
    for name in {"factor", "found_inf", "steps"} & given.keys():
        for wrong in (given[name].double(), given[name].view(1), given["rates"]):
            message = rf"{name}: expected contiguous float32 \[\], got float"
            refused(rule, given | {name: wrong}, message)
        if device == "cuda":
            message = f"{name}: expected the device of rates"
            refused(rule, given | {name: given[name].cpu()}, message)


@pytest.mark.parametrize(
    ("rule", "name", "values", "expected"),
    [
        ("nesterov-l2", "decay", (-0.1, float("nan")), ">= 0"),
        ("nesterov-l2", "momentum", (-0.1, float("nan")), ">= 0"),
        ("adamw", "decay", (-0.1,), ">= 0"),
        ("adamw", "beta1", (-0.1, 1.0, float("nan")), "0 <= beta1 < 1"),
        ("adamw", "beta2", (-0.1, 1.0), "0 <= beta2 < 1"),
        ("adamw", "eps", (-1e-8,), ">= 0"),
    ],
)
def test_numbers(rule, name, values, expected, monkeypatch):
    import update_cases

    for value in values:
        op, settings = update_cases.RULES[rule]
        monkeypatch.setitem(update_cases.RULES, "wrong", (op, settings | {name: value}))
        refused("wrong", arguments(rule, shapes=SHAPES), f"{name}: expected {expected}, got")


def test_momenta_without_momentum():
    given = arguments("nesterov-l2", shapes=SHAPES)
    refused("sgd", given, "momenta: expected none without momentum, got 3")


def test_transforms_are_refused():
    given = arguments("momentum", shapes=[(4,)])

    def op(x):
        call(ops, Case("momentum"), given | {"grads": [x]})
        return x.sum()

    with pytest.raises(RuntimeError, match="use backend torch"):
        torch.func.grad(op)(given["grads"][0])
