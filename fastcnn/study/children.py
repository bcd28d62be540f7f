"""Processes that train one run each, beside each other: what they are told, how they end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcnn.config import Config
from fastcnn.errors import FastcnnError, NumbersError
from fastcnn.study.plan import PlannedRun, Variant
from fastcnn.train.host import usable_cores
from fastcnn.train.interrupt import Interrupted, StopAtStepEdge

SAVE_S = 300  # for a step, an evaluation's batch and a checkpoint


def placed(planned: PlannedRun, place: int, jobs: int) -> PlannedRun:
    """The run with this job's share of the machine: a GPU, or some of the cores."""
    config = planned.config
    device, threads = config.run.device, config.run.threads
    if device in ("auto", "cuda"):
        import torch

        if gpus := torch.cuda.device_count():
            device = f"cuda:{place % gpus}"
    threads = threads or max(1, usable_cores() // jobs)
    config = replace(config, run=replace(config.run, device=device, threads=threads))
    return replace(planned, config=config)


class Child:
    """A process that trains one run. What it prints goes to <folder>.log beside the run.

    Its standard input stays open: when that ends, this process has died, and the child saves its
    run and ends as well.
    """

    def __init__(self, planned: PlannedRun, command: list[str], place: int):
        self.planned, self.place = planned, place
        self.log = planned.folder.with_name(f"{planned.folder.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastcnn.study.child"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                # Ctrl-C is for the parent, which passes it on once: a second signal would end a
                # child before it has saved its run
                start_new_session=True,
            )
        task = {
            "key": planned.variant.key,
            "seed": planned.seed,
            "options": planned.config.flat(),
            "folder": str(planned.folder),
            "command": command,
        }
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()

    def outcome(self) -> str:
        """ "" for a run that is done, the reason for numbers not finite; raises what else ended it.

        Raises Interrupted after a signal to stop, else FastcnnError with the run's exit code.
        """
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        code = self.process.returncode
        if code == 0:
            return ""
        stopped = [128 + signum for signum in StopAtStepEdge.SIGNALS]
        if code in stopped or -code in StopAtStepEdge.SIGNALS:
            raise Interrupted(code - 128 if code > 0 else -code)
        reason = f"ended by signal {-code}" if code < 0 else self._last_line()
        reason = reason or f"ended with exit code {code}"
        if code == NumbersError.exit_code:
            return reason
        error = FastcnnError(f"{self.planned.name}: {reason} (see {self.log})")
        error.exit_code = max(1, code)
        raise error

    def end(self) -> None:
        """Wait until the process, which was told to, has saved its run and ended; kill it where it
        does not."""
        try:
            self.process.wait(SAVE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(SAVE_S)

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("fastcnn: ") if lines else ""


def task_of(text: str) -> tuple[PlannedRun, list[str]]:
    """The run, and the command to record, that a `Child` was given on its standard input."""
    task: dict[str, Any] = json.loads(text)
    variant = Variant(task["key"], task["key"], task["options"])
    config = Config.from_flat(task["options"])
    return PlannedRun(variant, task["seed"], config, Path(task["folder"])), task["command"]


def end_with_parent() -> None:
    """Wait for standard input to end, as it does when the parent dies; then stop this process."""
    # not by sys.stdin, whose lock this thread would hold when the process ends
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 1024):
            pass
    os.kill(os.getpid(), signal.SIGTERM)
