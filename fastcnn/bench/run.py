"""`fastcnn bench`: from the options to the measurements, the JSON file, the table, the chart."""

import importlib.util
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastcnn import ops
from fastcnn.archs import get_network
from fastcnn.bench.environment import environment
from fastcnn.bench.options import BATCHES, CPU_BACKENDS, CUDA_BACKENDS, ENGINES, LOADERS, Settings
from fastcnn.bench.rivals import noise
from fastcnn.bench.rivals.variants import HALVES, Task
from fastcnn.bench.timing import copy_bandwidth, matmul_rate
from fastcnn.errors import UsageError
from fastcnn.ops import conv_autotune
from fastcnn.ops.backend import choose_backend, choose_convolution
from fastcnn.train.host import tune_process
from fastcnn.train.numerics.precision import choose_device, choose_precision

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
            "command": shown_command(command),
            "precision": self.precision.name,
            "library_sources": ops.load().sources,
            "conv": config.run.conv,
        }
        self.backends = self._backends()
        backend, _ = choose_backend("auto", self.device, self.precision.dtype)
        choose_convolution(config.run.conv, backend, self.device, self.precision.dtype)

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

    def has_time_for(self, what: str) -> bool:
        """Whether something of --budget is left; if not, `what` is named as left out."""
        if self.left_s() <= 0:
            self.add("left_out", what)
        return self.left_s() > 0

    def _backends(self) -> tuple[str, ...]:
        """What steps or passes run under: as named, else all that the device has; default engines
        that cannot be had are noted, those that were named raise UsageError."""
        named: tuple[str, ...] = tuple(self.options.backends)
        given = bool(named)
        if not given:
            named = CUDA_BACKENDS if self.device.type == "cuda" else CPU_BACKENDS
            if self.device.type == "cpu" and self.options.inference:
                named += ENGINES
            if self.precision.dtype is None:
                named = tuple(b for b in named if b != "eager-fp32")  # which eager then is
        if not set(ENGINES) & set(named):
            return named
        missing = self._engines_missing(named)
        if missing and given:
            name, why = next(iter(missing.items()))
            raise UsageError(f"--backends {name}: {why}")
        return tuple(b for b in named if b not in missing)

    def _engines_missing(self, named: tuple[str, ...]) -> dict[str, str]:
        """The engines among these that cannot be measured, and why; the file tells them, and the
        versions of the others."""
        from fastcnn.bench.rivals.engines import versions_of, why_not

        wanted = tuple(b for b in named if b in ENGINES)
        found = {name: why_not(name, self.device, self.precision.dtype) for name in wanted}
        missing = {name: why for name, why in found.items() if why}
        had = tuple(name for name in wanted if name not in missing)
        self.content |= {"engines": versions_of(had), "engines_left_out": missing}
        return missing

    def tasks(self, loaders: tuple[str, ...] = ()) -> Iterator[Task]:
        """The networks, batch sizes and loaders in the order in which they were named."""
        config, options = self.settings.config, self.options
        named = self.backends
        for name, batch, loader in itertools.product(
            options.arch, self.batches, loaders or options.loader
        ):
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
                budget_s=None if options.budget is None else self.left_s(),
                inference=options.inference,
            )


def measure(settings: Settings, command: list[str]) -> Content:
    """Run what the options ask for; return the content of the JSON file.

    Raises UsageError for options that this machine cannot serve, BuildError without a library.
    """
    check_targets(settings.own)
    run = Run(settings, command)
    if run.precision.note:
        log.warning("note: %s", run.precision.note)
    modes = {
        "inference": inference,
        "layers": layers,
        "data_only": data_only,
        "time_to_accuracy": time_to_accuracy,
    }
    mode = next((mode for name, mode in modes.items() if getattr(run.options, name)), throughput)
    mode(run)
    if all("why" in row for row in run.content["rows"]) and not run.content["left_out"]:
        reasons = {row["why"] for row in run.content["rows"]}
        raise UsageError(f"nothing could be measured: {'; '.join(sorted(reasons))}")
    return run.content


def check_targets(options: Any) -> None:
    """Raise UsageError for files that could not be written, before anything is measured."""
    for flag, name in (("--json", options.json), ("--plot", options.plot)):
        if name is None:
            continue
        path = Path(name)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{flag} {name}: no such folder: {error.strerror}") from error
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UsageError(f"{flag} {name}: expected a file that can be written")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot: matplotlib is missing; pip install matplotlib")


