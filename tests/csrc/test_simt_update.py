"""The CUDA kernel of the updates, compiled for the CPU, against the oracle in fp64."""

import subprocess
import sys

import pytest
import torch
from simt import harness
from simt.chain import Chain
from test_simt import sanitized_run
from update_cases import (
    RULES,
    SHAPES,
    Case,
    arguments_of,
    check_errors,
    combinations,
    in_fp64,
    run,
)

from fastcnn.ops import reference

pytestmark = pytest.mark.full

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SAME_BITS = {"rtol": 0, "atol": 0}
STATES = {"sgd_": ("momenta",), "adam_": ("exp_avgs", "exp_avg_sqs")}
LISTS = {"params", "grads", "momenta", "exp_avgs", "exp_avg_sqs", "copies", "averages"}
TRAP = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
CHUNK, TABLE = 4096, 64  # values a block and tensors a launch: update.cu


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def update(chain, case, arguments, off=LISTS):
    """The lists after a step by the launcher, on fenced copies of flat memory.

    off: the lists that a misaligned chain has off 16 bytes.
    """
    name, settings = RULES[case.rule]
    after, misaligned = dict(arguments), chain.misaligned
    for key in LISTS & arguments.keys():
        chain.misaligned = misaligned and key in off
        flat = [torch.as_strided(t, (t.numel(),), (1,)) for t in arguments[key]]
        after[key] = [chain.buffer(t.shape, t.dtype, t) for t in flat]
    chain.misaligned = misaligned
    count = len(after["params"])
    lists = [after["params"], after["grads"]]
    lists += [after[state] for state in STATES[name]] + [[]] * (2 - len(STATES[name]))
    lists += [after["copies"], after["averages"]]
    columns = [[t.data_ptr() for t in some] or [0] * count for some in lists]
    counts = [t.numel() for t in after["params"]]
    scalars = {n: after[n].data_ptr() for n in ("rates", "steps", "factor", "found_inf")
               if after.get(n) is not None}  # fmt: skip
    kinds = {"dtype": "float32", "grad_dtype": name_of(arguments["grads"][0].dtype)}
    kinds["copy_dtype"] = name_of(case.copies or torch.bfloat16)
    tensors = list(zip(counts, *columns, strict=True))
    assert getattr(chain.kernels, name)(tensors=tensors, **kinds, **scalars, **settings) == 0
    chain.check_fences()
    found = {}
    for key in LISTS & arguments.keys():
        pairs = zip(after[key], arguments[key], strict=True)
        found[key] = [t.as_strided(old.shape, old.stride()) for t, old in pairs]
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_combination_against_the_oracle(chain, rule, dtype):
    for copies in (torch.bfloat16, torch.float16):
        for case in combinations(rule, copies):
            if case.copies is None and copies == torch.float16:
                continue
            arguments = arguments_of(case, dtype)
            found, plain = update(chain, case, arguments), run(reference, case, arguments)
            truth = run(reference, case, in_fp64(arguments))
            check_errors(found, truth, plain, arguments)
            for i, got in enumerate(found["copies"]):
                old, new = arguments["copies"][i], found["params"][i].to(copies)
                torch.testing.assert_close(got, old if case.found_inf else new, **SAME_BITS)
            if case.found_inf:
                kept = {name: v for name, v in found.items() if name != "averages"}
                torch.testing.assert_close(
                    kept, {name: arguments[name] for name in kept}, **SAME_BITS
                )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", ["nesterov-l2", "adamw"])
def test_bits_do_not_depend_on_alignment_order_or_neighbours(kernels, chain, rule, dtype):
    case = Case(rule, torch.bfloat16, True, 0.375, 0.0)
    arguments = arguments_of(case, dtype, shapes=[*SHAPES, (CHUNK,), (CHUNK + 1,)])
    want = update(chain, case, arguments)
    for off in (LISTS, *({name} for name in LISTS)):
        found = update(Chain(kernels, True), case, arguments, off)
        torch.testing.assert_close(found, want, **SAME_BITS)
    kernels.descending(True)
    torch.testing.assert_close(update(chain, case, arguments), want, **SAME_BITS)
    for i in range(len(want["params"])):
        one = {n: v[i : i + 1] if isinstance(v, list) else v for n, v in arguments.items()}
        for name, tensors in update(chain, case, one).items():
            torch.testing.assert_close(tensors, want[name][i : i + 1], **SAME_BITS)


