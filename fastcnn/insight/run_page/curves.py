"""The curves of a run, and of several in the same charts, from their metrics."""

import math
from collections.abc import Sequence

from fastcnn.insight.drawing.figures import LOG_FROM
from fastcnn.insight.html.chart import Chart, Series
from fastcnn.insight.run_page.run_files import RunFiles


def run_charts(run: RunFiles) -> tuple[Chart, ...]:
    """Loss, accuracy, learning rate and speed over the epochs."""
    metrics = run.metrics
    losses = (line(run, "train_loss", "train", 0), line(run, "val_loss", "validation", 1))
    accuracies = (
        line(run, "train_top1", "train top-1", 0, 100),
        line(run, "val_top1", "validation top-1", 1, 100),
        line(run, "val_top5", "validation top-5", 2, 100),
    )
    last = "after 1 epoch" if run.epochs == 1 else f"after {run.epochs:,} epochs"
    return (
        loss_chart(
            "Loss",
            f"Training loss {metrics['train_loss'][-1]:#.4g} and validation loss "
            f"{metrics['val_loss'][-1]:#.4g} {last}, over the epochs.",
            losses,
        ),
        percent_chart(
            "Accuracy, %",
            f"Training top-1 {metrics['train_top1'][-1]:.2%}, validation top-1 "
            f"{metrics['val_top1'][-1]:.2%} and top-5 {metrics['val_top5'][-1]:.2%} {last}, over "
            "the epochs.",
            accuracies,
        ),
        Chart(
            "Learning rate",
            f"Learning rate over the epochs, {metrics['lr'][-1]:.4g} in the last.",
            (line(run, "lr", "learning rate", 3),),
            zero=True,
        ),
        Chart(
            "Training images per second",
            f"Training images per second over the epochs, {metrics['images_per_s'][-1]:,.0f} in "
            "the last.",
            (line(run, "images_per_s", "images/s", 6),),
            form="{:,.0f}",
            zero=True,
        ),
    )


def overlaid_charts(runs: Sequence[RunFiles], labels: Sequence[str]) -> tuple[Chart, ...]:
    """Accuracy and loss of several runs, a line a run that has ended an epoch."""

    def lines(column: str, factor: float = 1) -> tuple:
        return tuple(
            line(run, column, label, colour, factor)
            for colour, (run, label) in enumerate(zip(runs, labels, strict=True))
            if run.epochs
        )

    names = ", ".join(labels)
    return (
        percent_chart(
            "Validation top-1, %",
            f"Validation top-1 of {names} over the epochs.",
            lines("val_top1", 100),
        ),
        loss_chart(
            "Validation loss",
            f"Validation loss of {names} over the epochs.",
            lines("val_loss"),
        ),
        percent_chart(
            "Training top-1, %",
            f"Training top-1 of {names} over the epochs.",
            lines("train_top1", 100),
        ),
        loss_chart(
            "Training loss", f"Training loss of {names} over the epochs.", lines("train_loss")
        ),
    )


def line(run: RunFiles, column: str, name: str, colour: int, factor: float = 1) -> Series:
    """A column of a run over its epochs."""
    values = zip(run.metrics["epoch"], run.metrics[column], strict=True)
    return Series(name, tuple((epoch, factor * value) for epoch, value in values), colour)


def loss_chart(title: str, alt: str, lines: tuple[Series, ...]) -> Chart:
    """Losses, on a logarithmic axis where a linear one would hide the small ones."""
    values = [y for each in lines for _, y in each.points if math.isfinite(y)]
    log = bool(values) and min(values) > 0 and max(values) > LOG_FROM * min(values)
    return Chart(title, alt, lines, form="{:#.4g}", log=log)


def percent_chart(title: str, alt: str, lines: tuple[Series, ...]) -> Chart:
    return Chart(title, alt, lines, form="{:.2f}%")
