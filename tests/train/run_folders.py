"""Folders as runs leave them, written without training."""

import json
import math

from fastcnn.config import Config
from fastcnn.train.rundir import RunFolder, config_text

SUMMARY = {
    "arch": "cnn-a",
    "parameters": 591274,
    "data": "digits",
    "images": {"train": 1437, "test": 360},
    "bad_images": 0,
    "grey_images_dropped": 0,
    "best_epoch": 1,
    "best_val_top1": 0.52,
    "tested_model": "last",
    "test_flip": False,
    "validation_images": "test",
    "test_loss": 1.25,
    "test_top1": 0.485,
    "test_top5": 0.923,
    "train_seconds": 1726.0,
    "images_per_s": 369.4,
    "backend": "fused",
    "loader": "resident",
    "device": "cpu (1 thread)",
    "precision": "fp32",
    "recipe": "report",
    "seed": 0,
}
CONFUSION = "true \\ predicted,cat,d<o>g\ncat,3,1\nd<o>g,4,6\n"


def rows(epochs):
    """Metrics of each epoch, all different."""
    return [
        {
            "epoch": epoch,
            "train_loss": 2 / epoch,
            "train_top1": 1 - 0.8 / epoch,
            "val_loss": 2.1 / math.sqrt(epoch),
            "val_top1": 0.9 - 0.7 / epoch,
            "val_top5": 0.99 - 0.3 / epoch,
            "lr": 0.1 / epoch,
            "images_per_s": 400.0 + epoch % 7,
            "seconds": 3.0,
            "skipped_steps": 0,
        }
        for epoch in range(1, epochs + 1)
    ]


def make_run(path, epochs=5, summary=None, finished=True, **options):
    """Write a run's text files; `summary` and `options` stand above SUMMARY and the defaults."""
    path.mkdir(parents=True)
    flat = Config().flat() | {"arch": "cnn-a", "data": "digits", "epochs": epochs} | options
    folder = RunFolder(path)
    (path / "config.yaml").write_text(config_text(Config.from_flat(flat)))
    command = ["fastcnn", "train", "--name", "a b"]
    (path / "environment.json").write_text(
        json.dumps({"command": command, "versions": {"torch": "2.11.0"}, "gpus": []})
    )
    if epochs:
        folder.write_metrics(rows(epochs))
    if finished:
        own = {"epochs": epochs, "seed": flat["seed"], "arch": flat["arch"]}
        folder.write_summary(SUMMARY | own | (summary or {}))
        (path / "confusion_matrix.csv").write_text(CONFUSION)
    return path
