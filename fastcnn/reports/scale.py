"""A part of an experiment: fewer images, fewer epochs, and steps as long as that asks for."""

from collections.abc import Mapping
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


def scaled(options: Mapping[str, Any], scale: float, train_images: int, test_images: int) -> Scaled:
    """The options at `scale` (1: the report's) on data of so many training and test images.

    Images an epoch, test images and epochs are multiplied by it, and so are the epochs at which a
    rate drops. SGD in a recipe of a report then makes fewer steps by scale squared: its rate is
    raised so that rate × steps stays, as far as lr / (1 - momentum) is 0.1 at most. Such slow rates
    follow the gradient's flow, where that product is the distance gone; without it, a tenth of
    mao2022 would show how seven networks sit on their first plateau. Adam's steps stay. Data with
    fewer images than an experiment takes are taken whole.
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
    if scale < 1 and full.run.recipe == "report" and full.optim.optimizer == "sgd":
        before = full.optim.epochs * ceil(most["epoch_images"] / full.data.batch_size)
        after = epochs * ceil(counts["epoch_images"] / full.data.batch_size)
        changed["lr"] = _longer_steps(full, before / after)
    shown = counts["epoch_images"], counts["test_subset"]
    lr = changed.get("lr", full.optim.lr)
    return Scaled(dict(options) | changed, *shown, epochs, lr, full)


def _epochs(full: Config, scale: float) -> dict[str, Any]:
    """The epochs and the epochs of drops that change."""
    if scale == 1:
        return {}
    optim = full.optim
    changed: dict[str, Any] = {"epochs": max(1, round(scale * optim.epochs))}
    if optim.schedule == "step":
        changed["step_epochs"] = max(1, round(scale * optim.step_epochs))
    if optim.schedule == "milestones":
        changed["milestones"] = sorted({max(1, round(scale * at)) for at in optim.milestones})
    if optim.warmup_epochs:
        changed["warmup_epochs"] = scale * optim.warmup_epochs
    return changed


def _longer_steps(full: Config, fewer: float) -> float:
    optim = full.optim
    longest = max(optim.lr, LONGEST_STEP * (1 - optim.momentum))
    return float(f"{min(optim.lr * fewer, longest):.3g}")
