"""Out-of-distribution detection: how well a run tells its own test images from those of other data.

Every threshold comes from in-distribution images alone; those out of distribution are only judged.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastcnn.config import DataConfig
from fastcnn.data import Dataset, Images, load_dataset
from fastcnn.data.draws import derive_seed
from fastcnn.data.files import Files
from fastcnn.errors import CheckpointError, UsageError
from fastcnn.insight.ood_scores import Scores, scores
from fastcnn.train import checkpoint
from fastcnn.train.host import tune_process
from fastcnn.train.precision import Precision, choose_device
from fastcnn.train.rundir import RunFolder
from fastcnn.train.trained import TrainedModel, evaluation_data, evaluation_loader, load_trained

log = logging.getLogger(__name__)

QUANTILE = 0.05  # of the in-distribution images that a threshold may lose
TRAINING_IMAGES = 5000  # that the threshold is chosen on where a run held none out
# how images are read, not which ones: what the run's own images take of the options as well
READING = {"loader", "store", "workers", "eval_batch_size", "on_bad_image", "bad_limit"}
VIEW = ("resize", "grayscale", "test_fraction")  # what changes a dataset's digest


@dataclass(frozen=True)
class Detection:
    """One score's figures; all but the threshold are fractions of 1.

    An image counts as in-distribution where its score reaches the threshold. accuracy: share of
    all images of both sets that are told rightly, as in murgolo's table 2: each image weighs the
    same, so a set ten times as large weighs ten times as much. balanced_accuracy: the mean of both
    sets' shares. auroc: chance that an in-distribution image scores above one out of distribution,
    ties half. fpr95: share of out-of-distribution images that reach the largest in-distribution
    score that at least 95 % of the in-distribution images reach; nothing is interpolated.
    kept_fit, kept_in, kept_out: share of each set that reaches the threshold.
    """

    threshold: float
    accuracy: float
    balanced_accuracy: float
    auroc: float
    fpr95: float
    kept_fit: float
    kept_in: float
    kept_out: float


@dataclass(frozen=True)
class Result:
    """rows: a Detection a score, by `Scores.by_name`, activations first, in forward order. fit,
    held_in, held_out: the scores themselves. words: what was measured, in lines."""

    rows: Mapping[str, Detection]
    fit: Scores
    held_in: Scores
    held_out: Scores
    words: tuple[str, ...]


def judge(
    fit: np.ndarray, held_in: np.ndarray, held_out: np.ndarray, quantile: float = QUANTILE
) -> Detection:
    """Choose a threshold on the scores `fit`, and judge it on test images in and out of
    distribution.

    Scores: (n,), finite, higher for in-distribution. The threshold is the largest score that at
    most the part `quantile` of `fit` stays below, so that 1 - quantile of it are kept; below it =
    out of distribution. Raises UsageError for a quantile outside [0, 1), ValueError for no scores
    or such as are not finite.
    """
    from sklearn.metrics import roc_auc_score

    _check_quantile(quantile)
    sets = {"fit": fit, "held_in": held_in, "held_out": held_out}
    for name, values in sets.items():
        if np.ndim(values) != 1 or len(values) == 0 or not np.isfinite(values).all():
            raise ValueError(f"{name}: expected finite scores (n,), got {np.shape(values)}")
    threshold = _cut(fit, quantile)
    kept = {name: float(np.mean(values >= threshold)) for name, values in sets.items()}
    right = np.concatenate([held_in >= threshold, held_out < threshold])
    inside = np.repeat([1, 0], [len(held_in), len(held_out)])
    return Detection(
        threshold=threshold,
        accuracy=float(right.mean()),
        balanced_accuracy=(kept["held_in"] + 1 - kept["held_out"]) / 2,
        auroc=float(roc_auc_score(inside, np.concatenate([held_in, held_out]))),
        fpr95=float(np.mean(held_out >= _cut(held_in, 0.05))),
        kept_fit=kept["fit"],
        kept_in=kept["held_in"],
        kept_out=kept["held_out"],
    )


def _cut(values: np.ndarray, lost: float) -> float:
    """The largest of `values` that at most the part `lost` of them stays below."""
    return float(np.sort(values)[int(lost * len(values))])


def _check_quantile(quantile: float) -> None:
    if not 0 <= quantile < 1:
        raise UsageError(f"quantile: expected 0 or more, less than 1, got {quantile}")


def detect(
    run_folder: str,
    out_data: str,
    *,
    limit: int | None = None,
    quantile: float = QUANTILE,
    overrides: dict[str, Any] | None = None,
) -> Result:
    """Judge every score of a finished run on its own test images against those of other data.

    The model is the one that the run's summary speaks of. Thresholds come from the run's validation
    images or, where it has none, from training images, which score higher than unseen ones.
    out_data: as --data; of its images the test images, brought to the network's size, whatever
    their classes. limit: at most this many images of each set, drawn by the run's seed. overrides:
    options by name: device, threads, and those of data, which hold for `out_data`, and for the
    run's own images where they say no more than how to read them.

    Raises UsageError for data that is the run's own, a quantile outside [0, 1) and a limit below 1;
    CheckpointError for a run that is missing or unfinished; what load_dataset raises.
    """
    _check_quantile(quantile)
    if limit is not None and limit < 1:
        raise UsageError(f"limit: expected 1 or more images, got {limit}")
    options = overrides or {}
    tune_process(options.get("threads"))
    device = choose_device(options.get("device", "auto"))
    trained = _finished(run_folder, device)
    data_options = {k: v for k, v in options.items() if hasattr(trained.config.data, k)}
    own, test, other = _data(trained, out_data, data_options, device)
    fit, origin = _threshold_images(own, trained.config.run.seed)
    sets = [(own, fit), (own, test), (other, other.test)]
    drawn = [(dataset, _drawn(images, limit, trained.config.run.seed)) for dataset, images in sets]
    found = [_look(trained, *pair, data_options, device) for pair in drawn]
    in_fit, inside, outside = (part.by_name() for part in found)
    rows = {name: judge(in_fit[name], inside[name], outside[name], quantile) for name in in_fit}
    counts = [f"{len(images):,}" for _, images in drawn]
    words = (
        f"network: {trained.config.model.arch}, {trained.path.name}, fp32",
        f"thresholds: keep {100 * (1 - quantile):g} % of {counts[0]} {origin} of {own.name}",
        f"in distribution: {counts[1]} of {len(test):,} test images of {own.name}",
        f"out of distribution: {counts[2]} of {len(other.test):,} test images of {other.name}",
    )
    fitted, held_in, held_out = found
    return Result(rows, fitted, held_in, held_out, words)


def _finished(run_folder: str, device: torch.device) -> TrainedModel:
    """The model of a finished run; raises CheckpointError where there is none."""
    folder = RunFolder.open(run_folder)
    summary = folder.read_summary()
    if summary is None:
        raise CheckpointError(f"{folder.path} is not finished; go on with --resume {folder.path}")
    name = f"{summary.get('tested_model', 'last')}.pt"
    return load_trained(checkpoint.locate(folder.path, name), device, "torch")


def _data(
    trained: TrainedModel, out_data: str, options: dict[str, Any], device: torch.device
) -> tuple[Dataset, Images | Files, Dataset]:
    """The run's own data, split as it was trained, its test images, and the other data."""
    size, reading = trained.image_size, _reading(options)
    own_config = replace(trained.config.data, **reading)
    other = load_dataset(_other_config(own_config, out_data, size, options), size, device)
    # seen as the others are: the digest is of what is seen
    view = {name: options[name] for name in VIEW if name in options}
    if other.digest == load_dataset(replace(own_config, **view), size, device).digest:
        raise UsageError(f"--data {out_data}: the run's own images; give other data")
    own, test = evaluation_data(trained, None, "test", reading, device)
    if own.digest != trained.data.get("digest"):
        log.warning("note: %s has changed since training: other images or another split", own.name)
    return own, test, other