def throughput(run: Run) -> None:
    """Whole training steps, compared."""
    compare(run, "throughput", run.limits())


def inference(run: Run) -> None:
    """Forward passes, compared."""
    compare(run, "inference", {})  # the roofline is that of a training step


def compare(run: Run, mode: str, limits: dict[str, float]) -> None:
    """A row for each backend of each task."""
    from fastcnn.bench.throughput import rows_of_task

    run.set(mode=mode, rounds=run.options.rounds, rows=[], left_out=[])
    for task in run.tasks():
        if run.has_time_for(str(task)):
            log.info("%s: %s", task, ", ".join(task.backends))
            run.add("rows", *rows_of_task(task, run.options.rounds, limits))


def layers(run: Run) -> None:
    """Each layer's parts."""
    from fastcnn.bench.kernels.conv_layers import RIVALS
    from fastcnn.bench.kernels.layers import rows_of_network

    run.set(mode="layers", rounds=run.options.rounds, rows=[], left_out=[])
    limits, dtype = run.limits(), run.precision.dtype or torch.float32
    if run.options.backends and (why := conv_autotune.why_vendor(run.device, dtype)):
        raise UsageError(f"--backends: means nothing to --layers here ({why})")
    rivals = tuple(b for b in RIVALS if b in (run.options.backends or RIVALS))
    for name, batch in itertools.product(run.options.arch, run.batches):
        if run.has_time_for(f"{name} batch {batch}"):
            log.info("%s batch %d: every layer", name, batch)
            given = (batch, dtype, run.device, run.options.rounds, limits, rivals)
            run.add("rows", *rows_of_network(name, *given))


def data_only(run: Run) -> None:
    """The loaders' rates."""
    from fastcnn.bench.data_rate import rows_of_rates
    from fastcnn.data.choose import has_dali

    run.set(mode="data-only", rounds=run.options.rounds, rows=[], left_out=[])
    loaders = tuple(name for name in LOADERS if name != "dali" or has_dali())
    if "loader" in run.settings.given:
        loaders = tuple(run.options.loader)
    for task in run.tasks(loaders=("resident",)):
        if run.has_time_for(str(task)):
            log.info("%s batch %d: loaders %s", task.network, task.batch, ", ".join(loaders))
            run.add("rows", *rows_of_rates(task, loaders, run.options.rounds))


def time_to_accuracy(run: Run) -> None:
    """Whole trainings, once a seed."""
    from fastcnn.bench.accuracy import row_of, trials
    from fastcnn.recipes import resolve

    options = run.options
    run.set(mode="time-to-accuracy", rows=[], left_out=[])
    batches = [{"batch_size": batch} for batch in options.batch_size] or [{}]
    target = options.time_to_accuracy or 0.0
    for name, batch, loader in itertools.product(options.arch, batches, options.loader):
        # what is measured is what was asked for: no measurement chooses the format
        amp = {"amp": run.precision.dtype is not None, "amp_dtype": run.precision.name}
        config = resolve({**run.settings.train, "arch": name, "loader": loader, **amp, **batch})
        found = []
        for trial in trials(config, options.seeds, run.has_time_for):
            found.append(trial)
            log.info(
                "%s seed %d: top-1 %.2f %%, target met after %s of %d epochs",
                *(name, trial.seed, 100 * trial.top1[-1]),
                *(trial.epochs_to(target) or "none", len(trial.top1)),
            )
        if found:
            run.add("rows", row_of(config, target, found, run.device.type == "cuda"))


def show(content: Content, settings: Settings, quiet: bool = False) -> None:
    """Print the table and draw the chart that was asked for."""
    from fastcnn.bench import plot, table

    if not quiet:
        table.print_report(content)
    if settings.own.plot:
        plot.draw(content, Path(settings.own.plot))


def shown_command(command: list[str]) -> str:
    """The command without this machine's paths: --json and --plot left out, others by name."""
    words, skip = [], False
    for word in command:
        if not skip and not word.startswith(("--json=", "--plot=")):
            skip = word in ("--json", "--plot")
            name, equals, value = word.rpartition("=")
            words += [] if skip else [name + equals + (Path(value).name or value)]
        else:
            skip = False
    return " ".join(words)
