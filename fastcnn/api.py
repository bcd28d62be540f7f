"""fastcnn from Python: train, load, predict. Options are those of the command line, with `_`."""

import io
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastcnn.config import PlaceConfig, options_by_name
from fastcnn.errors import CheckpointError, DataError, UsageError, nearest
from fastcnn.options import Option, options_of, read_config_file
from fastcnn.packages import PackageError, require
from fastcnn.predict.classifier import Classifier, most_probable, open_classifier
from fastcnn.predict.feed import EXPECTED, Batch, batches, is_path
from fastcnn.predict.paths import image_paths
from fastcnn.recipes import resolve
from fastcnn.train.run import Outcome, evaluate_run, resume, start
from fastcnn.train.rundir import RunFolder

log = logging.getLogger(__name__)

NO_LISTS = (bytes, bytearray, memoryview, Mapping, io.IOBase)  # they give numbers, names, lines
BATCH_SIZE = 256  # images the network is given at a time


class Prediction(NamedTuple):
    """label: the most probable class. top: (class, probability) of the most probable ones, in
    falling order. path: of the file; None for an image in memory."""

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    path: str | None = None


class Model:
    """A trained network, ready to predict.

    classes: their names, by label. image_size: side of what the network sees, in pixels. folder: of
    the run. summary: its result; empty for a run that is not finished, or whose summary.json is
    damaged. network: the module, in evaluation mode, fp32, for what `preprocess` returns;
    predictions come from a copy made when the model was loaded. `images` of the methods below: a
    path of a file or folder, a PIL image, an array or tensor uint8 (H, W, 3) or (N, H, W, 3), or a
    list of these; of any size.
    """

    def __init__(
        self,
        target: str | Path,
        weights: Literal["last", "best"] | None = None,
        device: str = "auto",
        backend: Literal["auto", "fused", "torch"] = "auto",
    ):
        options = checked({"device": device, "backend": backend}, options_by_name())
        self._target, self._weights, self._options = Path(target), weights, options
        self._classifier: Classifier = open_classifier(target, weights, options)
        trained = self._classifier.trained
        self.classes: tuple[str, ...] = tuple(trained.classes)
        self.image_size: int = trained.image_size
        self.folder: Path = trained.path.parent
        self.summary: dict[str, Any] = {}
        try:
            self.summary = RunFolder(self.folder).read_summary() or {}
        except CheckpointError as error:
            if weights:  # else it was said when the model to load was looked up there
                log.warning("note: %s", error)
        self.network: nn.Module = trained.model

    def __repr__(self) -> str:
        trained = self._classifier.trained
        return (
            f"<fastcnn model {trained.config.model.arch}, {len(self.classes)} classes, "
            f"{self.image_size}x{self.image_size}, from {trained.path}>"
        )

    def predict(self, images: Any, top: int = 5) -> list[Prediction]:
        """Return a Prediction an image, in order; those of a folder in the order of their paths.

        Raises DataError, which names it, for an image that cannot be read, UsageError for what is
        no image.
        """
        if not isinstance(top, int | np.integer) or top < 1:
            raise UsageError(f"top: expected a whole number, 1 or more, got {top!r}")
        found = []
        for names, pixels in self._batches(images):
            values = self._classifier(pixels)
            order = most_probable(values, top)
            for path, chosen, row in zip(names, order, values, strict=True):
                told = tuple((self.classes[c], float(row[c])) for c in chosen)
                found.append(Prediction(*told[0], told, path))
        return found

    def probabilities(self, images: Any) -> np.ndarray:
        """Return fp32 (n, classes), as `predict` has them. Raises as `predict`."""
        found = [self._classifier(pixels) for _, pixels in self._batches(images)]
        return np.concatenate([np.empty((0, len(self.classes)), np.float32), *found])

    def preprocess(self, images: Any) -> Tensor:
        """Return fp32 (n, 3, H, W) on the device, normalised: what `network` takes. Raises as
        `predict`."""
        found = [self._classifier.normalised(pixels) for _, pixels in self._batches(images)]
        none = torch.empty(0, 3, self.image_size, self.image_size, device=self._classifier.device)
        return torch.cat([none, *found]).contiguous(memory_format=torch.channels_last)

    def evaluate(
        self, data: str | Path | None = None, split: Literal["test", "val", "train"] = "test"
    ) -> dict[str, Any]:
        """Return what `fastcnn eval --json` prints: top1 and top5 (fractions), loss, images, …

        data: as --data; None: the run's own.
        """
        options = {"threads": torch.get_num_threads(), **self._options}
        where = None if data is None else os.fspath(data)
        return evaluate_run(str(self._target), where, split, self._weights, options)

    def _batches(self, images: Any) -> Iterator[Batch]:
        return batches(flat(images), self._classifier.view, BATCH_SIZE, refuse)


