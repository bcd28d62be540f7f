"""From a configuration to the objects of a run: device, images, loaders, network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fastcnn.archs import get_network
from fastcnn.archs.init import initialise
from fastcnn.archs.spec import Network, build, layer_table
from fastcnn.archs.whiten import first_convolution, whiten
from fastcnn.config import Config
from fastcnn.data import Dataset, Images, Normalization, load_dataset, make_loader, split
from fastcnn.data.draws import generator
from fastcnn.data.files import Files
from fastcnn.errors import CheckpointError, DataError, UsageError
from fastcnn.ops.backend import choose_backend, choose_convolution
from fastcnn.train import checkpoint
from fastcnn.train.host import make_deterministic
from fastcnn.train.precision import Precision, choose_device, choose_precision

WHITENING_PIXELS = 5000 * 32**2  # of training images that the whitening filters are measured on


@dataclass
class Setup:
    """What a training run works with. `test_loader` is None where validation uses the test set."""

    config: Config
    network: Network
    dataset: Dataset
    device: torch.device
    precision: Precision
    backend: str
    normalization: Normalization
    model: nn.Module
    train_loader: Any
    val_loader: Any
    test_loader: Any
    notes: list[str]

    @property
    def classes(self) -> int:
        return len(self.dataset.classes)

    @property
    def image_size(self) -> int:
        return self.dataset.train.sides[0]

    @property
    def device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        return f"cpu ({threads} thread{'s' if threads > 1 else ''})"

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says of the network and data it belongs to: plain values."""
        sizes = {name: len(images) for name, images in splits(self.dataset).items()}
        return {
            "config": self.config.flat(),
            "network": {
                "arch": self.network.name,
                "classes": list(self.dataset.classes),
                "image_size": self.image_size,
            },
            "normalization": self.normalization.to_plain(),
            "data": {"name": self.dataset.name, "digest": self.dataset.digest, "sizes": sizes},
        }


def splits(dataset: Dataset) -> dict[str, Images | Files]:
    """train, val (if there is one) and test by name."""
    found = {"train": dataset.train, "val": dataset.val, "test": dataset.test}
    return {name: images for name, images in found.items() if images is not None}


def prepare(config: Config) -> Setup:
    """Build everything a run needs; raises UsageError or DataError before the first step."""
    device = choose_device(config.run.device)
    precision = choose_precision(device, config.run.amp, config.run.amp_dtype)
    configure_torch(config, device)
    network = get_network(config.model.arch)
    dataset = load_dataset(config.data, network.image_sizes[0], device)
    dataset = split(dataset, config.data, config.run.seed)
    check_dataset(dataset, config)
    layer_table(network, dataset.train.sides[0], len(dataset.classes))  # refuses small ones
    normalization = Normalization.fit(dataset.train, config.augment.normalize)
    # last of what can be refused: a mistake must not wait for a library to be built
    backend, why_torch = choose_backend(config.run.backend, device, precision.dtype)
    choose_convolution(config.run.conv, backend, device, precision.dtype)
    notes = [note for note in (precision.note, why_torch) if note]
    samples = config.data.epoch_images or len(dataset.train)
    drop_last = drops_last(samples, network, config, notes)
    train_loader = make_loader(
        dataset.train,
        replace(config.data, loader=dataset.loader),
        config.augment,
        normalization,
        batch_size=config.data.batch_size,
        device=device,
        dtype=precision.dtype or torch.float32,
        seed=config.run.seed,
        shuffle=config.data.shuffle,
        drop_last=drop_last,
        epoch_images=config.data.epoch_images,
        backend=backend,
    )
    feeding = (config, dataset.loader, normalization, device, backend, precision)
    val_loader = evaluation_loader(dataset.val or dataset.test, *feeding)
    test_loader = None if dataset.val is None else evaluation_loader(dataset.test, *feeding)
    model = new_model(network, dataset, config, normalization, device, backend)
    return Setup(
        config,
        network,
        dataset,
        device,
        precision,
        backend,
        normalization,
        model,
        train_loader,
        val_loader,
        test_loader,
        notes,
    )


def configure_torch(config: Config, device: torch.device) -> None:
    """Seed torch and choose the vendor library's algorithms."""
    if config.run.deterministic:
        make_deterministic()
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(config.run.seed)


def new_model(
    network: Network,
    dataset: Dataset,
    config: Config,
    normalization: Normalization,
    device: torch.device,
    backend: str,
) -> nn.Module:
    """Network with initial weights by seed and options, in channels-last, on `device`.

    They are drawn from the seed alone, but for whitening filters, which the images decide as well.
    """
    size, seed = dataset.train.sides[0], config.run.seed
    model = build(network, size, len(dataset.classes), backend)
    initialise(model, config.model.init, torch.Generator().manual_seed(seed))
    first = first_convolution(model)
    if config.model.whiten:
        whiten(first, whitening_images(dataset.train, normalization, seed))
    if config.model.freeze_first:
        first.requires_grad_(False)
    return model.to(device)


def whitening_images(
    images: Images | Files, normalization: Normalization, seed: int
) -> torch.Tensor:
    """Images drawn by the seed, fp32 (n, 3, H, W), as the network sees them without augmentation:
    5,000 of 32x32, or as many pixels of another size."""
    height, width = images.sides
    order = torch.randperm(len(images), generator=generator(seed, "whitening"))
    drawn = order[: max(1, WHITENING_PIXELS // (height * width))].sort().values
    pixels = torch.from_numpy(images.pixels_of(drawn.numpy()))
    return normalization.apply(pixels).permute(0, 3, 1, 2)


def check_dataset(dataset: Dataset, config: Config) -> None:
    """Refuse what no network can train on, and model selection on the test images."""
    height, width = dataset.train.sides
    if height != width:
        raise DataError(
            f"{dataset.name}: images are {width}x{height}; give --image-size to make them square"
        )
    if dataset.val is None and (config.optim.restore_best or config.optim.early_stop):
        option = "--restore-best" if config.optim.restore_best else "--early-stop"
        raise UsageError(
            f"{option} would choose by the test images; hold some out with --val-fraction 0.1"
        )


def drops_last(samples: int, network: Network, config: Config, notes: list[str]) -> bool:
    """Whether the last batch is dropped: on demand, or because batch norm cannot take one image."""
    batch_size = config.data.batch_size
    single = network.has_norm and samples % batch_size == 1
    if network.has_norm and min(samples, batch_size) < 2:
        raise UsageError(f"{network.name} has batch norm: it needs at least 2 images a batch")
    if single and not config.data.drop_last:
        notes.append(
            f"the last batch of an epoch would be a single image, which batch norm cannot take: "
            f"it is dropped ({samples} images, batches of {batch_size})"
        )
    return config.data.drop_last or single


def evaluation_loader(
    images: Images | Files,
    config: Config,
    loader: Literal["resident", "dali", "torch"],
    normalization: Normalization,
    device: torch.device,
    backend: str,
    precision: Precision,
) -> Any:
    """Every image once, in order, without augmentation."""
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
    )


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
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of a network ({error})") from error
    # torch draws initial weights for the new layers; what a run draws next must not depend on it
    with torch.random.fork_rng(devices=[]):
        model = build(network, image_size, len(classes), backend)
    checkpoint.load_weights(model, weights, path)
    return TrainedModel(
        model.to(device).eval(), config, classes, image_size, normalization, data, path
    )


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