def _reading(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in READING}


def _other_config(
    own: DataConfig, data: str, image_size: int, options: dict[str, Any]
) -> DataConfig:
    """How the other data is read: by `options`, and else as the run's own images.

    The place of the run's own images, and what suits their number, is not that of others.
    """
    place = own.data_dir if data == own.data else None
    chosen = {"data_dir": place, "loader": "auto", "store": "auto", **options}
    return replace(own, **{**chosen, "data": data, "image_size": image_size})


def _look(
    trained: TrainedModel,
    dataset: Dataset,
    images: Images | Files,
    options: dict[str, Any],
    device: torch.device,
) -> Scores:
    config = replace(trained.config, data=replace(trained.config.data, **_reading(options)))
    feeding = (config, dataset.loader, trained.normalization, device, "torch", Precision())
    return scores(trained, evaluation_loader(images, *feeding), device)


def _threshold_images(own: Dataset, seed: int) -> tuple[Images | Files, str]:
    """The images that thresholds are chosen on, and what they are; never test images."""
    if own.val is not None:
        return own.val, "validation images"
    drawn = _drawn(own.train, TRAINING_IMAGES, seed)
    return drawn, "training images (none were held out for validation)"


def _drawn(images: Images | Files, limit: int | None, seed: int) -> Images | Files:
    """At most `limit` images, drawn by the seed, in their order."""
    if limit is None or limit >= len(images):
        return images
    order = np.random.default_rng(derive_seed(seed, "out-of-distribution")).permutation(len(images))
    return images.take(np.sort(order[:limit]))
