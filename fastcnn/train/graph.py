"""Device work that repeats every step, as a CUDA graph: one launch in place of hundreds.

A kind of work (a step on so many images) is done eagerly a few times, so that libraries choose
their algorithms, is then captured, and from then on replayed. A replay runs the same kernels on the
same addresses with the same launch arguments: whatever changes from step to step must lie in a
tensor on the device that the work itself moves on. What a graph leaves behind lives outside of its
memory pool; so all graphs share one pool and may be replayed in any order.
"""

import gc
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fastcnn.data.loaders.on_device import DeviceLoader
from fastcnn.errors import UsageError
from fastcnn.ops.gpu_faults import require_alive

log = logging.getLogger(__name__)

GraphMode = Literal["auto", "on", "off"]
Work = Callable[[], None]
WARM_UP = 3  # eager calls of each kind, as in the examples of torch.cuda.graphs


class Recorder(Protocol):
    """What turns work into a replay; `warm_up` runs it eagerly as the capture will run it.

    `aside`: the block runs where captures do, which what keeps a stream must be made in.
    """

    def aside(self) -> AbstractContextManager[None]: ...

    def warm_up(self, work: Work) -> None: ...

    def capture(self, work: Work) -> Work: ...


# Graphs whose capture was broken off. The allocator of pinned memory goes on asking them about each
# allocation, which torch's Python cannot end; one that was freed would be read.
_broken: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """CUDA graphs of one device, captured on a stream of their own, in one memory pool."""

    def __init__(self, device: torch.device):
        self.device = device
        self._renew()

    def _renew(self) -> None:
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def aside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)

    def warm_up(self, work: Work) -> None:
        with self.aside():
            work()

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        generator = torch.cuda.default_generators[current.device_index]
        before = generator.clone_state()
        try:
            with _nothing_collected():
                self._capture(graph, work)
        except Exception as error:
            require_alive(self.device, error, "capturing a CUDA graph", "--conv vendor")
            # a capture that was broken off stays on its stream, and its generator goes on waiting
            # for replays
            torch.cuda.set_stream(current)
            generator.graphsafe_set_state(before)
            self._give_up(graph)
            raise
        return graph.replay

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End the allocation to the pool, which torch does behind a capture that succeeds: else
        every later allocation would ask this graph, and no memory that crosses streams come back.

        The next capture takes another stream and pool; graphs of the old ones can be replayed.
        """
        with suppress(RuntimeError):  # it did not come to begin, or torch has ended it
            torch._C._cuda_endAllocateToPool(self.stream.device_index, self.pool)
            torch._C._cuda_releasePool(self.stream.device_index, self.pool)
            _broken.append(graph)
        self._renew()

    def _capture(self, graph: torch.cuda.CUDAGraph, work: Work) -> None:
        # thread_local: another thread, such as one that pins memory, may use the device meanwhile
        options: Any = {"pool": self.pool, "capture_error_mode": "thread_local"}
        with (
            torch.cuda.device(self.device),
            torch.cuda.graph(graph, stream=self.stream, **options),
        ):
            work()


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Collect garbage, and then none in the block: a graph or an event that is in a cycle would be
    destroyed in the middle of a capture, which breaks it."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def recorder_for(device: torch.device, mode: GraphMode) -> Recorder | None:
    """Return what captures graphs on `device`; None where there are to be none.

    Raises UsageError for mode "on" without a GPU.
    """
    if mode != "off" and device.type == "cuda":
        return CudaRecorder(device)
    if mode == "on":
        raise UsageError("--graph on: CUDA graphs need a GPU; use --graph auto")
    return None


class Replay:
    """Runs work by kind: eagerly `warm_up` times, and without a recorder; then its graph.

    `note`: why capture failed, if it did; the work then goes on eagerly. With `required` a failure
    is a UsageError.
    """

    def __init__(self, recorder: Recorder | None, required: bool = False, warm_up: int = WARM_UP):
        self.recorder = recorder
        self.required = required
        self.warm_up = warm_up
        self.note = ""
        self._calls: Counter[Hashable] = Counter()
        self._replays: dict[Hashable, Work] = {}
        self._inputs: dict[Hashable, tuple[Tensor, Tensor]] = {}

    @property
    def captured(self) -> int:
        """Graphs there are."""
        return len(self._replays)

    def run(self, kind: Hashable, work: Work) -> None:
        """Do `work` once."""
        if self.recorder is None:
            work()
        elif replay := self._replays.get(kind):
            replay()
        elif self._calls[kind] < self.warm_up:
            self._calls[kind] += 1
            self.recorder.warm_up(work)
        else:
            self._capture(kind, work)

    def _capture(self, kind: Hashable, work: Work) -> None:
        assert self.recorder is not None
        try:
            replay = self.recorder.capture(work)
        except RuntimeError as error:
            if out_of_memory := _out_of_memory(error):
                raise out_of_memory from error
            reason = " ".join(str(error).split())[:200]
            if self.required:
                raise UsageError(f"--graph on: the step cannot be captured: {reason}") from error
            self.note = f"no CUDA graph, steps are launched one kernel at a time: {reason}"
            log.warning("note: %s", self.note)
            self.recorder = None
            work()
            return
        self._replays[kind] = replay
        replay()

    def epoch(self, loader: Any, work: Callable[[Tensor, Tensor], None]) -> Iterator[int]:
        """Do `work(images, labels)` on each batch of the rest of the loader's epoch.

        Yields the size of a batch after its work. A loader that makes its batches on the device
        does so inside the graph; those of another one are copied into buffers that the graph reads.
        """
        if not isinstance(loader, DeviceLoader):
            for images, labels in loader:
                self.feed(images, labels, work)
                yield len(labels)
            return
        for count in loader.begin():

            def batch_and_work(count: int = count) -> None:
                work(*loader.batch(count))

            loader.stage(count)
            # by the loader itself, whose memory the graph reads: it must not be freed
            self.run((loader, count), batch_and_work)
            loader.advance(count)
            yield count
        loader.finish()

    def feed(self, images: Tensor, labels: Tensor, work: Callable[[Tensor, Tensor], None]) -> None:
        """Do `work` on a batch that comes from outside."""
        if self.recorder is None:
            work(images, labels)
            return
        kind = ("fed", images.shape, images.dtype)
        if kind not in self._inputs:
            self._inputs[kind] = (torch.empty_like(images), torch.empty_like(labels))
        inputs = self._inputs[kind]
        inputs[0].copy_(images, non_blocking=True)
        inputs[1].copy_(labels, non_blocking=True)
        self.run(kind, lambda: work(*inputs))


def _out_of_memory(error: BaseException | None) -> torch.OutOfMemoryError | None:
    """The lack of memory behind an error: the end of a broken capture raises one of its own."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__context__
    return error
