"""Out-of-distribution detection: how well a run tells test images of one data set from another's.

Every threshold comes from in-distribution images that are held out: the network was not trained on
them, and nothing is judged on them. Images out of distribution are only judged.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fastcnn.data import Dataset, Images, load_dataset
from fastcnn.data.draws import derive_seed
from fastcnn.data.images import Files
from fastcnn.data.progress import progress_bar
from fastcnn.errors import DataError, UsageError, nearest
from fastcnn.insight.ood.ood_judge import QUANTILE, Detection, check_quantile, judge
from fastcnn.insight.ood.ood_scores import ENERGY, PROBABILITY, Scores, activation_names, scores
from fastcnn.train.checkpoints.load_run import (
    TrainedModel,
    evaluation_data,
    evaluation_loader,
    open_trained,
    other_data,
    splits,
)
from fastcnn.train.host import tune_process
from fastcnn.train.numerics.precision import Precision, choose_device
from fastcnn.train.rundir import RunFolder

log = logging.getLogger(__name__)

# how images are read, not which ones: what the run's own images take of the options as well
READING = {"loader", "store", "workers", "eval_batch_size", "on_bad_image", "bad_limit"}
VIEW = ("resize", "grayscale", "test_fraction")  # what changes a dataset's digest


@dataclass(frozen=True)
class ImageSet:
    """Which images were scored: `places` (n,), their positions among the `whole` images of a split
    of the data `name`; `classes`, the class of each."""

    name: str
    split: str
    whole: int
    places: np.ndarray
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def words(self) -> str:
        """How many of how many, and of what."""
        split = {"val": "validation"}.get(self.split, self.split)
        return f"{len(self):,} of {self.whole:,} {split} images of {self.name}"


@dataclass(frozen=True)
class Result:
    """rows: a Detection a score, by `Scores.by_name`, activations first, in forward order. fit,
    held_in, held_out: the scores themselves; sets: the images that have them, in that order.
    shown: the score that was asked for, else the best. words: what was measured, in lines."""

    rows: Mapping[str, Detection]
    fit: Scores
    held_in: Scores
    held_out: Scores
    sets: tuple[ImageSet, ImageSet, ImageSet]
    shown: str
    words: tuple[str, ...]

    @property
    def best(self) -> str:
        """The score of the largest AUROC, the first of equals."""
        return best_of(self.rows)


def best_of(rows: Mapping[str, Detection]) -> str:
    """The score of the largest AUROC, the first of equals."""
    return max(rows, key=lambda name: rows[name].auroc)


def detect(
    run_folder: str,
    out_data: str,
    *,
    in_data: str | None = None,
    weights: str | None = None,
    score: str | None = None,
    limit: int | None = None,
    quantile: float = QUANTILE,
    overrides: dict[str, Any] | None = None,
) -> Result:
    """Judge every score of a finished run on test images in and out of distribution.

    in_data, out_data: as --data, whatever their classes; of their images the test images, brought
    to the network's size. in_data None: the run's own. Thresholds come from the validation images
    in distribution or, where there are none, from half of the test images, drawn by the run's seed;
    the other half is judged. weights: "last" or "best"; None: the model that the run's summary
    speaks of. score: `Result.shown`. limit: at most this many images of each set, drawn by the
    run's seed. overrides: options by name: device, threads, and those of data, which hold for
    `out_data` and `in_data`, and for the run's own images where they say no more than how to read
    them.

    Raises UsageError for the same data in and out, an unknown score, a quantile outside [0, 1) and
    a limit below 1; CheckpointError for a run that is missing or unfinished; DataError for a single
    image to choose a threshold and to judge; what load_dataset raises.
    """
    check_quantile(quantile)
    if limit is not None and limit < 1:
        raise UsageError(f"--limit: expected 1 or more images, got {limit}")
    options = overrides or {}
    tune_process(options.get("threads"))
    device = choose_device(options.get("device", "auto"))
    RunFolder.finished(run_folder)
    trained = open_trained(run_folder, device, "torch", weights)
    if score is not None:
        _check_score(score, trained)
    data_options = {k: v for k, v in options.items() if hasattr(trained.config.data, k)}
    own, other = _data(trained, in_data, out_data, data_options, device)
    seed = trained.config.run.seed
    fit, test = _held_out(own, seed)
    outside = _Part(other, "test", np.arange(len(other.test)))
    parts = [_limited(part, limit, seed) for part in (fit, test, outside)]
    fitted, held_in, held_out = (_check_stop(trained, part, data_options, device) for part in parts)
    sets = parts[0].described(), parts[1].described(), parts[2].described()
    in_fit, inside, out = (found.by_name() for found in (fitted, held_in, held_out))
    rows = {name: judge(in_fit[name], inside[name], out[name], quantile) for name in in_fit}
    unjudged = "" if own.val is not None else ", not judged on (none were held out for validation)"
    words = (
        f"network: {trained.config.model.arch}, {trained.path.name}, fp32",
        f"thresholds: keep {100 * (1 - quantile):g}% of {sets[0].words}{unjudged}",
        f"in distribution: {sets[1].words}",
        f"out of distribution: {sets[2].words}",
    )
    return Result(rows, fitted, held_in, held_out, sets, score or best_of(rows), words)


@dataclass(frozen=True)
class _Part:
    """Images of a split to score, by their positions in it."""

    dataset: Dataset
    split: str
    places: np.ndarray

    @property
    def split_images(self) -> Images | Files:
        return splits(self.dataset)[self.split]

    def described(self) -> ImageSet:
        """The same without the images, which may fill the memory."""
        images, classes = self.split_images, self.dataset.classes
        named = [classes[label] for label in images.labels[self.places]]
        return ImageSet(self.dataset.name, self.split, len(images), self.places, named)


def _check_score(score: str, trained: TrainedModel) -> None:
    names = [*activation_names(trained), PROBABILITY, ENERGY]
    if score not in names:
        listed = ", ".join(names)
        raise UsageError(f"--score '{score}' is not one of {listed}{nearest(score, names)}")


def _data(
    trained: TrainedModel,
    in_data: str | None,
    out_data: str,
    options: dict[str, Any],
    device: torch.device,
) -> tuple[Dataset, Dataset]:
    """The data in distribution, of the run itself split as it was trained, and the other data."""
    size, reading = trained.image_size, _reading(options)
    config = replace(trained.config.data, **reading)
    with _called("--out"):
        other = load_dataset(other_data(config, out_data, size, options), size, device)
    if in_data is not None:
        with _called("--in"):
            inside = load_dataset(other_data(config, in_data, size, options), size, device)
        if other.digest == inside.digest:
            raise UsageError(f"--out {out_data}: the images of --in {in_data}; give other data")
        return inside, other
    # seen as the others are: the digest is of what is seen
    view = {name: options[name] for name in VIEW if name in options}
    if other.digest == load_dataset(replace(config, **view), size, device).digest:
        raise UsageError(f"--out {out_data}: the run's own images; give other data")
    own, _ = evaluation_data(trained, None, "test", reading, device)
    if own.digest != trained.data.get("digest"):
        log.warning("note: %s has changed since training: other images or another split", own.name)
    return own, other


@contextlib.contextmanager
def _called(flag: str) -> Iterator[None]:
    """Let errors of reading data name the option that the data were given by."""
    try:
        yield
    except (DataError, UsageError) as error:
        error.args = (str(error).replace("--data ", f"{flag} ", 1),)
        raise


def _reading(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in READING}


def _check_stop(
    trained: TrainedModel, part: _Part, options: dict[str, Any], device: torch.device
) -> Scores:
    config = replace(trained.config, data=replace(trained.config.data, **_reading(options)))
    feeding = (config, part.dataset.loader, trained.normalization, device, "torch", Precision())
    whole, count = part.split_images, len(part.places)
    chosen = whole if count == len(whole) else whole.take(part.places)
    with progress_bar(
        f"scores of {part.dataset.name}", count, announce=False, unit="images"
    ) as step:
        return scores(trained, _followed(evaluation_loader(chosen, *feeding), step), device)


def _followed(loader: Iterable[Any], step: Any) -> Iterator[Any]:
    """The batches of `loader`; `step` is told how many images each had."""
    for images, labels in loader:
        yield images, labels
        step(len(images))


def _held_out(data: Dataset, seed: int) -> tuple[_Part, _Part]:
    """The images that thresholds are chosen on, and the test images to judge: none are both."""
    count = len(data.test)
    if data.val is not None:
        chosen = _Part(data, "val", np.arange(len(data.val)))
        return chosen, _Part(data, "test", np.arange(count))
    if count < 2:
        raise DataError(
            f"{data.name}: {count} test image and no validation images, to choose a threshold and "
            "to judge it; give more"
        )
    order = np.random.default_rng(derive_seed(seed, "thresholds")).permutation(count)
    first, second = np.sort(order[: count // 2]), np.sort(order[count // 2 :])
    return _Part(data, "test", first), _Part(data, "test", second)


def _limited(part: _Part, limit: int | None, seed: int) -> _Part:
    """At most `limit` of the images, drawn by the seed, in their order."""
    count = len(part.places)
    if limit is None or limit >= count:
        return part
    order = np.random.default_rng(derive_seed(seed, "out-of-distribution")).permutation(count)
    return replace(part, places=part.places[np.sort(order[:limit])])