def load(
    run: str | Path,
    weights: Literal["last", "best"] | None = None,
    device: str = "auto",
    backend: Literal["auto", "fused", "torch"] = "auto",
) -> Model:
    """Return the model of a run folder or checkpoint file.

    weights: which checkpoint of a run; None: the one that its summary speaks of. Raises
    CheckpointError for one that is missing or damaged, UsageError for a wrong option.
    """
    return Model(run, weights, device, backend)


def train(
    config: str | Path | Mapping[str, Any] | None = None, /, *, quiet: bool = False, **options: Any
) -> Model:
    """Train as `fastcnn train` does, write its run folder, and return the trained model.

    config: a YAML file of options or a mapping of them; `options` stand above. They are the
    command's, `_` for `-`: arch, data, epochs, lr, output, name, resume, and so on. quiet: no
    progress on standard error. Ctrl-C ends the run with a checkpoint to `resume`, a second one ends
    the process. Raises UsageError for a wrong option, and what else ends a run (fastcnn.errors).
    """
    settings = {option.name: option for option in options_of("place", PlaceConfig)}
    known = settings | options_by_name()
    given: dict[str, Any] = {}
    if isinstance(config, str | os.PathLike):
        given = read_config_file(os.fspath(config), known.values())
    elif config is not None:
        given = checked(config, known)
    explicit = checked(options, known)
    given |= explicit
    command = equivalent_command(given, known)
    outcome = train_or_resume(given, explicit.keys(), command, quiet)
    reached = outcome.folder.read_config().run
    return load(outcome.folder.path, device=reached.device, backend=reached.backend)


def train_or_resume(
    given: Mapping[str, Any], named: Collection[str], command: list[str], quiet: bool
) -> Outcome:
    """Train with the options `given`, or go on with the run that they say to resume; draw it.

    named: those of them that the user named beside a file of options.
    """
    settings = {option.name for option in options_of("place", PlaceConfig)}
    place = PlaceConfig(**{name: given[name] for name in settings & given.keys()})
    chosen = {name: value for name, value in given.items() if name not in settings}
    if place.resume is None:
        outcome = start(resolve(chosen), place, command, quiet)
    elif {"name", "output"} & set(named):
        raise UsageError("resume: a resumed run stays in its folder; leave name and output out")
    else:
        outcome = resume(place, chosen, command, quiet)
    if outcome.folder.writes:
        draw(outcome.folder.path)
    return outcome


def draw(folder: Path) -> None:
    """Draw a run's figures and page. The run is not lost for one that cannot be drawn, for want of
    a package or of space, or because of a damaged file that an analysis left: it is logged."""
    from fastcnn.insight.drawing import figures
    from fastcnn.insight.run_page import page

    for each, needed in (
        (figures.draw_curves, "matplotlib.figure"),
        (figures.draw_confusion, "matplotlib.figure"),
        (page.write_page, "jinja2"),
    ):
        try:
            require(needed)
            each(folder)
        except (PackageError, CheckpointError, OSError) as error:
            log.warning("note: %s: %s", each.__name__, error)


def checked(options: Mapping[str, Any], known: Mapping[str, Option]) -> dict[str, Any]:
    """Return options by name, read as those of a file; raises UsageError for an unknown name or a
    wrong value."""
    values = {}
    for name, value in options.items():
        if name not in known:
            raise UsageError(f"unknown option '{name}'{nearest(str(name), known)}")
        values[name] = known[name].parse(plain(value))
    return values


def plain(value: Any) -> Any:
    """A path as text, a scalar of NumPy as Python's, a tuple as a list."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def equivalent_command(given: Mapping[str, Any], known: Mapping[str, Option]) -> list[str]:
    """The command that does the same, for environment.json."""
    words = ["fastcnn", "train"]
    for name, value in given.items():
        flag = known[name].flag
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            words += [flag, *map(str, value)]
        elif value is not None:
            words += [flag, str(value)]
    return words


def flat(images: Any) -> Iterator[Any]:
    """The single images in `images`: paths of files, PIL images, arrays or tensors (H, W, 3).

    Raises UsageError for what can be gone through and is no list of images.
    """
    if is_path(images):
        yield from image_paths([os.fspath(images)])
    elif getattr(images, "ndim", None) == 4:
        yield from images
    elif isinstance(images, NO_LISTS):
        raise UsageError(f"images: expected {EXPECTED}; got {type(images).__name__}")
    elif isinstance(images, Iterable) and not hasattr(images, "ndim"):
        for image in images:
            yield from flat(image)
    else:
        yield images


def refuse(name: str, reason: str) -> None:
    raise DataError(f"{name}: {reason}")
