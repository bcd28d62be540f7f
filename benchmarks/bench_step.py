"""A training step on the CPU under the fused ops, eager torch and torch.compile, and its memory.

    pytest benchmarks/bench_step.py --benchmark-enable
    FASTCNN_BENCH_QUICK=1 pytest benchmarks/bench_step.py --benchmark-enable    # without compile

The steps run in two processes, one with the allocator as Python sets it up ("plain") and one as the
command `fastcnn` does ("tuned"), and all variants of both take turns, A B C A B C. Ratios are told
for the same allocator and for rivals as a user runs them: plain, against fused in the command. The
memory test counts the bytes that the backward keeps (`layer_cases.kept_bytes`).

Options: FASTCNN_BENCH_ROUNDS (at least 7, 15 unless given), THREADS, COMPILE (0: without
torch.compile), QUICK (1: small batches, no torch.compile), JSON (the file to write).
"""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from layer_cases import Case, calls_of, function_of, kept_bytes, make_inputs, network_of
from report import REPOSITORY, Report, environment, option, switched_on
from step_process import Task
from timing import ratios

from fastcnn import ops
from fastcnn.archs.spec import build
from fastcnn.ops import reference

QUICK = switched_on("QUICK", False)
COMPILE = switched_on("COMPILE", not QUICK)
ROUNDS = max(7, int(option("ROUNDS", "7" if QUICK else "15")))
WARMUP_ROUNDS = 2
STEPS = {"cnn-a+norm": 16 if QUICK else 256, "vgg16": 8 if QUICK else 64}  # images a batch
CHAIN = (16 if QUICK else 256, 32, 32, 32)
SETTINGS = ("plain", "tuned")
# process of the rival, process of the fused ops
PAIRS = {
    "both plain": ("plain", "plain"),
    "both tuned": ("tuned", "tuned"),
    "as a user runs it": ("plain", "tuned"),
}


def tasks() -> list[Task]:
    common = {"compiled": COMPILE, "threads": int(option("THREADS", "0"))}
    steps = [Task(name, batch, **common) for name, batch in STEPS.items()]
    return [*steps, Task(shape=CHAIN, **common)]


class Process:
    """One `step_process.py`: `variants` that it can time, those that are `wrong`."""

    def __init__(self, setting: str, task: Task):
        script = Path(__file__).with_name("step_process.py")
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, str(script), setting, task.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        found = json.loads(self._answer())
        self.variants: list[str] = found["variants"]
        self.wrong: dict[str, str] = found["wrong"]

    def time(self, variant: str) -> float:
        """Seconds of one step."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{variant}\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return line
        raise RuntimeError(f"the process ended with code {self._process.wait()}; see its output")

    def __enter__(self) -> "Process":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()


class Turns:
    """One step of every variant in every process after the other; `seconds` by setting, variant."""

    def __init__(self, processes: dict[str, Process]):
        self.processes = processes
        self.seconds: dict[tuple[str, str], list[float]] = {}

    def __call__(self) -> None:
        for setting, process in self.processes.items():
            for variant in process.variants:
                self.seconds.setdefault((setting, variant), []).append(process.time(variant))


def row_of(task: Task, seconds: dict[tuple[str, str], list[float]]) -> dict[str, Any]:
    """Return how many times as fast fused is as each rival, for each pair of processes."""
    row: dict[str, Any] = {"task": str(task), "rounds": len(next(iter(seconds.values())))}
    for rival in ("eager", "compile"):
        for words, (theirs, ours) in PAIRS.items():
            slow, fast = seconds.get((theirs, rival)), seconds.get((ours, "fused"))
            if slow and fast:
                row.setdefault(f"times_as_fast_as_{rival}", {})[words] = ratios(slow, fast)
    return row


def table(content: dict[str, Any]) -> list[str]:
    """Return a line for each ratio and for each count of bytes."""
    lines = [
        f"{content['machine']['cpu']}, torch {content['torch']}, commit {content['commit']}, "
        f"{content['date']}; ratio of medians (extremes of the rounds)"
    ]
    for row in content["rows"]:
        for key in (key for key in row if key.startswith("times_as_fast_as")):
            for words, r in row[key].items():
                told = f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})"
                lines.append(f"{row['task']:<28} x {key.rsplit('_', 1)[1]:<8} {words:<18} {told}")
    for row in content["kept"]:
        fused, eager = row["fused_bytes"] / 2**20, row["eager_bytes"] / 2**20
        told = f"fused {fused:.1f} MiB, eager {eager:.1f} MiB: {fused / eager:.2f}"
        lines.append(f"{row['of']:<48} kept for the backward: {told}")
    return lines + [f"not timed: {one}" for one in content["refused"]]


@pytest.fixture(scope="module")
def report(request):
    if option("THREADS"):
        torch.set_num_threads(int(option("THREADS")))
    # built here: two processes at once would wait for one another
    sources = ops.load().sources
    content = {**environment(torch.device("cpu")), "library_sources": sources, "dtype": "float32"}
    content |= {"rows": [], "kept": [], "refused": []}
    found = Report("bench_step", content, table)
    request.config.pluginmanager.register(found)
    return found


@pytest.mark.parametrize("task", tasks(), ids=str)
def test_step(benchmark, report, task):
    with Process("plain", task) as plain, Process("tuned", task) as tuned:
        turns = Turns({"plain": plain, "tuned": tuned})
        benchmark.pedantic(turns, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
        wrong = plain.wrong | tuned.wrong
    if benchmark.stats is not None:
        row = row_of(task, {key: found[-ROUNDS:] for key, found in turns.seconds.items()})
        benchmark.extra_info["row"] = row
        report.add("rows", row)
    report.add("refused", *[f"{task}: {variant}: {why}" for variant, why in wrong.items()])
    assert not wrong.keys() & {"fused", "eager"}, wrong


def kept_by(case: Case, module: Any) -> int:
    """Bytes that the backward of one op keeps by itself, x among them."""
    inputs = make_inputs(case, torch.float32, torch.device("cpu"), 0)
    known = [t for name, t in inputs.tensors.items() if name not in ("x", "residual")]
    return kept_bytes(partial(function_of(case, module), inputs.tensors), known)


def kept_by_network(name: str, batch: int, backend: str) -> int:
    """Bytes that the backward of a whole network keeps, beside parameters and the images."""
    network = network_of(name)
    size = network.image_sizes[0]
    model = build(network, size, network.classes, backend)
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    return kept_bytes(partial(model, images), [*model.parameters(), *model.buffers(), images])


def test_kept_bytes(report):
    chain = Case("bn_act_pool", CHAIN, post_slope=0.0, pool=(2, 2, 0))
    rows = [(f"the chain {chain}", kept_by(chain, ops), kept_by(chain, reference))]
    for name, batch in STEPS.items():
        calls = calls_of(network_of(name), batch)
        sums = [sum(kept_by(call, module) for call in calls) for module in (ops, reference)]
        rows.append((f"the chains of {name}, batch {batch}", *sums))
        whole = [kept_by_network(name, batch, backend) for backend in ("fused", "torch")]
        rows.append((f"all of {name}, batch {batch}", *whole))
    for what, fused, eager in rows:
        report.add("kept", {"of": what, "fused_bytes": fused, "eager_bytes": eager})
        assert fused <= eager
