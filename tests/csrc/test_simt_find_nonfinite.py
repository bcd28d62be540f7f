"""The CUDA kernel that looks for inf and NaN, compiled for the CPU."""

import itertools

import pytest
import torch
from nonfinite_cases import finite, patterns, places, planted
from simt import harness
from simt.chain import Chain
from test_simt import sanitized_run
from update_cases import SHAPES

pytestmark = pytest.mark.full

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BYTES, TABLE = 16384, 128  # of a block, tensors of a launch: find_nonfinite.cu


def found(chain, grads, before=0.0, expected=0):
    """found_inf after a launch on fenced copies of flat memory."""
    flat = [torch.as_strided(t, (t.numel(),), (1,)) for t in grads]
    copies = [chain.buffer(t.shape, t.dtype, t) for t in flat]
    names = [str(t.dtype).removeprefix("torch.") for t in grads]
    tensors = [(t.numel(), name, t.data_ptr()) for t, name in zip(copies, names, strict=True)]
    flag = chain.buffer((1,), torch.float32, torch.tensor([before]))
    status = chain.kernels.find_nonfinite_(tensors=tensors, found_inf=flag.data_ptr())
    assert status == expected
    chain.check_fences()
    return flag.item()


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_pattern_in_every_tensor(kernels, dtype, misaligned):
    chain = Chain(kernels, misaligned)
    grads = [finite(dtype, shape) for shape in SHAPES]
    assert found(chain, grads) == 0
    assert found(chain, grads, before=0.5) == 0.5
    for i, pattern in itertools.product(range(len(grads)), patterns(dtype)):
        if grads[i].numel():
            place = len(patterns(dtype)) * grads[i].numel() // 7 % grads[i].numel()
            wrong = [*grads[:i], planted(grads[i], place, pattern), *grads[i + 1 :]]
            assert found(chain, wrong) == 1, (grads[i].shape, hex(pattern))


@pytest.mark.parametrize("misaligned", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_place_near_a_boundary(kernels, dtype, misaligned):
    chain = Chain(kernels, misaligned)
    block = BYTES // dtype.itemsize
    for count in (block - 1, block, block + 1, 2 * block + 9):
        grad = finite(dtype, (count,))
        assert found(chain, [grad]) == 0
        for place in places(count, block // 4):
            assert found(chain, [planted(grad, place, patterns(dtype)[0])]) == 1, (count, place)


@pytest.mark.parametrize("count", [TABLE - 1, TABLE, TABLE + 1, 2 * TABLE + 5])
def test_more_tensors_than_a_table_holds(chain, count):
    shapes = [(0,) if i % 9 == 5 else ((i * 37) % 90,) for i in range(count - 1)] + [(9001,)]
    for some in (shapes, shapes[::-1], [(0,)] * count):
        grads = [finite(DTYPES[i % 3], shape) for i, shape in enumerate(some)]
        assert found(chain, grads) == 0
        for i in (0, 1, TABLE - 2, TABLE - 1, TABLE, count - 2, count - 1):
            if i < count and grads[i].numel():
                wrong = planted(grads[i], -1, patterns(grads[i].dtype)[0])
                assert found(chain, [*grads[:i], wrong, *grads[i + 1 :]]) == 1, i


def test_launches(kernels):
    shape = {"sizes": (3, BYTES // 2, 1, 1), "dtype": "bfloat16", "pool": (2, 2, 0)}
    want = [("find_nonfinite_kernel", 3, 1, 256, 0)]
    assert kernels.launch_configuration(op="find_nonfinite_", **shape) == want
    nothing = kernels.launch_configuration(op="find_nonfinite_", **shape | {"sizes": (0, 1, 1, 1)})
    assert nothing == []


def test_fp64_is_refused_before_anything_is_launched(chain):
    grads = [torch.tensor([torch.nan]), torch.ones(2, dtype=torch.float64)]
    assert found(chain, grads, expected=1) == 0


# errors that must be seen

PROGRAM = """
from test_simt_find_nonfinite import test_every_place_near_a_boundary, DTYPES
from test_simt_find_nonfinite import test_every_pattern_in_every_tensor
from test_simt_find_nonfinite import test_more_tensors_than_a_table_holds, TABLE
from simt.chain import Chain
def seen():
    try:
        for dtype in DTYPES:
            test_every_pattern_in_every_tensor(kernels, dtype, False)
        test_every_place_near_a_boundary(kernels, DTYPES[2], False)
        test_more_tensors_than_a_table_holds(Chain(kernels), TABLE + 1)
    except AssertionError:
        return True
print(seen())
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Dtype::f16    ? 0x7c00u", "Dtype::f16    ? 0x7c00u"),  # no error
        ("Dtype::f16    ? 0x7c00u", "Dtype::f16    ? 0x7f80u"),
        ("(word & low) == low || ", ""),
        ("rest / 2, masks", "rest / 2 - 1, masks"),
        (
            "tensor_of_block(table, blockIdx.x)",
            "tensor_of_block(table, blockIdx.x ? blockIdx.x - 1 : 0)",
        ),
        ("i + 1 < args.count", "i < args.count"),
    ],
)
def test_planted_errors_are_seen(compiled, tmp_path, old, new):
    name = "find_nonfinite.cu"
    plant = harness.Plant(compiled.parent, name, name, old, new)
    path = harness.compile_module(tmp_path, ["-O1"], plant)
    said = harness.run_apart(path, PROGRAM)
    assert (said == "None\n") == (old == new), said


def test_sanitizers_see_a_planted_overrun(sanitized, tmp_path):
    """What is right passes in test_simt.py."""
    name = "find_nonfinite.cu"
    plant = harness.Plant(sanitized.parent, name, name, "? bytes / 16 : 0", "? bytes / 16 + 1 : 0")
    done = sanitized_run(harness.compile_module(tmp_path, harness.SANITIZE, plant))
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
