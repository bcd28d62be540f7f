"""The learning rate as a function of the step: no state, so a resumed run needs none."""

import math

from fastcnn.config import OptimConfig

ONE_CYCLE_RISE = 0.23  # fraction of the steps in which the rate rises
ONE_CYCLE_START = 0.04  # first rate as a fraction of the peak, 1/25 as in Smith & Topin (2018)


def learning_rate(step: int, steps_per_epoch: int, config: OptimConfig) -> float:
    """The learning rate of optimisation step `step` (0-based).

    constant      lr
    step          lr · gamma^⌊epoch / step_epochs⌋
    milestones    lr · gamma^(number of milestones reached)
    cosine        from lr to lr · final_lr along half a cosine
    one-cycle     linear rise from lr / 25, then half a cosine down to lr · final_lr
    inverse-time  lr / (1 + time_decay · step)

    `warmup_epochs` puts a linear rise from 0 before each of them (it is one-cycle's own rise);
    cosine spends what remains after it.
    """
    total = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.schedule == "one-cycle":
        rise = warmup if config.warmup_epochs else round(ONE_CYCLE_RISE * total)
        return config.lr * _one_cycle(step, total, max(1, rise), config.final_lr)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * _factor(step, total, warmup, steps_per_epoch, config)


def _factor(step: int, total: int, warmup: int, steps_per_epoch: int, config: OptimConfig) -> float:
    epoch = step // steps_per_epoch
    if config.schedule == "step":
        return config.gamma ** (epoch // config.step_epochs)
    if config.schedule == "milestones":
        return config.gamma ** sum(epoch >= milestone for milestone in config.milestones)
    if config.schedule == "cosine":
        return _half_cosine((step - warmup) / max(1, total - warmup), config.final_lr)
    if config.schedule == "inverse-time":
        return 1 / (1 + config.time_decay * step)
    return 1.0


def _one_cycle(step: int, total: int, rise: int, final: float) -> float:
    if step < rise:
        return ONE_CYCLE_START + (1 - ONE_CYCLE_START) * (step + 1) / rise
    return _half_cosine((step + 1 - rise) / max(1, total - rise), final)


def _half_cosine(part: float, final: float) -> float:
    return final + (1 - final) * (1 + math.cos(math.pi * min(part, 1.0))) / 2
