"""Time to accuracy: train with a recipe, once a seed, and note when the test images are classified
as well as wanted.

The clock of a run holds every training step with its augmentation and an evaluation an epoch, all
epochs of the recipe: reaching the target once in the middle of it would be luck as well. Reading
the data and building are not in it, nor is what a process does only once (cuDNN's choice of
algorithms, compilation): a run that is thrown away comes first. The capture of its CUDA graphs is
in the clock of each run. Each seed has a network, loaders
and an optimiser of its own.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fastcnn.bench.timing import spread
from fastcnn.config import Config
from fastcnn.train.loop import new_evaluator, new_step
from fastcnn.train.setup import prepare

Row = dict[str, Any]
WARM_UP_STEPS = 3


@dataclass
class Trial:
    """One seed; top1 after each epoch, fractions of 1, and the clock then, in seconds."""

    seed: int
    top1: list[float]
    seconds: list[float]

    def epochs_to(self, target: float) -> int | None:
        """The first epoch (from 1) after which the target was met; None if it never was."""
        return next((i for i, top1 in enumerate(self.top1, 1) if top1 >= target), None)


class Training:
    """A network in training, as `fastcnn train` has it, without a run folder."""

    def __init__(self, config: Config):
        self.setup = setup = prepare(config)
        self.step = new_step(setup)
        self.evaluator = new_evaluator(setup, self.step, setup.test_loader or setup.val_loader)

    def train_epoch(self, most: int | None = None) -> None:
        """Make the steps of an epoch, or the first few of them."""
        for number, _ in enumerate(self.step.epoch(self.setup.train_loader), 1):
            if number == most:
                break

    def test_top1(self) -> float:
        return self.evaluator().figures.top1


def run_trial(config: Config) -> Trial:
    """Train one seed to the end of its schedule."""
    training = Training(config)
    trial = Trial(config.run.seed, [], [])
    if training.setup.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(config.optim.epochs):
        training.train_epoch()
        trial.top1.append(training.test_top1())  # waits for the device
        trial.seconds.append(time.perf_counter() - start)
    return trial


def warm_up(config: Config) -> None:
    """Train a network that is thrown away and evaluate it: on a GPU for an epoch, so that cuDNN has
    chosen for the smaller last batch as well, else for a few steps."""
    training = Training(config)
    on_gpu = training.setup.device.type == "cuda"
    training.train_epoch(most=None if on_gpu else WARM_UP_STEPS)
    training.test_top1()


def trials(config: Config, seeds: int, has_time_for: Callable[[str], bool]) -> Iterator[Trial]:
    """Train once a seed, from config.run.seed up, as long as there is time for another one."""
    warm = False
    for seed in range(config.run.seed, config.run.seed + seeds):
        if has_time_for(f"{config.model.arch} seed {seed}"):
            if not warm:
                warm_up(config)
                warm = True
            yield run_trial(replace(config, run=replace(config.run, seed=seed)))


def row_of(config: Config, target: float, found: list[Trial], on_gpu: bool) -> Row:
    """Sum the trials up. Seconds are told on a GPU alone; of trials that met the target and, whole
    runs, of all."""
    epochs = [trial.epochs_to(target) for trial in found]
    met = [(trial, number) for trial, number in zip(found, epochs, strict=True) if number]
    row: Row = {
        "network": config.model.arch,
        "batch": config.data.batch_size,
        "loader": config.data.loader,
        "data": Path(config.data.data).name,  # no path of this machine
        "recipe": config.run.recipe,
        "epochs": config.optim.epochs,
        "target": target,
        "n": len(found),
        "met": len(met),
        "final_top1": summary([trial.top1[-1] for trial in found]),
    }
    if met:
        row["epochs_to_target"] = summary([number for _, number in met])
    if on_gpu:
        row["seconds"] = summary([trial.seconds[-1] for trial in found])
        if met:
            row["seconds_to_target"] = summary([t.seconds[e - 1] for t, e in met])
    row["trials"] = [asdict(t) if on_gpu else {"seed": t.seed, "top1": t.top1} for t in found]
    return row


def summary(samples: list[Any]) -> dict[str, float]:
    """Mean, median and extremes."""
    return {"mean": float(f"{statistics.fmean(samples):.5g}"), **spread(samples, digits=5)}
