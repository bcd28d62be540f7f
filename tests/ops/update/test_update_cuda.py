"""What only a GPU can show of the updates: streams, graphs that follow the rates, no waiting."""

import pytest
import torch
from op_cases import SAME_BITS
from update_cases import Case, arguments_of, call, each, run

from fastcnn import ops
from fastcnn.ops import reference

pytestmark = pytest.mark.cuda
MODULES = [pytest.param(ops, id="fused"), pytest.param(reference, id="torch")]
RULES = ["sgd", "nesterov-l2", "momentum-decoupled", "adam-l2", "adamw"]
SHAPES = [(64,), (), (5, 3), (128, 64, 3, 3), (33001,)] * 20


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def case_of(rule):
    return Case(rule, torch.float16, True, 0.375, 0.0)


def arguments(rule):
    return arguments_of(case_of(rule), torch.float16, "cuda", SHAPES)


def lists(given):
    return {name: value for name, value in given.items() if isinstance(value, list)}


@pytest.mark.parametrize("rule", RULES)
def test_side_stream(rule):
    given = arguments(rule)
    want = run(ops, case_of(rule), given)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # work that is still under way when the op is called: another stream would not wait for it
        slow = each(given, torch.zeros_like)
        torch.cuda._sleep(20_000_000)
        for name, tensors in lists(given).items():
            torch._foreach_copy_(slow[name], tensors)
        call(ops, case_of(rule), slow)
    stream.synchronize()
    torch.testing.assert_close(lists(slow), want, **SAME_BITS)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("rule", RULES)
def test_a_graph_follows_rates_steps_factor_and_found_inf(rule, module):
    given = arguments(rule)
    scalars = [n for n in ("rates", "steps", "factor", "found_inf") if n in given]
    captured = each(given, torch.clone) | {name: given[name].clone() for name in scalars}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(module, case_of(rule), captured)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(module, case_of(rule), captured)
    plain = each(given, torch.clone)
    for step in range(1, 6):
        values = {"rates": [0.1 / step, 0.2 * step], "steps": step, "factor": 0.5**step}
        values["found_inf"] = float(step == 3)
        for name in scalars:
            plain[name] = torch.tensor(values[name], device="cuda", dtype=torch.float32)
            captured[name].copy_(plain[name])
        graph.replay()
        call(module, case_of(rule), plain)
        torch.testing.assert_close(lists(captured), lists(plain), **SAME_BITS)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("rule", RULES)
def test_updates_do_not_wait_for_the_device(rule, module):
    given = arguments(rule)
    run(module, case_of(rule), given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(module, case_of(rule), given)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_launches():
    """100 tensors: two tables."""
    given = arguments("adamw")
    run(ops, case_of("adamw"), given)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call(ops, case_of("adamw"), given)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "kernel" in event.name.lower()]
    assert sum("update_kernel" in name for name in names) == 2


def test_more_values_than_32_bits_count():
    count = 2**31 + 5
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    weight = torch.zeros(count, device="cuda")
    grad = torch.zeros(count, device="cuda", dtype=torch.bfloat16)
    grad[-1] = grad[2**30] = 1
    settings = {"decay": 0.0, "decoupled": False, "momentum": 0.0, "nesterov": False}
    ops.sgd_([weight], [grad], [], [], [], torch.tensor([0.5, 0.0], device="cuda"), **settings)
    assert weight[-1] == weight[2**30] == -0.5
    assert weight.count_nonzero() == 2
