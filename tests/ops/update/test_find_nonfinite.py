"""find_nonfinite_ and its oracle: every place, every bit pattern, any mixture of dtypes."""

import itertools

import pytest
import torch
from nonfinite_cases import finite, patterns, places, planted
from op_cases import DEVICES
from update_cases import SHAPES

from fastcnn import ops
from fastcnn.ops import reference

FUSED = {
    "cpu": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
MODULES = [pytest.param(ops, id="fused"), pytest.param(reference, id="torch")]
ON_EACH = [
    pytest.param(d, t, marks=[pytest.mark.cuda] if d == "cuda" else [], id=f"{d}-{str(t)[6:]}")
    for d, dtypes in FUSED.items()
    for t in dtypes
]


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def found(module, grads, before=0.0):
    device = grads[0].device if grads else "cpu"
    flag = torch.tensor(before, device=device)
    module.find_nonfinite_(grads, flag)
    return flag.item()


def mixed(device, shapes=SHAPES):
    kinds = itertools.cycle(FUSED[device])
    return [finite(next(kinds), shape, device) for shape in shapes]


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
def test_every_pattern_at_the_ends_of_every_tensor(device, dtype, module):
    grads = [finite(dtype, shape, device) for shape in SHAPES]
    assert found(module, grads) == 0
    for i, grad in enumerate(grads):
        for place, pattern in itertools.product({0, grad.numel() - 1} - {-1}, patterns(dtype)):
            if place < grad.numel():
                wrong = [*grads[:i], planted(grad, place, pattern), *grads[i + 1 :]]
                assert found(module, wrong) == 1, (grad.shape, place, hex(pattern))


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("device", DEVICES)
def test_any_mixture_of_dtypes(device, module):
    grads = mixed(device)
    assert found(module, grads) == 0
    for i, grad in enumerate(grads):
        if grad.numel():
            wrong = planted(grad, grad.numel() // 2, patterns(grad.dtype)[2])
            assert found(module, [*grads[:i], wrong, *grads[i + 1 :]]) == 1


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_set_stays_set(device, module):
    for before in (0.0, 1.0, 0.5):
        assert found(module, mixed(device), before) == before
        assert found(module, [torch.tensor([torch.nan], device=device)], before) == 1
    for none in ([], [torch.empty(0, device=device)]):
        assert found(module, none) == 0


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
def test_every_place_near_a_boundary_aligned_or_not(device, dtype):
    for offset in (0, 1, 3):
        grad = finite(dtype, (70001,), device, offset)
        assert found(ops, [grad]) == 0
        for place in places(70001, 1024):
            grad[place], kept = torch.inf, grad[place].clone()
            assert found(ops, [grad]) == 1, (offset, place)
            grad[place] = kept


@pytest.mark.parametrize("device", DEVICES)
def test_300_tensors(device):
    grads = mixed(device, [((i * 37) % 300,) for i in range(300)])
    assert found(ops, grads) == 0
    for i in range(300):
        if grads[i].numel():
            wrong = planted(grads[i], -1, patterns(grads[i].dtype)[0])
            assert found(ops, [*grads[:i], wrong, *grads[i + 1 :]]) == 1, i


def test_any_number_of_threads():
    grad = finite(torch.bfloat16, (300001,))
    for threads, place in itertools.product((1, 2, 3), places(300001, 100000)):
        torch.set_num_threads(threads)
        assert found(ops, [planted(grad, place, patterns(grad.dtype)[3])]) == 1
        assert found(ops, [grad]) == 0


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    grads = mixed(device, [(4,), (2, 3, 3, 3), (), (5,)])
    for wrong in (grads, [*grads, torch.tensor([torch.nan], device=device)]):
        flag = torch.tensor(0.0, device=device)
        torch.library.opcheck(torch.ops.fastcnn.find_nonfinite_.default, (wrong, flag))


def test_tracing_with_cuda_tensors():
    with torch._subclasses.FakeTensorMode():
        grads = [torch.empty(4, device="cuda", dtype=dtype) for dtype in FUSED["cuda"]]
        flag = torch.zeros((), device="cuda")
        assert torch.ops.fastcnn.find_nonfinite_(grads, flag) is None


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_refused(device):
    right = finite(torch.float32, (6, 5), device)
    flag = torch.tensor(0.0, device=device)
    other = "float16 or float64" if device == "cpu" else "or float16"
    cases = [
        ([right, right.int()], flag, rf"grads\[1\]: expected float32, bfloat16.*{other}, got "),
        ([right.cfloat()], flag, r"grads\[0\]: expected float32.*; use backend torch"),
        ([right[:, 1:]], flag, r"grads\[0\]: expected memory without gaps or overlap, got shape"),
        ([right[:1].expand(6, 5)], flag, r"grads\[0\]: expected memory without gaps"),
        ([right], flag.double(), r"found_inf: expected contiguous float32 \[\], got float64"),
        ([right], flag.view(1), r"found_inf: expected contiguous float32 \[\], got float32 \[1\]"),
    ]
    if device == "cuda":
        cases += [
            ([right, right.cpu()], flag, r"grads\[1\]: expected the device of found_inf"),
            ([right.double()], flag, "bfloat16 or float16, got float64; use backend torch"),
        ]
    for grads, where, message in cases:
        with pytest.raises(RuntimeError, match=message):
            ops.find_nonfinite_(grads, where)
        assert where == 0


@pytest.mark.cuda
@pytest.mark.parametrize("module", MODULES)
def test_a_graph_follows_the_gradients_and_nothing_waits(module):
    grads = mixed("cuda")
    flag = torch.zeros((), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            module.find_nonfinite_(grads, flag)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        module.find_nonfinite_(grads, flag)
    for grad in grads:
        if grad.numel():
            kept = grad.clone()
            flag.zero_()
            graph.replay()
            assert flag == 0
            grad.view(-1)[-1:].fill_(torch.nan) if grad.dim() < 4 else grad.fill_(torch.nan)
            graph.replay()
            assert flag == 1
            grad.copy_(kept)


@pytest.mark.cuda
def test_one_launch_a_table():
    grads = mixed("cuda", [(5,)] * 129)
    flag = torch.zeros((), device="cuda")
    ops.find_nonfinite_(grads, flag)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        ops.find_nonfinite_(grads, flag)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "kernel" in event.name.lower()]
    assert ["find_nonfinite" in name for name in names] == [True, True]


@pytest.mark.cuda
def test_more_bytes_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    grad = torch.zeros(2**31 + 5, device="cuda", dtype=torch.bfloat16)
    assert found(ops, [grad]) == 0
    grad[-1] = torch.nan
    assert found(ops, [grad]) == 1
