"""Carry out the runs of a study: finished ones are kept, one that was stopped goes on.

A run trains in this process, or with several jobs in processes of their own, each on a GPU of its
own where there are several. Whatever stops the study, the same call goes on where it was.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastcnn.cache import locked
from fastcnn.config import PlaceConfig
from fastcnn.errors import CheckpointError, DiskError, NumbersError, UsageError
from fastcnn.insight.drawing.figures import read_metrics
from fastcnn.study.children import Child, placed
from fastcnn.study.plan import PlannedRun, RunResult, Variant, VariantResult
from fastcnn.train import run
from fastcnn.train.interrupt import StopAtStepEdge
from fastcnn.train.rundir import RunFolder

POLL_S = 0.1
SHOWN_CHANGES = 4  # of options that differ, in an error's one line

Say = Callable[[str], None]


@dataclass(frozen=True)
class Failure:
    """A run that ended without a result, and why."""

    planned: PlannedRun
    reason: str

    def __str__(self) -> str:
        return f"{self.planned.name} failed: {self.reason}"


def carry_out(
    planned: Sequence[PlannedRun],
    command: list[str],
    jobs: int = 1,
    quiet: bool = False,
    say: Say = lambda text: None,
) -> list[Failure]:
    """Train every run that is not finished; return those whose numbers were not finite.

    command: is recorded in each run. quiet: no progress within a run; there is none either where
    standard error is no terminal. say: is told of each run's beginning and end. Raises what
    ends a run (its other runs would end alike): Interrupted, with everything saved, DataError,
    UsageError for a folder that holds a run with other options, CheckpointError for a full disk.
    """
    # the lines of a run, where they would not be overwritten by the next ones
    quiet = quiet or sys.stderr is None or not sys.stderr.isatty()
    open_runs = [one for one in planned if not is_finished(one)]
    reporter = ProgressReporter(len(planned), len(planned) - len(open_runs), say)
    if jobs == 1 or len(open_runs) < 2:
        return _one_by_one(open_runs, command, quiet, reporter)
    return _side_by_side(open_runs, command, jobs, reporter)


def is_finished(planned: PlannedRun) -> bool:
    """Whether the run's folder holds its result.

    Raises UsageError where the folder holds a run with other options.
    """
    folder = RunFolder(planned.folder)
    if not (planned.folder / "config.yaml").is_file():
        return False
    own = folder.read_config()
    saved = run.result_options(own)
    wanted = run.as_decided(run.result_options(planned.config), own)
    if differing := [name for name in wanted if wanted[name] != saved[name]]:
        changes = [f"{name}: {saved[name]}, now {wanted[name]}" for name in differing]
        more = ", …" if len(changes) > SHOWN_CHANGES else ""
        raise UsageError(
            f"{planned.folder} holds a run with other options "
            f"({'; '.join(changes[:SHOWN_CHANGES])}{more}); remove it, or give another --output"
        )
    return folder.read_summary() is not None


def train_one(planned: PlannedRun, command: list[str], quiet: bool) -> None:
    """Begin the run, or go on with it, in this process."""
    if (planned.folder / "config.yaml").is_file():
        place = PlaceConfig(resume=str(planned.folder))
        machine = {k: v for k, v in planned.config.flat().items() if k in run.NEUTRAL_ON_RESUME}
        try:
            run.resume(place, machine, command, quiet)
        except DiskError:
            raise
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}; or remove {planned.folder} to train it anew"
            ) from error
        return
    _clear(planned.folder)
    place = PlaceConfig(output=str(planned.folder.parent), name=planned.folder.name)
    run.start(planned.config, place, command, quiet)


def _clear(folder: Path) -> None:
    """Remove a folder that a run was killed in before it wrote what it is.

    Raises UsageError where it holds anything else.
    """
    if folder.is_dir():
        with RunFolder(folder).claimed():
            for leftover in folder.glob(".*.part"):
                leftover.unlink()
    try:
        folder.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UsageError(f"{folder} holds files that are no run; remove it") from error


def results(variants: Sequence[Variant], planned: Sequence[PlannedRun]) -> list[VariantResult]:
    """What the finished runs reached, by variant."""
    found = []
    for variant in variants:
        own = sorted((one for one in planned if one.variant == variant), key=lambda one: one.seed)
        runs = tuple(_result(one) for one in own if is_finished(one))
        found.append(VariantResult(variant, runs))
    return found


def _result(planned: PlannedRun) -> RunResult:
    summary = RunFolder(planned.folder).read_summary() or {}
    file = "summary.json"
    try:
        for name in ("test_top1", "test_top5", "train_seconds", "images_per_s"):
            float(summary[name])
        int(summary["images"]["test"])
        file = "metrics.csv"
        history = read_metrics(planned.folder)
        if len(history["epoch"]) != summary["epochs"]:
            raise ValueError(f"it has {len(history['epoch'])} epochs")
    except (CheckpointError, OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{planned.folder / file} is damaged ({error}); remove {planned.folder} to train it "
            "anew"
        ) from error
    return RunResult(planned.seed, planned.folder, summary, history)


@contextlib.contextmanager
def claimed(root: Path) -> Iterator[None]:
    """Hold `root` against another process that would train the same runs.

    Raises UsageError where another one has it, or where it cannot be made.
    """
    with contextlib.ExitStack() as held:
        try:
            root.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(root / ".lock", partial(_refuse, root)))
        except OSError as error:
            raise UsageError(f"--output: cannot write into {root}: {error.strerror}") from error
        yield


def _refuse(root: Path) -> None:
    raise UsageError(
        f"{root}: another process is at work there; wait for it, or give another --output"
    )


def _epochs(count: int) -> str:
    return "1 epoch" if count == 1 else f"{count} epochs"


@dataclass
class ProgressReporter:
    """Says how far a study has come."""

    total: int
    done: int
    say: Say

    def begin(self, planned: PlannedRun) -> None:
        self.say(f"{self._far()} {planned.name} begins")

    def end(self, planned: PlannedRun) -> None:
        self.done += 1
        summary = RunFolder(planned.folder).read_summary() or {}
        self.say(
            f"{self._far()} {planned.name}: top-1 {summary['test_top1']:.2%}, "
            f"top-5 {summary['test_top5']:.2%} after {_epochs(summary['epochs'])} "
            f"and {summary['train_seconds']:,.0f} s"
        )

    def fail(self, failure: Failure) -> None:
        self.done += 1
        self.say(f"{self._far()} {failure}")

    def _far(self) -> str:
        return f"[{self.done}/{self.total} done]"


def _one_by_one(
    planned: Sequence[PlannedRun], command: list[str], quiet: bool, reporter: ProgressReporter
) -> list[Failure]:
    failures = []
    for one in planned:
        reporter.begin(one)
        try:
            train_one(one, command, quiet)
        except NumbersError as error:
            failures.append(Failure(one, str(error)))
            reporter.fail(failures[-1])
        else:
            reporter.end(one)
    return failures


def _side_by_side(
    planned: Sequence[PlannedRun], command: list[str], jobs: int, reporter: ProgressReporter
) -> list[Failure]:
    """Up to `jobs` runs at a time, each in a process of its own."""
    waiting, failures = list(planned), []
    places = [*range(jobs)]
    children: list[Child] = []
    with StopAtStepEdge() as stop:
        try:
            while waiting or children:
                stop.check()
                while waiting and places:
                    one = waiting.pop(0)
                    reporter.begin(one)
                    children.append(Child(placed(one, places[0], jobs), command, places.pop(0)))
                for child in [child for child in children if child.process.poll() is not None]:
                    children.remove(child)
                    places.append(child.place)
                    if reason := child.outcome():
                        failures.append(Failure(child.planned, reason))
                        reporter.fail(failures[-1])
                    else:
                        reporter.end(child.planned)
                time.sleep(POLL_S)
        finally:
            # after an error or a signal: what still trains saves itself
            for child in children:
                child.process.terminate()
            for child in children:
                child.end()
    return failures
