"""Errors planted in the convolution's CUDA kernels: the checks of test_simt_conv.py see each."""

import ast
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from simt import harness

from fastcnn.ops.native import toolchain

pytestmark = pytest.mark.full


class Planted(NamedTuple):
    """An error as in harness.Plant, and the check that is to see it."""

    source: str
    file: str
    old: str
    new: str
    check: str


FORWARD, DATA, WEIGHT = "conv_bn_act.cu", "conv_data_gradient.cu", "conv_weight_gradient.cu"
CONV, INPUT = "conv.cuh", "conv_input.cuh"
PLANTED = {
    "the last taps dropped": Planted(
        FORWARD,
        CONV,
        "(g.taps + kTileTaps - 1) / kTileTaps",
        "g.taps / kTileTaps",
        "check_forward(conv, SMALL[0], BF16, Pending(), Epilogue())",
    ),
    "the pads exchanged": Planted(
        FORWARD,
        INPUT,
        "shape.top,\n          shape.left,",
        "shape.left,\n          shape.top,",
        "check_forward(conv, PADDED, BF16, Pending(), Epilogue())",
    ),
    "a stage read without a barrier": Planted(
        FORWARD,
        CONV,
        "wait_copies<kStages - 2>();\n      __syncthreads();",
        "wait_copies<kStages - 2>();",
        "check_forward(conv, SMALL[0], BF16, Pending(), Epilogue())",
    ),
    "a stage read before its copies": Planted(
        FORWARD,
        CONV,
        "wait_copies<kStages - 2>()",
        "wait_copies<kStages - 1>()",
        "check_forward(conv, SMALL[0], BF16, Pending(), Epilogue())",
    ),
    "sums over stages that are still read": Planted(
        FORWARD,
        CONV,
        "wait_copies<0>();\n    __syncthreads();",
        "wait_copies<0>();",
        "check_forward(conv, SMALL[0], BF16, Pending(), Epilogue())",
    ),
    "an epilogue without a barrier": Planted(
        FORWARD,
        CONV,
        "::kPitch);\n    __syncthreads();",
        "::kPitch);",
        "check_forward(conv, SMALL[0], BF16, Pending(), Epilogue())",
    ),
    "padding that is made as well": Planted(
        FORWARD,
        CONV,
        "if (inside >> i & 1) made",
        "made",
        "check_forward(conv, SMALL[0], BF16, NORM, Epilogue())",
    ),
    "statistics of unrounded values": Planted(
        FORWARD,
        FORWARD,
        "to_float(rounded<T>(activate(z, args.post_slope)))",
        "activate(z, args.post_slope)",
        "check_forward(conv, SMALL[0], BF16, Pending(), RAW)",
    ),
    "a mask without its slope": Planted(
        DATA,
        DATA,
        "gradient(negative, input.post_slope, dz)",
        "gradient(negative, 0.f, dz)",
        "check_data_gradient(conv, SMALL[0], BF16, PENDING[2])",
    ),
    "sums of unrounded gradients": Planted(
        DATA,
        DATA,
        "to_float(rounded<T>(gradient(negative, input.post_slope, dz)))",
        "gradient(negative, input.post_slope, dz)",
        "test_sums_are_those_of_the_rounded_gradient(conv)",
    ),
    "filters that are not turned": Planted(
        DATA,
        DATA,
        "places - 1 - place)",
        "place)",
        "check_data_gradient(conv, SMALL[0], BF16, Pending())",
    ),
    "the gradient of a stride between its pixels": Planted(
        DATA,
        INPUT,
        "if (inner_row * g.spread != row || inner_column * g.spread != column) return -1;",
        "",
        "check_data_gradient(conv, SMALL[1], BF16, Pending())",
    ),
    "the last pixels dropped": Planted(
        WEIGHT,
        WEIGHT,
        "(left + kStepPixels - 1) / kStepPixels",
        "left / kStepPixels",
        "check_weight_gradient(conv, SMALL[0], BF16, NORM)",
    ),
    "pixels of the gradient read without a barrier": Planted(
        WEIGHT,
        WEIGHT,
        "wait_copies<kStages - 2>();\n    __syncthreads();",
        "wait_copies<kStages - 2>();",
        "check_weight_gradient(conv, SMALL[0], BF16, NORM)",
    ),
}

# Each library in a process of its own, which the first one is copied for: torch is imported once.
PROGRAM = """
import os
import test_simt_conv as tests
from simt.conv import ConvChain

def run(path, check):
    tests.torch.set_num_threads(1)
    tests.torch.manual_seed(0)
    conv = ConvChain(harness.load_module(harness.Path(path)))
    try:
        eval(check, {**vars(tests), "conv": conv})
    except AssertionError:
        return 1
    return 0

found = []
for path, check in runs:
    child = os.fork()
    if not child:
        os._exit(run(path, check))
    found.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(found)
"""


@pytest.fixture(scope="module")
def seen(compiled, tmp_path_factory):
    """Exit status of the check of every planted error, with it and without it: 1, it was seen."""

    def compiled_with(planted):
        plant = harness.Plant(compiled.parent, *planted[:4])
        # the compiler takes longer than the program, above -O0
        return harness.compile_module(tmp_path_factory.mktemp("planted"), ["-O0"], plant)

    with ThreadPoolExecutor(toolchain.parallel_jobs()) as pool:
        paths = list(pool.map(compiled_with, PLANTED.values()))
    checks = [planted.check for planted in PLANTED.values()]
    runs = [(str(path), check) for path, check in zip(paths, checks, strict=True)]
    runs += [(str(compiled), check) for check in checks]
    found = ast.literal_eval(harness.run_program(f"runs = {runs}\n{PROGRAM}"))
    return dict(
        zip(PLANTED, zip(found[: len(checks)], found[len(checks) :], strict=True), strict=True)
    )


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_seen(seen, error):
    with_it, without = seen[error]
    assert without == 0
    assert with_it == 1
