"""What captures leave behind in torch, on a fake of its CUDA half; test_cuda.py asks a GPU."""

import gc
import weakref

import pytest
import torch
from fake_cuda import FakeCuda
from graph_twin import CpuTwin
from image_files import make_images
from loader_cases import FUSED, Staged

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.config import OptimConfig
from fastcnn.train import graph, step
from fastcnn.train.distributed import Distributed
from fastcnn.train.graph import CudaRecorder, Replay
from fastcnn.train.numerics.precision import Precision
from fastcnn.train.step import TrainStep

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(graph, "_broken", [])
    return FakeCuda(monkeypatch)


def broken(cuda, where):
    """Break a capture off; returns the recorder and what it had captured and used before."""
    recorder = CudaRecorder(GPU)
    before = recorder.capture(lambda: None)
    stream, pool, current = recorder.stream, recorder.pool, cuda.current
    cuda.breaks = where

    def work():
        cuda.allocate()
        if where == "work":
            cuda.break_off()

    with pytest.raises(RuntimeError):
        recorder.capture(work)
    cuda.breaks = ""
    assert cuda.current is current
    assert cuda.generator.state == "before"
    return recorder, before, stream, pool


@pytest.mark.full
@pytest.mark.parametrize("where", ["begin", "work", "instantiation"])
def test_a_capture_that_was_broken_off_leaves_nothing_in_the_allocator(cuda, where):
    _, before, _, pool = broken(cuda, where)
    gc.collect()
    cuda.allocate()
    assert cuda.underway == {}
    assert cuda.uses[pool] == 1  # that of the first graph
    before()
    del before
    assert cuda.uses[pool] == 0


@pytest.mark.full
def test_the_next_capture_has_another_stream_and_pool(cuda):
    recorder, _, stream, pool = broken(cuda, "work")
    assert recorder.stream is not stream
    assert recorder.pool != pool
    recorder.capture(cuda.allocate)()
    assert cuda.uses[recorder.pool] == 0  # freed again
    assert cuda.underway == {}


@pytest.mark.full
def test_a_broken_graph_stays_for_the_allocator_of_pinned_memory(cuda, monkeypatch):
    made = []
    original = torch.cuda.CUDAGraph
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: made.append(weakref.ref(found := original())) or found
    )
    recorder, *_ = broken(cuda, "work")
    del recorder
    gc.collect()
    assert [one() is not None for one in made[1:]] == [True]


class Cycle:
    def __init__(self, told):
        self.self, self.told = self, told

    def __del__(self):
        self.told.append("collected")


@pytest.mark.full
@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_garbage_is_collected_before_a_capture_and_none_in_it(cuda, enabled, fails):
    told = []

    def work():
        told.append(f"work, {gc.isenabled()}")
        if fails:
            cuda.break_off()

    recorder = CudaRecorder(GPU)
    gc.disable()
    try:
        Cycle(told)
        if enabled:
            gc.enable()
        if fails:
            with pytest.raises(RuntimeError):
                recorder.capture(work)
        else:
            recorder.capture(work)
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert told == ["collected", "work, False"]


def test_what_is_made_aside_is_made_on_the_stream_of_the_captures(cuda):
    recorder, current, seen = CudaRecorder(GPU), cuda.current, []
    with recorder.aside():
        seen.append(cuda.current)
        assert (recorder.stream.waited, current.waited) == ([current], [])
    recorder.capture(lambda: seen.append(cuda.current))
    assert seen == [recorder.stream] * 2
    assert cuda.current is current
    assert current.waited == [recorder.stream]


def test_ranks_exchange_gradients_on_the_stream_of_the_captures(monkeypatch):
    twin, seen = CpuTwin(), []
    monkeypatch.setattr(step, "parallel", lambda *_: seen.append(twin.is_aside))
    model = build(NETWORKS["murgolo-base"], 32, 10, "torch")
    options = {"backend": "torch", "ranks": Distributed(0, 2)}
    TrainStep(model, OptimConfig(), Precision(), 1, 0, CPU, recorder=twin, **options)
    TrainStep(model, OptimConfig(), Precision(), 1, 0, CPU, **options)
    assert seen == [True, False]


def test_a_loader_whose_batches_a_graph_makes_is_kept():
    replay = Replay(CpuTwin(), warm_up=0)
    loader = Staged(make_images(10, 32, 32), FUSED, backend="torch")
    for _ in replay.epoch(loader, lambda images, labels: None):
        pass
    kept, loader = weakref.ref(loader), None
    gc.collect()
    assert replay.captured == 2
    assert kept() is not None  # its address is no other's
