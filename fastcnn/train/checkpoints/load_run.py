"""A trained network as a run left it, and the images to judge it on."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fastcnn.archs import get_network
from fastcnn.archs.build import build
from fastcnn.config import Config, DataConfig
from fastcnn.data import Dataset, Images, Normalization, load_dataset, make_loader, split
from fastcnn.data.images import Files
from fastcnn.errors import CheckpointError, DataError, UsageError
from fastcnn.ops.backend import Backend, choose_backend, choose_convolution, convolution_of_run
from fastcnn.text import first_line
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.distributed import ALONE, Distributed
from fastcnn.train.numerics.precision import Precision, choose_precision
from fastcnn.train.rundir import RunFolder

log = logging.getLogger(__name__)

WEIGHTS = ("last", "best")  # the checkpoints of a run


@dataclass
class TrainedModel:
    """A network restored from a checkpoint, with what is needed to feed it."""

    model: nn.Module
    config: Config
    classes: Sequence[str]
    image_size: int
    normalization: Normalization
    data: dict[str, Any]
    path: Path


def load_trained(path: Path, device: torch.device, backend: str) -> TrainedModel:
    """Restore the evaluated (averaged, if any) model of a checkpoint, in evaluation mode."""
    state = checkpoint.load(path)
    try:
        config = Config.from_flat(state["config"])
        network = get_network(state["network"]["arch"])
        classes, image_size = state["network"]["classes"], state["network"]["image_size"]
        normalization = Normalization.from_plain(state["normalization"])
        weights = state.get("ema") or state["model"]
        data = state["data"]
        own = (type(image_size) is int, isinstance(classes, list), isinstance(data, dict))
        if not all(own) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its network or data are described otherwise")
        # without memory: a forged size must not ask for more than the weights in the file
        with torch.device("meta"):
            checkpoint.check_weights(
                build(network, image_size, len(classes), backend), weights, path
            )
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, UsageError) as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of a network ({first_line(error)})"
        ) from error
    # torch draws initial weights for the new layers; what a run draws next must not depend on it
    with torch.random.fork_rng(devices=[]):
        model = build(network, image_size, len(classes), backend)
    checkpoint.load_weights(model, weights, path)
    return TrainedModel(
        model.to(device).eval(), config, classes, image_size, normalization, data, path
    )


def open_trained(
    target: str | Path,
    device: torch.device,
    backend: str = "auto",
    weights: str | None = None,
) -> TrainedModel:
    """Restore the model of a run folder or of a checkpoint file.

    weights: "last" or "best" of a run; None: the model that its summary speaks of, or the last one
    where that is damaged. Raises CheckpointError for a checkpoint that is missing or damaged,
    UsageError for other `weights` and for any beside a checkpoint file.
    """
    if weights not in (None, *WEIGHTS):
        raise UsageError(f"--weights: {weights!r} is not one of {', '.join(WEIGHTS)}")
    if weights and Path(target).is_file():
        raise UsageError(f"--weights: {target} is a checkpoint itself; give its run folder")
    name = weights or tested_weights(RunFolder(Path(target)))
    return load_trained(checkpoint.locate(target, f"{name}.pt"), device, backend)


def tested_weights(folder: RunFolder) -> str:
    """The name of the model that the summary speaks of; "last", and a note, where it is damaged."""
    try:
        name = (folder.read_summary() or {}).get("tested_model", "last")
        if name not in WEIGHTS:
            raise CheckpointError(f"{folder.path}/summary.json: no checkpoint is called {name!r}")
    except CheckpointError as error:
        log.warning("note: %s; going on with last.pt", error)
        return "last"
    return str(name)


def choose_arithmetic(
    trained: TrainedModel, options: dict[str, Any], device: torch.device
) -> tuple[Precision, Backend]:
    """Return precision and backend by `options` (amp, amp_dtype, backend, conv) and else by the
    run's own; the process then chooses convolutions by them.

    Raises BuildError where "fused" is asked for and cannot be had.
    """
    run = trained.config.run
    precision = choose_precision(
        device, options.get("amp", run.amp), options.get("amp_dtype", run.amp_dtype)
    )
    backend, why_torch = choose_backend(options.get("backend", "auto"), device, precision.dtype)
    if why_torch:
        log.warning("note: %s", why_torch)
    where = (backend, device, precision.dtype)
    own = convolution_of_run(run.conv, run.deterministic, *where)
    choose_convolution(options.get("conv", own), *where)
    return precision, backend


def other_data(own: DataConfig, data: str, image_size: int, options: dict[str, Any]) -> DataConfig:
    """How other data is read, whatever its classes: brought to the network's size, by `options`,
    and else as the run's own images.

    The place of the run's own images, and what suits their number, is not that of others.
    """
    place = own.data_dir if data == own.data else None
    chosen = {"data_dir": place, "loader": "auto", "store": "auto", **options}
    return replace(own, **{**chosen, "data": data, "image_size": image_size})


class Feed(NamedTuple):
    """A split's images as a network is to see them: `loader` yields batches in `precision`, `flip`:
    whether each is seen both ways."""

    dataset: Dataset
    images: Images | Files
    loader: Any
    precision: Precision
    backend: str
    flip: bool


def feed(
    trained: TrainedModel,
    device: torch.device,
    data: str | None,
    split_name: str,
    options: dict[str, Any],
) -> Feed:
    """Choose the images of a split and how they are computed with: as the run did, but for
    `options` by name.

    Says so where the run's own images have changed. Raises as `evaluation_data` and
    `choose_arithmetic`.
    """
    precision, backend = choose_arithmetic(trained, options, device)
    data_options = {k: v for k, v in options.items() if hasattr(trained.config.data, k)}
    dataset, images = evaluation_data(trained, data, split_name, data_options, device)
    if data is None and dataset.digest != trained.data.get("digest"):
        log.warning(
            "note: %s has changed since training: other images, or split otherwise", dataset.name
        )
    config = replace(trained.config, data=replace(trained.config.data, **data_options))
    feeding = (config, dataset.loader, trained.normalization, device, backend, precision)
    loader = evaluation_loader(images, *feeding)
    flip = options.get("test_flip", trained.config.optim.test_flip)
    return Feed(dataset, images, loader, precision, backend, flip)


def evaluation_data(
    trained: TrainedModel,
    data: str | None,
    split_name: str,
    overrides: dict[str, Any],
    device: torch.device,
) -> tuple[Dataset, Images | Files]:
    """The images to evaluate on: the run's own split, or that split of other data.

    Raises DataError where the classes differ from the network's, UsageError for a split that the
    data does not have.
    """
    config = trained.config.data
    if data is not None:
        # other data is taken whole: the run's subset and held-out part describe its own images
        config = replace(config, data=data, train_subset=None, test_subset=None, val_fraction=0.0)
        config = replace(config, image_size=trained.image_size)
    elif "test_fraction" in overrides:
        raise UsageError("--test-fraction: the run's own images stay split as they were trained")
    config = replace(config, **overrides)
    dataset = load_dataset(config, trained.image_size, device)
    dataset = split(dataset, config, trained.config.run.seed)
    if list(dataset.classes) != list(trained.classes):
        raise DataError(
            f"{dataset.name} has {len(dataset.classes)} classes ({', '.join(dataset.classes[:3])}, "
            f"…), the network {len(trained.classes)} ({', '.join(trained.classes[:3])}, …)"
        )
    found = splits(dataset)
    if split_name not in found:
        raise UsageError(f"--split {split_name}: {dataset.name} has only {', '.join(found)}")
    return dataset, found[split_name]


def evaluation_loader(
    images: Images | Files,
    config: Config,
    loader: Literal["resident", "dali", "torch"],
    normalization: Normalization,
    device: torch.device,
    backend: str,
    precision: Precision,
    ranks: Distributed = ALONE,
) -> Any:
    """Every image once, in order, without augmentation; shared out among `ranks`."""
    return make_loader(
        images,
        replace(config.data, loader=loader),
        None,
        normalization,
        batch_size=config.data.eval_batch_size,
        device=device,
        dtype=precision.dtype or torch.float32,
        seed=config.run.seed,
        shuffle=False,
        drop_last=False,
        backend=backend,
        rank=ranks.rank,
        world=ranks.world,
    )


def splits(dataset: Dataset) -> dict[str, Images | Files]:
    """train, val (if there is one) and test by name."""
    found = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {name: images for name, images in found.items() if images is not None}
