"""`fastcnn bench`: from the options to the measurements, the JSON file, the table, the chart."""

import itertools
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastcnn import ops
from fastcnn.archs import get_network
from fastcnn.bench import noise
from fastcnn.bench.environment import environment
from fastcnn.bench.options import BATCHES, CPU_BACKENDS, CUDA_BACKENDS, Settings
from fastcnn.bench.timing import copy_bandwidth, matmul_rate
from fastcnn.bench.variants import HALVES, Task
from fastcnn.train.host import tune_process
from fastcnn.train.precision import choose_device, choose_precision

log = logging.getLogger(__name__)

Content = dict[str, Any]


class Run:
    """What a run has measured; the JSON file is written anew after every addition."""

    def __init__(self, settings: Settings, command: list[str]):
        self.settings, self.options = settings, settings.own
        config = settings.config
        tune_process(config.run.threads)
        self.device = choose_device(config.run.device)
        amp = self.options.amp
        amp = self.device.type == "cuda" if amp is None else amp
        self.precision = choose_precision(self.device, amp, config.run.amp_dtype)
        self._start = time.monotonic()
        for name in self.options.arch:
            get_network(name)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        self.content: Content = {
            **environment(self.device),
            "command": " ".join(command),
            "precision": self.precision.name,
            "library_sources": ops.load().sources,
        }

    @property
    def batches(self) -> list[int]:
        return self.options.batch_size or list(BATCHES[self.device.type])

    def left_s(self) -> float:
        """Seconds of --budget that are left."""
        budget = self.options.budget
        return float("inf") if budget is None else budget - (time.monotonic() - self._start)

    def set(self, **entries: Any) -> None:
        self.content |= entries
        self._write()

    def add(self, key: str, *entries: Any) -> None:
        self.content.setdefault(key, []).extend(entries)
        self._write()

    def _write(self) -> None:
        if self.options.json:
            path = Path(self.options.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")

    def limits(self) -> dict[str, float]:
        """Measure what a GPU can do: a copy's bytes/s, a matrix product's FLOP/s in the dtype of
        the steps. Empty for a CPU, whose caches hold what the roofline counts as memory's work."""
        if self.device.type == "cpu":
            return {}
        dtype = HALVES[self.precision.name] or torch.float32
        found = {
            "copy_bytes_per_s": copy_bandwidth(self.device),
            "flop_per_s": matmul_rate(self.device, dtype),
        }
        self.set(limits={name: float(f"{value:.4g}") for name, value in found.items()})
        return found

    def tasks(self) -> Iterator[Task]:
        """The networks, batch sizes and loaders in the order in which they were named."""
        config, options = self.settings.config, self.options
        default = CUDA_BACKENDS if self.device.type == "cuda" else CPU_BACKENDS
        named: tuple[str, ...] = tuple(options.backends) or default
        if self.precision.dtype is None and not options.backends:
            named = tuple(b for b in named if b != "eager-fp32")  # which eager then is
        for name, batch, loader in itertools.product(options.arch, self.batches, options.loader):
            size = get_network(name).image_sizes[0]
            yield Task(
                name,
                batch,
                loader,
                named,
                str(self.device),
                self.precision.name,
                config.run.threads,
                config.data.workers,
                config.run.seed,
                noise.enough(size, batch, self.device),
            )


def measure(settings: Settings, command: list[str]) -> Content:
    """Run what the options ask for; return the content of the JSON file.

    Raises UsageError for options that this machine cannot serve, BuildError without a library.
    """
    run = Run(settings, command)
    if run.precision.note:
        log.warning("note: %s", run.precision.note)
    throughput(run)
    return run.content


def throughput(run: Run) -> None:
    from fastcnn.bench.throughput import rows_of_task

    run.set(mode="throughput", rounds=run.options.rounds, rows=[], left_out=[])
    limits = run.limits()
    for task in run.tasks():
        if run.left_s() <= 0:
            run.add("left_out", str(task))
            continue
        log.info("%s: %s", task, ", ".join(task.backends))
        run.add("rows", *rows_of_task(task, run.options.rounds, limits))


def show(content: Content, settings: Settings, quiet: bool = False) -> None:
    """Draw the chart that was asked for and print the table."""
    from fastcnn.bench import plot, table

    if settings.own.plot:
        plot.draw(content, Path(settings.own.plot))
    if not quiet:
        table.print_report(content)
