"""A part of an experiment: fewer images, fewer epochs, and steps as long as that asks for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from fastcnn.config import Config
from fastcnn.recipes import resolve

FEWEST_IMAGES = 20
LONGEST_STEP = 0.1  # largest lr / (1 - momentum) that a shorter run may have instead of its own


@dataclass(frozen=True)
class Scaled:
    """Options of a row at a scale, and what became of images, epochs and learning rate."""

    options: dict[str, Any]
    train_images: int
    test_images: int
    epochs: int
    lr: float
    full: Config


def scaled(
    options: Mapping[str, Any],
    scale: float,
    train_images: int,
    test_images: int,
    longer: float = 1.0,
) -> Scaled:
    """The options at `scale` (1: the report's) on data of so many training and test images.

    Images an epoch, test images and epochs are multiplied by it, and so are the epochs at which a
    rate drops, of which at least one stays before the end. longer: factor of the learning rate, as
    `longer_steps` gives it. Data with fewer images than an experiment takes are taken whole.
    """
    full = resolve(dict(options))
    most = {
        "train_subset": full.data.train_subset or train_images,
        "test_subset": full.data.test_subset or test_images,
        "epoch_images": full.data.epoch_images or full.data.train_subset or train_images,
    }
    there = {"train_subset": train_images, "test_subset": test_images, "epoch_images": train_images}
    counts = {
        name: min(there[name], max(FEWEST_IMAGES, round(scale * count)))
        for name, count in most.items()
    }
    changed: dict[str, Any] = {}
    if full.data.epoch_images is not None:
        # from all images, however few an epoch has
        changed["epoch_images"] = counts["epoch_images"]
        counts["train_subset"] = full.data.train_subset or train_images
    for name in ("train_subset", "test_subset"):
        if counts[name] < there[name]:
            changed[name] = counts[name]
        elif getattr(full.data, name) is not None:
            changed[name] = None
    changed |= _epochs(full, scale)
    epochs = changed.get("epochs", full.optim.epochs)
    if longer != 1 and is_raised(options):
        changed["lr"] = float(f"{longer * full.optim.lr:.3g}")
    shown = counts["epoch_images"], counts["test_subset"]
    lr = changed.get("lr", full.optim.lr)
    return Scaled(dict(options) | changed, *shown, epochs, lr, full)


def longer_steps(
    rows: Sequence[Mapping[str, Any]], scale: float, train_images: int, test_images: int
) -> float:
    """The factor by which SGD's learning rates of a report's rows are raised at a scale.

    Its rows make fewer steps by about scale squared. The rates are raised, all by one factor, so
    that rate × steps stays, as far as the largest lr / (1 - momentum) is 0.1 at most. Such slow
    rates follow the gradient's flow, where that product is the distance gone; without it, a tenth
    of mao2022 would make 2,370 steps of 0.001 in place of 234,600. Adam's steps stay, and so do the
    rates of rows that are about the rate.
    """
    factors = []
    for options in rows:
        part = scaled(options, scale, train_images, test_images)
        full = part.full
        if scale < 1 and is_raised(options):
            whole = full.data.epoch_images or full.data.train_subset or train_images
            before = full.optim.epochs * ceil(whole / full.data.batch_size)
            after = part.epochs * ceil(part.train_images / full.data.batch_size)
            safe = LONGEST_STEP * (1 - full.optim.momentum) / full.optim.lr
            factors.append(max(1.0, min(before / after, safe)))
    return min(factors, default=1.0)


def is_raised(options: Mapping[str, Any]) -> bool:
    """Whether the rate is SGD's of a report's recipe, and not what the row is about."""
    config = resolve(dict(options))
    return config.run.recipe == "report" and config.optim.optimizer == "sgd" and "lr" not in options


def _epochs(full: Config, scale: float) -> dict[str, Any]:
    """The epochs and the epochs of drops that change."""
    if scale == 1:
        return {}
    optim = full.optim
    # of two at least, since a drop that the whole has, the part has too
    changed: dict[str, Any] = {"epochs": max(min(2, optim.epochs), round(scale * optim.epochs))}
    if optim.schedule == "step":
        changed["step_epochs"] = max(1, round(scale * optim.step_epochs))
        if optim.step_epochs < optim.epochs:
            changed["step_epochs"] = min(changed["step_epochs"], changed["epochs"] - 1)
    if optim.schedule == "milestones":
        changed["milestones"] = sorted({max(1, round(scale * at)) for at in optim.milestones})
    if optim.warmup_epochs:
        changed["warmup_epochs"] = scale * optim.warmup_epochs
    return changed
