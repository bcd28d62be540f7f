"""Whether a run can have reached what a checkpoint says of it: the file may be somebody else's."""

import sys
from typing import Any

from fastcnn.errors import CheckpointError
from fastcnn.train.loop import Training, brief
from fastcnn.train.rundir import COLUMNS


def validate_resume(training: Training) -> None:
    """Raise CheckpointError where steps, epochs and figures that a training has taken up do not go
    together, or are no numbers to go on with."""
    at, step, sums = training.state, training.step.step, training.step.metrics.sums
    check_history(at.history)
    # an epoch of --fast-dev-run has one step
    steps = 1 if training.setup.config.run.fast_dev_run else training.step.steps_per_epoch
    end = (at.epoch + 1) * steps
    best = (at.best_epoch, at.best_value)
    right = {
        "epoch": (at.epoch, at.epoch == len(at.history)),
        "step": (step, type(step) is int and end - steps <= step <= end),
        "trained": (at.trained, at.trained is False or (at.trained is True and step == end)),
        "seconds": (at.seconds, is_figure(at.seconds) and at.seconds >= 0),
        "best": (best, is_best(*best, at.epoch)),
        "sums": (sums.tolist(), bool((sums.isfinite() & (sums >= 0)).all())),
    }
    for name, (value, holds) in right.items():
        if not holds:
            raise CheckpointError(
                f"{name} {brief(value)} is not possible after {at.epoch} epochs of {steps} steps; "
                "give an older checkpoint"
            )


def is_best(epoch: int, value: Any, done: int) -> bool:
    """Whether `epoch` and its figure may be the best of `done` epochs."""
    return 0 < epoch <= done and is_figure(value) if done else (epoch, value) == (0, None)


def check_history(history: Any) -> None:
    """Raise CheckpointError unless a checkpoint's epochs have the figures of metrics.csv."""
    rows = history if isinstance(history, list) else [None]
    for number, row in enumerate(rows, 1):
        whole = isinstance(row, dict) and row.keys() >= set(COLUMNS) and row["epoch"] == number
        if not whole or not all(is_figure(row[name]) for name in COLUMNS):
            raise CheckpointError("holds epochs without their figures; give an older checkpoint")


def is_figure(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max