@pytest.mark.parametrize("rule", ["nesterov-l2", "adamw"])
@pytest.mark.parametrize("count", [TABLE - 1, TABLE, TABLE + 1, 3 * TABLE + 5])
def test_more_tensors_than_a_table_holds(chain, rule, count):
    case = Case(rule, torch.float16, True)
    shapes = [(0,) if i % 9 == 5 else ((i * 37) % 90,) for i in range(count - 1)] + [(CHUNK + 3,)]
    for some in (shapes, shapes[::-1], [(0,)] * count):
        arguments = arguments_of(case, torch.float32, shapes=some)
        truth = run(reference, case, in_fp64(arguments))
        found = update(chain, case, arguments)
        check_errors(found, truth, run(reference, case, arguments), arguments)


def test_launches(kernels):
    """One for all tensors, its grid by their sizes alone."""
    shape = {"sizes": (3, CHUNK, 1, 1), "dtype": "bfloat16", "pool": (2, 2, 0)}
    for op, rule in (("sgd_", "sgd"), ("adam_", "adam")):
        want = [(f"update_kernel<bf16, {rule}>", 3, 1, 256, 0)]
        assert kernels.launch_configuration(op=op, **shape) == want
        nothing = kernels.launch_configuration(op=op, **shape | {"sizes": (0, 1, 1, 1)})
        assert nothing == []


def test_fp64_is_refused(kernels):
    rates = torch.zeros(2)
    given = {"tensors": [], "copy_dtype": "bfloat16", "rates": rates.data_ptr()}
    for dtype, grad in (("float64", "float64"), ("float32", "float64")):
        status = kernels.sgd_(
            dtype=dtype, grad_dtype=grad, **given, decay=0, decoupled=True, momentum=0, nesterov=0
        )
        assert status == 1


# errors that must be seen


def test_sanitizers_see_a_planted_overrun(sanitized, tmp_path):
    """Whole vectors up to a tensor's end. What is right passes in test_simt.py."""
    plant = harness.Plant(
        sanitized.parent, "update.cu", "update.cu", "count - count % kValues", "count"
    )
    done = sanitized_run(harness.compile_module(tmp_path, harness.SANITIZE, plant))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


PROGRAM = f"""
import sys
sys.path[:0] = {sys.path!r}
import torch
from simt.chain import Chain
from simt.harness import Path, load_module
from test_simt_update import CHUNK, LISTS, SHAPES, Case, arguments_of, check_errors, in_fp64
from test_simt_update import reference, run, update
kernels = load_module(Path(sys.argv[1]))
case = Case("nesterov-l2", torch.float16, True)
arguments = arguments_of(case, torch.bfloat16, shapes=[*SHAPES, (CHUNK + 1,)])
truth, plain = run(reference, case, in_fp64(arguments)), run(reference, case, arguments)
for off in (set(), *({{name}} for name in LISTS)):
    found = update(Chain(kernels, True), case, arguments, off)
    check_errors(found, truth, plain, arguments)
print("nothing wrong")
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("fits(weight, 4)", "fits(weight, 4)"),  # no error
        (
            "tensor_of_block(table, blockIdx.x)",
            "tensor_of_block(table, blockIdx.x ? blockIdx.x - 1 : 0)",
        ),
        ("static_cast<int64_t>(blockIdx.x - table.first_block[index])", "int64_t(blockIdx.x)"),
        ("fits(weight, 4)", "true"),
        ("whole, count, step", "whole, count - 1, step"),
    ],
)
def test_planted_errors_are_seen(compiled, tmp_path, old, new):
    plant = harness.Plant(compiled.parent, "update.cu", "update.cu", old, new)
    path = harness.compile_module(tmp_path, ["-O1", *TRAP], plant)
    # a process of its own: one has one module of a name, and it may be trapped
    program = [sys.executable, "-c", PROGRAM, path]
    done = subprocess.run(program, capture_output=True, text=True)
    assert (done.stdout == "nothing wrong\n") == (old == new), done.stderr
