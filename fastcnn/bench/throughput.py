"""Steps under several backends, in interleaved rounds: training steps, or passes of inference.

On a GPU one process times every variant of a task by device events. On a CPU two processes do, one
with the allocator as Python sets it up ("plain") and one as the command does ("tuned"), and only
ratios and shares are told: of the rivals in one process and of ours in another, see PAIRS.
"""

import contextlib
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from fastcnn.archs import get_network
from fastcnn.bench.kernels.roofline import COLUMNS, roofline
from fastcnn.bench.options import RIVALS
from fastcnn.bench.rivals.variants import HALVES, Task, release
from fastcnn.bench.steps import Steps
from fastcnn.bench.timing import ratios, spread
from fastcnn.bench.worker import Worker

WARM_UP_ROUNDS = 2
ONE = "one process"
# process of the rival, process of the other
PAIRS = {
    "both plain": ("plain", "plain"),
    "both tuned": ("tuned", "tuned"),
    "as a user runs it": ("plain", "tuned"),
}
Row = dict[str, Any]
Seconds = dict[tuple[str, str], list[float]]  # of a step, by process and variant, a round each


def in_turn(processes: Mapping[str, Any], rounds: int) -> Seconds:
    """Time one turn of every variant of every process after the other, A B C A B C."""
    seconds: Seconds = {}
    for _ in range(WARM_UP_ROUNDS + rounds):
        for name, process in processes.items():
            for variant in process.variants:
                seconds.setdefault((name, variant), []).append(process.time(variant))
    return {key: found[-rounds:] for key, found in seconds.items()}


def rows_of_task(task: Task, rounds: int, limits: Mapping[str, float]) -> list[Row]:
    """Measure a task: a row for each backend. limits: see Run.limits."""
    with contextlib.ExitStack() as stack:
        processes: dict[str, Any]
        first: Any
        if task.device == "cpu":
            # the arithmetic is the same in both: one of them checks it
            tuned = stack.enter_context(Worker("tuned", task))
            right = tuple(tuned.variants)
            unchecked = replace(task, backends=right, check=False)
            plain = stack.enter_context(Worker("plain", unchecked))
            processes, first = {"plain": plain, "tuned": tuned}, tuned
            wrong = tuned.wrong | plain.wrong
        else:
            first = Steps(task)
            processes, wrong = {ONE: first}, first.wrong
        seconds = in_turn(processes, rounds)
    rows = [
        row_of(task, backend, seconds, first.facts.get(backend, {}), limits)
        if backend not in wrong
        else _named(task, backend) | {"why": wrong[backend]}
        for backend in task.backends
    ]
    del processes, first
    release(torch.device(task.device))
    return rows


def _named(task: Task, backend: str) -> Row:
    return {
        "network": task.network,
        "batch": task.batch,
        "loader": task.loader,
        "backend": backend,
        "precision": "fp32" if backend == "eager-fp32" else task.half,
    }


def row_of(
    task: Task, backend: str, seconds: Seconds, facts: Row, limits: Mapping[str, float]
) -> Row:
    """Return a backend's row; its times in it are those of a GPU alone."""
    on_gpu = task.device != "cpu"
    own = ONE if on_gpu else "tuned"
    samples = seconds[own, backend]
    row = _named(task, backend) | {"n": len(samples)}
    if on_gpu:
        rates = [task.batch / s for s in samples]
        row |= {"ms_per_step": spread(samples, 1e3), "images_per_s": spread(rates)}
    row["times_as_fast_as"] = {
        rival: _ratios(backend, rival, seconds, on_gpu)
        for rival in RIVALS
        if rival != backend and (own, rival) in seconds
    }
    row |= facts
    if limits and row["precision"] == task.half:  # the rate was measured in this dtype
        row["roofline_share"] = shares(task, statistics.median(samples), limits)
    return row


def _ratios(backend: str, rival: str, seconds: Seconds, on_gpu: bool) -> dict[str, Any]:
    if on_gpu:
        return {ONE: ratios(seconds[ONE, rival], seconds[ONE, backend])}
    # a rival, as a user runs it, is in plain Python too
    pairs = {w: p for w, p in PAIRS.items() if backend not in RIVALS or p[0] == p[1]}
    return {
        words: ratios(seconds[of_rival, rival], seconds[of_own, backend])
        for words, (of_rival, of_own) in pairs.items()
    }


def shares(task: Task, step_s: float, limits: Mapping[str, float]) -> dict[str, float]:
    """Which part of a step is the least time that it could take, by column of the roofline."""
    network, half = get_network(task.network), HALVES[task.half]
    itemsize = half.itemsize if half else 4
    bandwidth, rate = limits["copy_bytes_per_s"], limits["flop_per_s"]
    least = {c: roofline(network, task.batch, itemsize, c, bandwidth, rate) for c in COLUMNS}
    return {c: round(r.seconds * task.batch / step_s, 4) for c, r in least.items()}
