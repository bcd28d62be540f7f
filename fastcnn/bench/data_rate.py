"""The loaders' rate against what a training step consumes, in turn: which waits for the other.

A step under fastcnn loads its own images; what it consumes is its time less that of the resident
loader in the same round.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from fastcnn.bench.rivals.variants import HALVES, Task, Workbench
from fastcnn.bench.timing import ratios, spread
from fastcnn.ops.gpu_faults import require_alive
from fastcnn.train import graph

STEP = "step"  # the variant beside the loaders
TURN_S = 0.3  # enough batches for workers to run dry of what they have prefetched
MOST_BATCHES = 400
WARM_UP = 2  # rounds
CAPTURED_BY = graph.WARM_UP + 1  # steps
Row = dict[str, Any]


class Rates:
    """Seconds a batch of each loader and of the step, as they are asked for."""

    def __init__(self, task: Task, loaders: tuple[str, ...]):
        self.device, self.task = torch.device(task.device), task
        bench = Workbench(task)
        self.note = ""
        self._takes: dict[str, Callable[[], Any]] = {}
        for name in dict.fromkeys(("resident", *loaders)):
            half = HALVES[task.half]  # as the step loads them
            batches = _without_end(bench.loader(augment=True, kind=name, dtype=half))
            self._takes[name] = lambda batches=batches: next(batches)  # type: ignore[misc]
        self._takes[STEP] = self._step(bench)
        self._counts = {name: self._count(take) for name, take in self._takes.items()}

    @property
    def variants(self) -> list[str]:
        return list(self._takes)

    def _step(self, bench: Workbench) -> Callable[[], None]:
        """A step of the fastest kind that this machine has."""
        if self.device.type == "cuda":
            try:
                step = bench.variant("graph", augment=True).step
                for _ in range(CAPTURED_BY):
                    step()
            except Exception as error:
                require_alive(self.device, error, "the step as a CUDA graph")
                self.note = f"the step is not a CUDA graph: {error}"
            else:
                return step
        return bench.variant("fused", augment=True).step

    def _count(self, take: Callable[[], Any]) -> int:
        take()
        once = self._seconds(take, 3) / 3
        return max(3, min(MOST_BATCHES, round(TURN_S / once)))

    def _seconds(self, take: Callable[[], Any], count: int) -> float:
        self._wait()
        start = time.perf_counter()
        for _ in range(count):
            take()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, variant: str) -> float:
        """Seconds a batch."""
        count = self._counts[variant]
        return self._seconds(self._takes[variant], count) / count


def _without_end(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def rows_of_rates(task: Task, loaders: tuple[str, ...], rounds: int) -> list[Row]:
    """Measure the loaders for the steps of a task: a row each. Rates are told on a GPU alone."""
    rates = Rates(task, loaders)
    seconds: dict[str, list[float]] = {name: [] for name in rates.variants}
    for _ in range(WARM_UP + rounds):
        for name in rates.variants:
            seconds[name].append(rates.time(name))
    kept = {name: found[-rounds:] for name, found in seconds.items()}
    rows = [row_of(task, name, kept) for name in loaders]
    return [row | ({"note": rates.note} if rates.note else {}) for row in rows]


def row_of(task: Task, loader: str, seconds: dict[str, list[float]]) -> Row:
    """Return how many times the images that the step consumes a loader delivers."""
    pairs = zip(seconds[STEP], seconds["resident"], strict=True)
    consumed = [max(step - loading, 0.01 * step) for step, loading in pairs]
    row: Row = {"network": task.network, "batch": task.batch, "loader": loader}
    row |= {"n": len(consumed), "times_as_fast_as": {STEP: ratios(consumed, seconds[loader])}}
    if task.device != "cpu":
        row["images_per_s"] = spread([task.batch / s for s in seconds[loader]])
        row["step_images_per_s"] = spread([task.batch / s for s in consumed])
    return row
