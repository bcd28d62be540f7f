"""Loggers beside metrics.csv: TensorBoard and W&B, as --loggers names them.

A logger is told of an epoch after its checkpoint, and <run>/<logger>/logged.json says how far it
was told: a run that is taken up again repeats no epoch, and a logger that comes late is told of
all. One that fails is named once and left; the run goes on.
"""

import contextlib
import importlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from fastcnn.config import Config
from fastcnn.errors import UsageError
from fastcnn.files import load_json, replace_text
from fastcnn.text import first_line
from fastcnn.train.rundir import config_text

log = logging.getLogger(__name__)

STATE = "logged.json"
PROJECT = "fastcnn"  # of W&B, where neither WANDB_PROJECT nor its settings name one
# columns of metrics.csv by the names that loggers have for them; the same of summary.json
EPOCH = {
    "loss/train": "train_loss",
    "loss/val": "val_loss",
    "top1/train": "train_top1",
    "top1/val": "val_top1",
    "top5/val": "val_top5",
    "lr": "lr",
    "images_per_s": "images_per_s",
    "skipped_steps": "skipped_steps",
}
TEST = {"loss/test": "test_loss", "top1/test": "test_top1", "top5/test": "test_top5"}
# what each one needs: a package, its module and a name in that
NEEDED = {
    "tensorboard": ("tensorboard", "torch.utils.tensorboard", "SummaryWriter"),
    "wandb": ("wandb", "wandb", "init"),
}

Row = Mapping[str, Any]


class Logger(Protocol):
    """state: what it must be given again when the run goes on."""

    state: dict[str, Any]

    def epoch(self, number: int, figures: Mapping[str, float]) -> None: ...
    def finish(self, epochs: int, figures: Mapping[str, float]) -> None: ...
    def close(self, finished: bool) -> None: ...


class TensorBoard:
    """Event files in <run>/tensorboard: scalars by epoch, the configuration as text."""

    def __init__(self, config: Config, run: Path, epochs: int, state: Row):
        from torch.utils.tensorboard import SummaryWriter

        self.state: dict[str, Any] = {}
        # what an earlier process wrote of later epochs, but did not note, is void
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=epochs + 1)
        text = "".join(f"    {line}\n" for line in config_text(config).splitlines())
        self.writer.add_text("configuration", text, epochs)

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.writer.add_scalar(name, value, number)
        self.writer.flush()

    def finish(self, epochs: int, figures: Mapping[str, float]) -> None:
        self.epoch(epochs, figures)

    def close(self, finished: bool) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of W&B, its files in <run>/wandb; offline where its settings say so, or without a
    login. W&B's own environment variables (WANDB_MODE, WANDB_PROJECT, …) hold."""

    def __init__(self, config: Config, run: Path, epochs: int, state: Row):
        import wandb

        # of its lines those that say where the run is, not a history that metrics.csv has as well
        told: dict[str, Any] = {"quiet" if log.isEnabledFor(logging.INFO) else "silent": True}
        settings = wandb.setup().settings
        mode: Any = settings.mode
        if mode == "online" and not wandb.login(prompt=False):
            mode = "offline"
            log.info("note: --loggers wandb: no login, kept in %s; see `wandb sync`", run / "wandb")
        self.run = wandb.init(
            project=settings.project or PROJECT,
            name=settings.run_name or run.name,
            id=state.get("id") or settings.run_id,
            dir=str(run),
            mode=mode,
            # offline there is nothing to look up, and W&B warns of the word
            resume="allow" if mode == "online" else None,
            config=config.flat(),
            allow_val_change=True,
            # a process may train several runs; its lines are not W&B's
            reinit="create_new",
            settings=wandb.Settings(console="off", **told),
        )
        self.state: dict[str, Any] = {"id": self.run.id}

    def epoch(self, number: int, figures: Mapping[str, float]) -> None:
        self.run.log({"epoch": number, **figures}, step=number)

    def finish(self, epochs: int, figures: Mapping[str, float]) -> None:
        self.run.summary.update(dict(figures))

    def close(self, finished: bool) -> None:
        self.run.finish(exit_code=0 if finished else 1)


LOGGERS: dict[str, type[TensorBoard] | type[WeightsAndBiases]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}


def check_loggers(names: Iterable[str]) -> None:
    """Raise UsageError for a logger whose package is missing or broken."""
    for name in names:
        package, module, attribute = NEEDED[name]
        try:
            # a folder of that name in the working directory would import as well, as an empty one
            getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a broken package raises anything
            missing = isinstance(error, ModuleNotFoundError) and error.name == package
            state = "is missing" if missing else f"cannot be imported ({_reason(error)})"
            raise UsageError(
                f"--loggers {name}: the package {package} {state}; pip install 'fastcnn[{name}]'"
            ) from error


class Loggers:
    """The loggers of a run from where it stands to its end: `epoch` and `finish` tell all of them.

    history: the rows of the epochs that are done. writes: whether this process is the one that
    logs. Leaving the block closes them, whatever ends it.
    """

    def __init__(self, config: Config, run: Path, history: Sequence[Row], writes: bool = True):
        self._run = run
        self._open: dict[str, Logger] = {}
        for name in config.run.loggers if writes else ():
            with self._or_without(name):
                self._start(name, config, history)

    def _start(self, name: str, config: Config, history: Sequence[Row]) -> None:
        path = self._run / name / STATE
        try:
            state = load_json(path) if path.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{path} cannot be read ({first_line(error)})") from error
        epochs = min(state.get("epochs", 0), len(history))
        self._open[name] = LOGGERS[name](config, self._run, epochs, state)
        self._note(name, epochs)
        for row in history[epochs:]:
            self._tell(name, row)

    def epoch(self, row: Row) -> None:
        """Tell of an epoch that is done: its row of metrics.csv."""
        for name in [*self._open]:
            with self._or_without(name):
                self._tell(name, row)

    def finish(self, summary: Row) -> None:
        """Tell of the test figures in summary.json."""
        figures = {label: summary[key] for label, key in TEST.items()}
        for name in [*self._open]:
            with self._or_without(name):
                self._open[name].finish(summary["epochs"], figures)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name in [*self._open]:
            with self._or_without(name):
                self._open[name].close(finished=error is None)

    def _tell(self, name: str, row: Row) -> None:
        figures = {label: row[column] for label, column in EPOCH.items()}
        self._open[name].epoch(row["epoch"], figures)
        self._note(name, row["epoch"])

    def _note(self, name: str, epochs: int) -> None:
        """Write how far a logger was told."""
        state = {"epochs": epochs, **self._open[name].state}
        (self._run / name).mkdir(exist_ok=True)
        replace_text(self._run / name / STATE, json.dumps(state) + "\n")

    @contextlib.contextmanager
    def _or_without(self, name: str) -> Iterator[None]:
        """Let what fails inside end this logger alone: a full disk, a network, a damaged file."""
        try:
            yield
        except Exception as error:
            log.warning("note: --loggers %s: %s; going on without it", name, _reason(error))
            if logger := self._open.pop(name, None):
                with contextlib.suppress(Exception):
                    logger.close(finished=False)


def _reason(error: Exception) -> str:
    """What an error says, in a line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
