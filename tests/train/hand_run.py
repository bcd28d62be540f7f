"""Training written out by hand in plain torch and float64: the oracle for whole runs.

It shares with fastcnn what a run starts from (the images of the digits and how they are split, the
initial weights, the order of the samples, the weight of mixup) and nothing of what a run does.

Seeds: with each, every ReLU and every maximum of a pool stays clear of a tie, so that rounding
cannot send a gradient elsewhere: 40 perturbations of the initial weights by 1e-6 all end within
2e-4 of where training by hand ends.
"""

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.config import DataConfig, OptimConfig
from fastcnn.data import load_dataset
from fastcnn.data.draws import epoch_order
from fastcnn.data.select import split
from fastcnn.train.optim.mix import draw

EPOCHS, BATCH = 2, 4
# what a case does not name. 46 images, 34 with validation: the last batch is one of two
COMMON = {
    "data": "digits",
    "train_subset": 46,
    "test_subset": 30,
    "val_fraction": 0.0,
    "batch_size": BATCH,
    "eval_batch_size": 16,
    "drop_last": False,
    "shuffle": False,
    "crop_padding": 0,
    "flip": "none",
    "epochs": EPOCHS,
    "momentum": 0.0,
    "nesterov": False,
    "decay": "auto",
    "exempt_norm_bias": True,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "clip_grad": 0.0,
    "ema": 0.0,
    "best_metric": "val_top1",
    "restore_best": False,
    "precise_bn": "off",
    "conv": "vendor",  # the library's round by more than the perturbations above
    "device": "cpu",
    "threads": 1,
}
CASES = {
    "sgd": {
        "arch": "mao-default",
        "image_size": 26,
        "seed": 12,
        "init": "he",
        "normalize": "centered",
        "optimizer": "sgd",
        "lr": 0.05,
        "momentum": 0.8,
        "weight_decay": 0.02,
        "label_smoothing": 0.2,
        "schedule": "one-cycle",
        "final_lr": 0.1,
    },
    "adam": {
        "arch": "murgolo-base",
        "image_size": 16,
        "seed": 15,
        "init": "torch",
        "normalize": "zscore",
        "shuffle": True,
        "drop_last": True,
        "val_fraction": 0.25,
        "optimizer": "adam",
        "lr": 2e-3,
        "weight_decay": 0.005,
        "exempt_norm_bias": False,
        "schedule": "cosine",
        "warmup_epochs": 0.5,
        "final_lr": 0.05,
        "clip_grad": 0.5,
        "best_metric": "val_loss",
    },
    "adamw": {
        "arch": "murgolo-no-dropout",
        "image_size": 16,
        "seed": 21,
        "init": "xavier",
        "normalize": "mean-image",
        "optimizer": "adamw",
        "lr": 2e-3,
        "weight_decay": 0.5,
        "schedule": "inverse-time",
        "time_decay": 0.1,
        "ema": 0.4,
    },
    "nesterov": {
        "arch": "mao-default",
        "image_size": 26,
        "seed": 2,
        "init": "uniform",
        "normalize": "unit",
        "val_fraction": 0.25,
        "optimizer": "sgd",
        "lr": 0.2,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.02,
        "decay": "decoupled",
        "schedule": "step",
        "step_epochs": 1,
        "gamma": 0.3,
        "mixup": 0.4,
        "label_smoothing": 0.1,
    },
    "best": {
        "arch": "murgolo-no-dropout",
        "image_size": 16,
        "seed": 17,
        "init": "xavier",
        "normalize": "zscore",
        "shuffle": True,
        "val_fraction": 0.25,
        "optimizer": "sgd",
        "lr": 0.02,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "schedule": "milestones",
        "milestones": [1],
        "gamma": 0.5,
        "ema": 0.8,
        "best_metric": "val_loss",
        "restore_best": True,
    },
}


def mao_default():
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 48, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(48, 96, 3), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(96, 512), nn.ReLU(), nn.Linear(512, 10)),
    )


def murgolo(*norm):
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 5, padding=2, bias=not norm), *norm, nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


BY_HAND = {
    "mao-default": mao_default,
    "murgolo-base": murgolo,
    "murgolo-no-dropout": lambda: murgolo(nn.BatchNorm2d(32)),
}


def tensors_of(state):
    """The tensors of a state dict in order; fastcnn's batch norm does not count its batches."""
    return [t for name, t in state.items() if "num_batches_tracked" not in name]


def initial_model(options):
    drawn = build(NETWORKS[options["arch"]], options["image_size"], 10)
    initialise(drawn, options["init"], torch.Generator().manual_seed(options["seed"]))
    model = BY_HAND[options["arch"]]().double()
    own, theirs = tensors_of(model.state_dict()), tensors_of(drawn.state_dict())
    for mine, other in zip(own, theirs, strict=True):
        mine.copy_(other)
    return model


def inputs_of(options):
    """Inputs float64 (n, 3, H, W) and labels: training, validation (or test), test."""
    config = DataConfig(
        "digits", train_subset=46, test_subset=30, val_fraction=options["val_fraction"]
    )
    found = split(load_dataset(config, options["image_size"]), config, options["seed"])
    parts = [found.train, found.val or found.test, found.test]
    pixels = [torch.from_numpy(np.array(p.pixels)).permute(0, 3, 1, 2) for p in parts]
    pixels = [x.double() / 255 for x in pixels]
    train = pixels[0]
    channels = (train.mean((0, 2, 3), True), train.std((0, 2, 3), correction=0, keepdim=True))
    shift, scale = {
        "unit": (0.0, 1.0),
        "centered": (0.5, 1.0),
        "mean-image": (train.mean(0), 1.0),
        "zscore": channels,
    }[options["normalize"]]
    labels = [torch.from_numpy(part.labels) for part in parts]
    return [((x - shift) / scale, y) for x, y in zip(pixels, labels, strict=True)]


