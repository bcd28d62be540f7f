"""The wrappers of csrc/cuda/mma.cuh on the CPU, against plain matrix products; and as SASS."""

import re
import subprocess

import pytest
import sass
import torch
from simt import harness

from fastcnn.ops.native import toolchain

pytestmark = pytest.mark.full

HALVES = [torch.float16, torch.bfloat16]
# (rows, columns) of m16n8k16 products that mma_kernels.cu is compiled for
TILES = [(1, 2), (4, 6)]
# so many warps that the orders differ, the last one not whole
THREADS = 3 * 32 + 8


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("tiles", TILES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_product_of_fragments(chain, dtype, tiles, transposed):
    rows, columns = tiles
    # small integers: every sum is exact
    a, b = (torch.randint(-8, 9, (16, n)).to(dtype) for n in (16 * rows, 8 * columns))
    d = chain.buffer((16 * rows, 8 * columns), torch.float32)
    stored = [t if transposed else t.t().contiguous() for t in (a, b)]
    given = dict(zip("ab", (chain.buffer(t.shape, dtype, t) for t in stored), strict=True))
    chain.launch("mma_product", dtype, rows=rows, transposed=transposed, d=d, **given)
    chain.check_fences()
    assert torch.equal(d, 2 * a.float().t() @ b.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_product_is_accumulated_in_fp32(chain, dtype):
    a, b = (torch.randn(16, n).to(dtype) for n in (64, 48))
    d = chain.buffer((64, 48), torch.float32)
    chain.launch("mma_product", dtype, rows=4, transposed=True, d=d, a=a, b=b)
    torch.testing.assert_close(d, 2 * a.float().t() @ b.float(), rtol=1e-6, atol=2e-5)


def copied(chain, copying, stages=7):
    x, y = torch.randn(stages, 32, 4), chain.buffer((stages, 32, 4), torch.float32)
    chain.launch("mma_copies", torch.float32, copying=copying, x=x, y=y, stages=stages)
    chain.check_fences()
    x[:, 4::5] = 0
    return y, x


def test_copies_are_waited_for(chain):
    y, x = copied(chain, "right")
    assert torch.equal(y, x)


def test_a_copy_that_is_read_too_early_is_seen(chain):
    y, _ = copied(chain, "early_read")
    assert y[:3].isnan().all()


def test_a_stage_that_is_overwritten_too_early_is_seen(chain):
    """Three copies under way, two places for them."""
    y, _ = copied(chain, "early_write")
    assert y[:5].isnan().all()


def test_a_copy_that_is_left_over_ends_the_process(compiled):
    program = (
        "x, y = chain.torch.zeros(2, 32, 4), chain.torch.zeros(2, 32, 4)\n"
        'given = {"x": x, "y": y, "stages": 2, "copying": "left_over"}\n'
        'chain.Chain(kernels).launch("mma_copies", x.dtype, **given)\n'
    )
    with pytest.raises(AssertionError, match="has ended before 1 of its copies"):
        harness.run_apart(compiled, program)


@pytest.mark.parametrize("descending", [False, True])
def test_warps_are_as_far_apart_as_barriers_let_them(chain, kernels, descending):
    kernels.descending(descending)
    x, found = torch.randn(THREADS), {}
    for barrier in (True, False):
        y = chain.buffer((THREADS,), torch.float32)
        chain.launch("mma_mirror", x.dtype, x=x, y=y, threads=THREADS, rounds=4, barrier=barrier)
        found[barrier] = y
    torch.testing.assert_close(found[True], x + 6)
    assert not torch.isclose(found[False], x + 6).all()


def test_a_warp_barrier_lets_its_warp_alone_go_on(chain):
    y = chain.buffer((4 * 32,), torch.float32)
    chain.launch("mma_skew", y.dtype, y=y, threads=4 * 32)
    assert torch.equal(y, torch.arange(1, 5).repeat_interleave(32) * 32.0)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_instructions_that_are_compiled(tmp_path, target):
    cuda = toolchain.find_cuda()
    if not cuda:
        pytest.skip(toolchain.no_cuda())
    source, binary = harness.HERE / "mma_kernels.cu", tmp_path / "mma.cubin"
    command = [cuda.nvcc, "-std=c++17", "-cubin", f"-arch={target}", source, "-o", binary]
    subprocess.run(command, check=True, capture_output=True)
    code = sass.disassemble(binary)[target]
    for kernel, instructions in {
        "product_kernelI6__half": [r"HMMA\.16816\.F32 ", r"LDSM\.16\.M88\.4 "],
        "product_kernelI13__nv_bfloat16": [r"HMMA\.16816\.F32\.BF16 ", r"LDSM\.16\.MT88\.4 "],
        # the predicate at the end makes zeros of the rest
        "copies_kernel": [r"LDGSTS\.E\.128 [^;]*, P\d ;", r"LDGDEPBAR", r"DEPBAR\.LE SB0, 0x2"],
    }.items():
        found = "".join(text for name, text in code.items() if kernel in name)
        for instruction in instructions:
            assert re.search(instruction, found), (kernel, instruction)
