"""The machine code of the built library: tensor cores and 16-byte accesses where they are meant."""

import re

import pytest
import sass
from test_ptxas import ARCHS, TARGETS, conv_kernels, kernel_name

from fastcnn.ops.native import build, toolchain

pytestmark = pytest.mark.full

# the tensor cores, of Hopper's own instruction as well: sums in fp32, of either type
PRODUCT = r"\bHG?MMA\."
PRODUCTS = {"f16": PRODUCT + r"\w+\.F32\s", "bf16": PRODUCT + r"\w+\.F32\.BF16\s"}
FROM_SHARED = r"\bLDSM\.16\.M"
TURNED_FROM_SHARED = r"\bLDSM\.16\.MT88\.4"
# global memory, 16 bytes: loaded, stored, copied to shared memory; a copy ends with the predicate
# that writes zeros instead
LOAD, STORE = r"\bLDG\.E\S*\.128", r"\bSTG\.E\S*\.128"
COPY, ANY_COPY = r"\bLDGSTS\.E\S*\.128 [^;]*, !?U?P\d+ ;", r"\bLDGSTS\b"
SPILL = r"\b(LDL|STL)\b"


@pytest.fixture(scope="module")
def code():
    """Instructions by target and kernel."""
    if toolchain.find_cuda() is None or (reason := build.available(ARCHS)):
        pytest.skip(reason if toolchain.find_cuda() else toolchain.no_cuda())
    built = build.ensure(ARCHS, quiet=True)
    found = sass.disassemble(built.path)
    return {
        target: {kernel_name(name): text for name, text in found[target].items()}
        for target in TARGETS
    }


def wanted(kernel: str) -> dict[str, int]:
    """How many of which instructions a kernel is to contain at least."""
    if "_sum_" in kernel or "turn_filters" in kernel:
        return {}
    name, *_, taps = kernel.rstrip(">").split(", ")
    product = PRODUCTS[name.split("<")[1]]
    if kernel.startswith("conv_weight_gradient"):
        # sums leave value by value: a row of the result is as long as there are taps
        return {product: 16, TURNED_FROM_SHARED: 8, COPY: 2, LOAD: 2 * int(taps)}
    # copied, pending, single values; a residual, or x of a gradient, is one more load
    copies, loads = {"0": (6, 0), "1": (2, 4), "2": (0, 0)}[taps]
    return {product: 16, FROM_SHARED: 8, STORE: 1, COPY: copies, LOAD: loads + 1}


@pytest.mark.parametrize("target", TARGETS)
def test_convolutions_use_tensor_cores_and_16_bytes(code, target):
    for kernel in sorted(conv_kernels()):
        for instruction, least in wanted(kernel).items():
            found = len(re.findall(instruction, code[target][kernel]))
            assert found >= least, (kernel, instruction, found)
        copies = re.findall(ANY_COPY, code[target][kernel])
        assert len(copies) == len(re.findall(COPY, code[target][kernel])), kernel
        assert not re.search(SPILL, code[target][kernel]), kernel


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_behind_a_layer_use_16_bytes(code, target):
    for kernel in ("bn_act_kernel<bf16, 8, 1>", "bn_act_backward_kernel<f16, 8, 1>"):
        for instruction in (LOAD, STORE):
            assert re.search(instruction, code[target][kernel]), (kernel, instruction)
        assert not re.search(PRODUCT, code[target][kernel])
