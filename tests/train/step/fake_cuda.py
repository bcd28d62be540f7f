"""torch's captures without a GPU: its class `torch.cuda.graph` as it is, over a graph and an
allocator that behave as those of its C++ (CUDAGraph.cpp, CUDACachingAllocator.cpp).

A capture that was broken off raises at its end before the allocation to its pool is ended, and each
allocation until then asks the graph, by address.
"""

import itertools
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext

import torch


class FakeCuda:
    """What is there in place of a GPU. `underway`: captures that the allocator knows of, by pool;
    `uses`: of each pool; `breaks`: where the next capture fails; `lost`: what the GPU says of every
    call after an illegal access."""

    def __init__(self, monkeypatch):
        self.underway, self.uses, self.lost = {}, Counter(), ""
        self.breaks, self.invalid = "", False
        self.generator = Generator()
        self.current = Stream(self)
        pools = ((0, number) for number in itertools.count(1))
        for name, fake in {
            "Stream": lambda device: Stream(self),
            "current_stream": lambda device=None: self.current,
            "set_stream": lambda stream: setattr(self, "current", stream),
            "stream": self.on,
            "synchronize": self.synchronize,
            "empty_cache": self.synchronize,
            "device": lambda device: nullcontext(),
            "graph_pool_handle": lambda: next(pools),
            "default_generators": [self.generator],
            "CUDAGraph": lambda: Graph(self),
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        for name, fake in {
            "_host_emptyCache": lambda: None,
            "_cuda_endAllocateToPool": self.end,
            "_cuda_releasePool": self.release,
        }.items():
            monkeypatch.setattr(torch._C, name, fake)

    @contextmanager
    def on(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before  # an error that comes through leaves it, as the end of a capture does

    def synchronize(self, device=None):
        if self.lost:
            raise torch.AcceleratorError(self.lost)

    def allocate(self):
        for graph in self.underway.values():
            assert graph() is not None, "a graph that was freed is asked"

    def break_off(self):
        """As a call that waits for the device does within a capture."""
        self.invalid = True
        raise RuntimeError("operation not permitted when stream is capturing")

    def end(self, index, pool):
        assert index == 0
        if self.underway.pop(pool, None) is None:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def release(self, index, pool):
        self.uses[pool] -= 1
        assert self.uses[pool] >= 0


class Stream:
    device_index = 0

    def __init__(self, cuda):
        self.cuda, self.waited = cuda, []

    def wait_stream(self, other):
        self.waited.append(other)


class Generator:
    def __init__(self):
        self.state = "before"

    def clone_state(self):
        return Generator()

    def graphsafe_set_state(self, state):
        self.state = state.state


class Graph:
    def __init__(self, cuda):
        self.cuda, self.pool, self.ended, self.replays = cuda, None, False, 0

    def capture_begin(self, pool, capture_error_mode, **rest):
        assert capture_error_mode == "thread_local"
        assert pool not in self.cuda.underway
        if self.cuda.breaks == "begin":
            raise RuntimeError("CUDA graphs must be captured on a non-default stream")
        self.pool, self.cuda.underway[pool] = pool, weakref.ref(self)
        self.cuda.uses[pool] += 1
        self.cuda.generator.state = "captured"
        self.begun, self.cuda.invalid = self.cuda.current, False

    def capture_end(self):
        assert self.cuda.current is self.begun
        if self.cuda.invalid:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.cuda.end(0, self.pool)
        self.cuda.generator.state = "before"
        self.ended = True
        if self.cuda.breaks == "instantiation":
            raise torch.OutOfMemoryError("out of memory")

    def replay(self):
        self.replays += 1

    def __del__(self):
        if self.ended:
            self.cuda.release(0, self.pool)
