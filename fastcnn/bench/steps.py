"""The steps of a task, timed one at a time as they are asked for, and what each holds and launches.

On a GPU a turn is as many steps as fill TURN_S, between two device events, the host's launches
included: small networks are bound by them. On a CPU it is one step, by perf_counter.
"""

import time
from functools import partial
from typing import Any

import torch

from fastcnn.bench.inference import InferenceBench, LogitsCheck
from fastcnn.bench.kernels.cases import kept_bytes
from fastcnn.bench.rivals import correctness
from fastcnn.bench.rivals.check import Check
from fastcnn.bench.rivals.variants import Task, Variant, Workbench, release
from fastcnn.errors import FastcnnError
from fastcnn.ops.gpu_faults import require_alive

TURN_S = 0.1
MOST_STEPS = 200
# before a turn on a CPU: OpenMP's threads spin for milliseconds after the turn before, in this
# process or another, on cores that an engine's own threads want
REST_S = 0.03
WARM_UP = 4  # steps
LAUNCHES = ("LaunchKernel", "GraphLaunch", "Memcpy", "Memset")  # of the CUDA runtime's calls
PROFILED = 3
NO_TIME = "no time was left"  # of --budget


class Steps:
    """Every right variant of a task; `wrong`: the others and why.

    `facts`, by variant: on a GPU set_up_s (compilation, capture and warm-up), peak_bytes, launches
    (by the host) and kernels (on the device) of a step; on a CPU kept_bytes.
    """

    def __init__(self, task: Task):
        self.task, self.device = task, torch.device(task.device)
        self._start = time.monotonic()
        torch.compiler.reset()  # it compiles one function only a few times
        kinds: Any = (InferenceBench, LogitsCheck) if task.inference else (Workbench, Check)
        make_bench, make_check = kinds
        self.bench: Workbench = make_bench(task)
        self.wrong: dict[str, str] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        self._variants: dict[str, Variant] = {}
        self._steps: dict[str, int] = {}
        self._check: Any = None
        try:
            self._check = make_check(self.bench) if task.check else None
        except Exception as error:
            require_alive(self.device, error, "the check of the variants")
            why = f"the check of the variants failed: {correctness.reason_of(error)}"
            self.wrong = dict.fromkeys(task.backends, why)
        release(self.device)
        for backend in task.backends:
            if backend not in self.wrong:
                self._add(backend)

    @property
    def variants(self) -> list[str]:
        return list(self._variants)

    def _add(self, backend: str) -> None:
        budget = self.task.budget_s
        if budget is not None and time.monotonic() - self._start > budget:
            self.wrong[backend] = NO_TIME
            return
        try:
            variant, facts = self._prepared(backend)
        except Exception as error:  # too little memory, a compiler's fault: the others go on
            require_alive(self.device, error, backend)
            self.wrong[backend] = correctness.reason_of(error)
            release(self.device)
        else:
            self._variants[backend], self.facts[backend] = variant, facts

    def _prepared(self, backend: str) -> tuple[Variant, dict[str, Any]]:
        """Build a variant, check it and warm it up; peak_bytes is what it adds to what was there.

        Raises FastcnnError for one that is wrong.
        """
        on_gpu = self.device.type == "cuda"
        before, idle = (torch.cuda.memory_allocated(), _idle_in_pools()) if on_gpu else (0, 0)
        start = time.perf_counter()
        variant = self.bench.variant(backend, augment=False)
        if self._check:
            # the first step compiles, and cuDNN tries algorithms with memory that no other needs
            reset = torch.cuda.reset_peak_memory_stats if on_gpu else None
            found = self._check.run(variant, reset)
            if why := self._check.why_wrong(backend, variant, found):
                raise FastcnnError(why)
        rebuild = variant.augmented
        del variant
        release(self.device)
        variant = rebuild()
        for _ in range(WARM_UP):
            variant.step()
        if not on_gpu:
            return variant, self._kept(backend, variant)
        torch.cuda.synchronize()
        set_up_s = round(time.perf_counter() - start, 2)
        # what a graph was captured with is not allocated when it is replayed, but reserved
        replayed = torch.cuda.memory_allocated() + _idle_in_pools() - idle
        peak = max(torch.cuda.max_memory_allocated(), replayed) - before - variant.held
        self._steps[backend] = self._turn(variant)
        facts = {"set_up_s": set_up_s, "peak_bytes": peak, **launches_of(variant.step)}
        return variant, facts

    def _turn(self, variant: Variant) -> int:
        """How many steps fill a turn."""
        start = time.perf_counter()
        for _ in range(PROFILED):
            variant.step()
        torch.cuda.synchronize()
        each = (time.perf_counter() - start) / PROFILED
        return max(3, min(MOST_STEPS, round(TURN_S / each)))

    def _kept(self, backend: str, variant: Variant) -> dict[str, Any]:
        task = self.task
        if task.inference or backend not in ("eager", "fused") or task.half != "fp32":
            return {}
        model = variant.model
        images, _ = next(self.bench.batches(torch.float32, augment=False))
        known = [*model.parameters(), *model.buffers(), images]
        return {"kept_bytes": kept_bytes(partial(model, images), known)}

    def time(self, backend: str) -> float:
        """Seconds a step."""
        step = self._variants[backend].step
        if self.device.type == "cpu":
            time.sleep(REST_S)
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        steps = self._steps[backend]
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(steps):
            step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / steps


def _idle_in_pools() -> int:
    """Bytes that the private pools of CUDA graphs have reserved and that no tensor holds."""
    return sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    )


def launches_of(step: Any) -> dict[str, float]:
    """Return launches by the host and kernels on the device, a step, as torch's profiler sees."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as seen:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    events = seen.events() or []
    calls = sum(e.name.startswith("cu") and any(w in e.name for w in LAUNCHES) for e in events)
    kernels = sum(e.device_type == DeviceType.CUDA for e in events)
    return {"launches": round(calls / PROFILED, 1), "kernels": round(kernels / PROFILED, 1)}