def half_cosine(part, low):
    return low + (1 - low) * (1 + math.cos(math.pi * part)) / 2


def rate(options, step, steps):
    """The learning rate of a step, 0-based, where an epoch has `steps`."""
    peak, schedule, total = options["lr"], options["schedule"], EPOCHS * steps
    if schedule == "one-cycle":
        rise, low = round(0.23 * total), options["final_lr"]
        if step < rise:
            return peak * (1 / 25 + 24 / 25 * (step + 1) / rise)
        return peak * half_cosine((step + 1 - rise) / (total - rise), low)
    if schedule == "cosine":
        rise, low = round(options["warmup_epochs"] * steps), options["final_lr"]
        if step < rise:
            return peak * (step + 1) / rise
        return peak * half_cosine((step - rise) / (total - rise), low)
    if schedule == "inverse-time":
        return peak / (1 + options["time_decay"] * step)
    return peak if step < steps else peak * options["gamma"]


def make_optimizer(model, options):
    decay = 0.0 if options["decay"] == "decoupled" else options["weight_decay"]
    exempt = options["exempt_norm_bias"]
    groups = [
        {"params": [p], "weight_decay": 0.0 if exempt and p.ndim == 1 else decay}
        for p in model.parameters()
    ]
    if options["optimizer"] == "sgd":
        momentum, nesterov = options["momentum"], options["nesterov"]
        return torch.optim.SGD(groups, lr=1.0, momentum=momentum, nesterov=nesterov)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options["optimizer"]](groups)


def losses(logits, labels, smoothing=0.0):
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    return -(1 - smoothing) * log_p.gather(1, labels[:, None])[:, 0] - smoothing * log_p.mean(1)


def ranks(logits, labels):
    """How many classes stand above the right one."""
    return (logits > logits.gather(1, labels[:, None])).sum(1)


@dataclass
class Found:
    loss: float
    top1: float
    top5: float
    confusion: list


def figures_of(model, images, labels):
    """A model's figures over a set, all images at once."""
    model.eval()
    with torch.no_grad():
        logits = model(images)
    rank, counts = ranks(logits, labels), torch.zeros(10, 10, dtype=torch.int64)
    for true, predicted in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
        counts[true, predicted] += 1
    top1, top5 = (rank < 1).double().mean().item(), (rank < 5).double().mean().item()
    return Found(losses(logits, labels).mean().item(), top1, top5, counts.tolist())


class HandRun:
    """`rows`: figures of the epochs. `ends`: the model that counts (the average, if there is one)
    after each. `model`, `shadow`: trained and averaged, as they are after the last."""

    def __init__(self, options):
        self.options = options
        (self.images, self.labels), self.val, self.test = inputs_of(options)
        self.model = initial_model(options)
        self.shadow = copy.deepcopy(self.model) if options["ema"] else None
        self.optimizer = make_optimizer(self.model, options)
        self.step, self.rows, self.ends = 0, [], []
        for epoch in range(EPOCHS):
            self.train(epoch)

    def train(self, epoch):
        options, count = self.options, len(self.labels)
        turn = epoch if options["shuffle"] else 0
        order = epoch_order(options["seed"], turn, count, True)
        batches = [b for b in order.split(BATCH) if len(b) == BATCH or not options["drop_last"]]
        loss = hits = 0.0
        self.model.train()
        for batch in batches:
            lr = rate(options, self.step, len(batches))
            each, rank = self.update(self.images[batch], self.labels[batch], lr)
            loss, hits = loss + each.sum().item(), hits + (rank < 1).sum().item()
        seen = sum(map(len, batches))
        self.ends.append(copy.deepcopy(self.shadow or self.model))
        found = figures_of(self.ends[-1], *self.val)
        row = {"epoch": epoch + 1, "train_loss": loss / seen, "train_top1": hits / seen, "lr": lr}
        self.rows.append(
            row | {"val_loss": found.loss, "val_top1": found.top1, "val_top5": found.top5}
        )

    def update(self, images, labels, lr):
        options, others, weight = self.options, labels, 1.0
        if options["mixup"]:
            weight = draw(OptimConfig(mixup=0.4), options["seed"], self.step).weight
            images, others = weight * images + (1 - weight) * images.roll(1, 0), labels.roll(1)
        logits, smoothing = self.model(images), options["label_smoothing"]
        each = weight * losses(logits, labels, smoothing)
        each = each + (1 - weight) * losses(logits, others, smoothing)
        self.optimizer.zero_grad()
        each.mean().backward()
        parameters = list(self.model.parameters())
        norm = sum(p.grad.square().sum() for p in parameters).sqrt().item()
        for p in parameters:
            if options["clip_grad"]:
                p.grad *= min(1.0, options["clip_grad"] / norm)
            if options["decay"] == "decoupled" and p.ndim > 1:
                p.data *= 1 - lr * options["weight_decay"]
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        if self.shadow:
            decay = min(options["ema"], (1 + self.step) / (10 + self.step))
            own, leading = (tensors_of(m.state_dict()) for m in (self.shadow, self.model))
            for mine, other in zip(own, leading, strict=True):
                mine.copy_(decay * mine + (1 - decay) * other)
        self.step += 1
        return each.detach(), ranks(logits.detach(), labels)

    @property
    def best_epoch(self):
        values = [row[self.options["best_metric"]] for row in self.rows]
        best = max if self.options["best_metric"] == "val_top1" else min
        return 1 + values.index(best(values))
