"""What a user sees of a running epoch: a bar on a terminal, plain lines elsewhere.

Figures are asked of the device twice a second (bar) or every 30 seconds (lines) and shown when they
have arrived: nobody waits for them.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastcnn.train.metrics import Figures, Metrics

BAR_INTERVAL_S = 0.5
LINE_INTERVAL_S = 30.0


class Progress:
    """Progress of a run over `epochs` epochs, written to standard error. world: the processes that
    train, of which this is one."""

    def __init__(self, epochs: int, steps_per_epoch: int, quiet: bool = False, world: int = 1):
        from rich.console import Console

        self.epochs = epochs
        self.steps = steps_per_epoch
        self.world = world
        self.quiet = quiet or sys.stderr is None
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.terminal = self.console.is_terminal

    def say(self, text: str) -> None:
        """Print one line."""
        if self.quiet:
            return
        try:
            if self.terminal:
                self.console.print(text, markup=False)
            else:
                print(text, file=sys.stderr, flush=True)  # noqa: T201 - the line a log wants
        except OSError:
            # whoever read the lines has gone; the run goes on without them
            self.quiet = True

    @contextmanager
    def epoch(
        self, number: int, steps_done: int, batch_size: int, counted: int
    ) -> Iterator["EpochProgress"]:
        """Follow the training steps of epoch `number` (1-based).

        batch_size: images of a step, of all processes; counted: those in the epoch's figures yet.
        """
        if self.quiet or not self.terminal:
            yield EpochProgress(self, None, None, number, steps_done, batch_size, counted)
            return
        bar = self._bar()
        with bar:
            task = bar.add_task(
                f"epoch {number}/{self.epochs}", total=self.steps, completed=steps_done, figures=""
            )
            yield EpochProgress(self, bar, task, number, steps_done, batch_size, counted)

    def _bar(self) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        return RichProgress(*columns, console=self.console, transient=True, refresh_per_second=4)


class EpochProgress:
    """One epoch's share of the progress; `update()` is cheap except when a sample is due."""

    def __init__(
        self,
        run: Progress,
        bar: Any,
        task: Any,
        number: int,
        steps_done: int,
        batch_size: int,
        counted: int,
    ):
        self.run, self.bar, self.task, self.number = run, bar, task, number
        self.done, self.batch_size = steps_done, batch_size
        self.first, self.counted = steps_done, counted
        self.start = time.perf_counter()
        self.interval = BAR_INTERVAL_S if bar else LINE_INTERVAL_S
        self.due = self.start + self.interval

    def update(self, metrics: Metrics) -> None:
        """Count a step and, when a sample is due, show the figures of the epoch so far."""
        self.done += 1
        now = time.perf_counter()
        if now < self.due or self.run.quiet:
            return
        figures = metrics.peek()
        if figures is None:  # the device is behind; look again soon
            self.due = now + BAR_INTERVAL_S
            return
        text = self._text(figures, now - self.start)
        if self.bar:
            self.bar.update(self.task, completed=self.done, figures=text)
        else:
            place = f"epoch {self.number}/{self.run.epochs}  step {self.done}/{self.run.steps}"
            self.run.say(f"{place}  {text}")
        self.due = now + self.interval

    def _text(self, figures: Figures, elapsed: float) -> str:
        # what the device has done, not what was launched; the other processes do as much
        images = (figures.images - self.counted) * self.run.world
        total = (self.run.epochs - self.number + 1) * self.run.steps - self.first
        left = total * self.batch_size - images
        rate = max(images, 1) / elapsed
        return (
            f"loss {figures.loss:.3f}  top-1 {figures.top1:.1%}  {rate:,.0f} images/s  "
            f"{format_seconds(left / rate)} left"
        )


def format_seconds(seconds: float) -> str:
    """42 s, 3 min 05 s, 2 h 07 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
