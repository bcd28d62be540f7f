"""What only a GPU can show of the ops: streams, graphs, no waiting, more than 2^31 values."""

import augment_cases
import pytest
import torch
from augment_cases import FULL
from op_cases import Case, call, kinds, run, tensors_of

from fastcnn import ops

pytestmark = pytest.mark.cuda
SAME_BITS = {"rtol": 0, "atol": 0}
CASES = list(kinds((8, 64, 17, 15), 0.2, 0.1))


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.mark.parametrize("case", CASES, ids=str)
def test_side_stream(case):
    t = tensors_of(case, torch.bfloat16, "cuda")
    want = run(ops, case, t)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # work that is still under way when the op is called: another stream would not wait for it
        slow = {name: value.clone(memory_format=torch.preserve_format) for name, value in t.items()}
        slow["x"].zero_()
        torch.cuda._sleep(20_000_000)
        slow["x"].copy_(t["x"])
        got = run(ops, case, slow)
    stream.synchronize()
    torch.testing.assert_close(got, want, **SAME_BITS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_captured_in_a_graph(case):
    t = tensors_of(case, torch.bfloat16, "cuda")
    want = run(ops, case, t)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(ops, case, t)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(ops, case, t)
    for result in got.values():
        result.fill_(torch.nan)
    graph.replay()
    torch.testing.assert_close(got, want, **SAME_BITS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ops_do_not_wait_for_the_device(case):
    t = tensors_of(case, torch.bfloat16, "cuda")
    run(ops, case, t)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(ops, case, t)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_more_values_than_32_bits_count():
    shape = (513, 64, 256, 256)  # 2.15e9 values, 4.3 GB
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    x = x.to(memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x[-1, -1, -1, -1], x[-1, 0, -2, -2] = 5.0, -3.0
    bias = torch.ones(64, device="cuda")
    y = ops.bias_act(x, bias, 0.0)
    assert y[-1, -1, -1, -1] == 6.0
    assert y[-1, 0, -2, -2] == 0.0
    del y
    pooled = ops.bias_act_pool(x.requires_grad_(), bias, 0.0, (2, 2, 0))
    assert pooled[-1, -1, -1, -1] == 6.0
    (dx,) = torch.autograd.grad(pooled, x, torch.ones_like(pooled))
    assert dx[-1, -1, -1, -1] == 1.0
    assert dx[-1, -1, -2, -2] == 0.0


def test_statistics_of_more_values_than_32_bits_count():
    shape = (513, 64, 256, 256)
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of GPU memory")
    x = torch.ones(shape, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    x[256:] = 3.0
    zeros, ones = torch.zeros(64, device="cuda"), torch.ones(64, device="cuda")
    y = ops.bn_act(x, ones, zeros, zeros.clone(), ones.clone(), True)
    assert y[0, 0, 0, 0] == pytest.approx(-1, abs=0.02)
    assert y[-1, -1, -1, -1] == pytest.approx(1, abs=0.02)


def test_two_devices_are_kept_apart():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = Case((4, 32, 8, 8))
    t = tensors_of(case, torch.float32, "cuda:1")
    with torch.cuda.device(0):
        assert call(ops, case, t).device.index == 1


# augment


def test_augment_on_a_side_stream_and_without_waiting():
    t = augment_cases.tensors_of(FULL, "cuda")
    want = augment_cases.call(ops, FULL, t, torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            slow = t | {"images": torch.zeros_like(t["images"])}
            torch.cuda._sleep(20_000_000)
            slow["images"].copy_(t["images"])
            got = augment_cases.call(ops, FULL, slow, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    torch.testing.assert_close(got, want, **SAME_BITS)


def test_a_graph_of_augment_makes_the_batch_that_at_names():
    t = augment_cases.tensors_of(FULL, "cuda")
    places = [[0, 0], [0, 9], [1, 0], [5, 20]]
    wanted = []
    for place in places:
        t["at"].copy_(torch.tensor(place))
        wanted.append(augment_cases.call(ops, FULL, t, torch.bfloat16))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = augment_cases.call(ops, FULL, t, torch.bfloat16)
    for place, want in zip(places, wanted, strict=True):
        t["at"].copy_(torch.tensor(place))
        graph.replay()
        torch.testing.assert_close(got, want, **SAME_BITS)


def test_augment_makes_more_values_than_32_bits_count():
    case = augment_cases.Case(1024, 1024, padding=4, flip="random")
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of GPU memory")
    t = augment_cases.tensors_of(case, "cuda", samples=3, position=0)
    count = 2**31 // (1024 * 1024 * 3) + 2
    x, y = augment_cases.call(ops, case, t, torch.bfloat16, count=count)
    assert x.numel() > 2**31
    first, labels = augment_cases.call(ops, case, t, torch.bfloat16, count=3)
    for i in (0, count // 2, count - 1):
        assert torch.equal(x[i], first[i % 3])
        assert y[i] == labels[i % 3]
