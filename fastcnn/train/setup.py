"""From a configuration to the objects of a run: device, images, loaders, network."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastcnn.archs import get_network
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.archs.layers import synchronise
from fastcnn.archs.spec import Network, layer_table
from fastcnn.archs.whiten import first_convolution, whiten
from fastcnn.config import Config
from fastcnn.data import Dataset, Images, Normalization, load_dataset, make_loader, split
from fastcnn.data.draws import derive_seed, generator
from fastcnn.data.images import Files
from fastcnn.errors import DataError, UsageError
from fastcnn.ops.backend import choose_backend, choose_convolution
from fastcnn.train.checkpoints.load_run import evaluation_loader, splits
from fastcnn.train.distributed import ALONE, Distributed
from fastcnn.train.host import make_deterministic
from fastcnn.train.numerics.amp import decided
from fastcnn.train.numerics.precision import Precision, choose_device, choose_precision

WHITENING_PIXELS = 5000 * 32**2  # of training images that the whitening filters are measured on


@dataclass
class Setup:
    """What a training run works with. `config`: with the format of `--amp` decided on.
    `test_loader` is None where validation uses the test set."""

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
    ranks: Distributed = ALONE

    @property
    def classes(self) -> int:
        return len(self.dataset.classes)

    @property
    def image_size(self) -> int:
        return self.dataset.train.sides[0]

    @property
    def device_name(self) -> str:
        several = f"{self.ranks.world} x " if self.ranks.world > 1 else ""
        if self.device.type == "cuda":
            return several + torch.cuda.get_device_name(self.device)
        threads = torch.get_num_threads()
        return f"{several}cpu ({threads} thread{'s' if threads > 1 else ''})"

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


def prepare(config: Config, ranks: Distributed = ALONE) -> Setup:
    """Build everything a run needs; raises UsageError or DataError before the first step.

    ranks: who share its batches; each prepares the same, but for its part of the images.
    """
    device = choose_device(device_of(config.run.device, ranks))
    batch_size = part_of_batch(config.data.batch_size, ranks)
    configure_torch(config, device, ranks)
    network = get_network(config.model.arch)
    dataset = load_dataset(config.data, network.image_sizes[0], device)
    dataset = split(dataset, config.data, config.run.seed)
    check_dataset(dataset, config)
    layer_table(network, dataset.train.sides[0], len(dataset.classes))  # refuses small ones
    normalization = Normalization.fit(dataset.train, config.augment.normalize)
    # last of what can be refused: a mistake must not wait for a library to be built
    config, why_format = decided(config, device, ranks)
    precision = choose_precision(device, config.run.amp, config.run.amp_dtype)
    backend, why_torch = choose_backend(config.run.backend, device, precision.dtype)
    choose_convolution(config.run.conv, backend, device, precision.dtype)
    notes = [note for note in (why_format, precision.note, why_torch) if note]
    if config.run.amp_dtype != "auto" and not config.run.amp:
        notes.append(f"--amp-dtype {config.run.amp_dtype}: changes nothing without --amp")
    samples = config.data.epoch_images or len(dataset.train)
    drop_last = drops_last(samples, network, config, notes, ranks)
    train_loader = make_loader(
        dataset.train,
        replace(config.data, loader=dataset.loader),
        config.augment,
        normalization,
        batch_size=batch_size,
        device=device,
        dtype=precision.dtype or torch.float32,
        seed=config.run.seed,
        # never as stored: a folder's images come class by class
        shuffle=config.data.shuffle or "once",
        drop_last=drop_last,
        epoch_images=config.data.epoch_images,
        backend=backend,
        rank=ranks.rank,
        world=ranks.world,
    )
    feeding = (config, dataset.loader, normalization, device, backend, precision, ranks)
    val_loader = evaluation_loader(dataset.val or dataset.test, *feeding)
    test_loader = None if dataset.val is None else evaluation_loader(dataset.test, *feeding)
    model = new_model(network, dataset, config, normalization, device, backend)
    if config.run.sync_norm:
        synchronise_norms(model, config, ranks, notes)
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
        ranks,
    )


def device_of(name: str, ranks: Distributed) -> str:
    """The device of this rank: of several GPUs, each process has one of its own."""
    if ranks.world == 1 or name == "cpu" or not torch.cuda.is_available():
        return name
    if name not in ("auto", "cuda"):
        raise UsageError(f"--device {name}: torchrun gives each process its own GPU; take cuda")
    if ranks.local_world > torch.cuda.device_count():
        raise UsageError(
            f"--nproc-per-node {ranks.local_world}: there are {torch.cuda.device_count()} GPUs "
            "here; start as many processes, or add --device cpu"
        )
    return f"cuda:{ranks.local}"


def part_of_batch(batch_size: int, ranks: Distributed) -> int:
    """This rank's images of a step; raises UsageError where they cannot be shared out evenly."""
    if batch_size % ranks.world:
        fitting = max(batch_size // ranks.world, 1) * ranks.world
        raise UsageError(
            f"--batch-size {batch_size}: {ranks.world} processes share it; take a multiple of "
            f"{ranks.world}, such as {fitting}"
        )
    return batch_size // ranks.world


def synchronise_norms(
    model: nn.Module, config: Config, ranks: Distributed, notes: list[str]
) -> None:
    """Let batch norm count the images of all ranks; raises UsageError with --conv fused, whose
    kernels take the statistics of their own images."""
    if ranks.world == 1:
        notes.append("--sync-norm: changes nothing in one process; torchrun starts several")
    elif synchronise(model, torch.distributed.group.WORLD) and config.run.conv == "fused":
        raise UsageError("--conv fused: not with --sync-norm; leave one of them out")


def configure_torch(config: Config, device: torch.device, ranks: Distributed) -> None:
    """Seed torch and choose the vendor library's algorithms."""
    if config.run.deterministic:
        make_deterministic()
    elif device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    # dropout alone draws from here, and is to draw something else on each rank
    own = derive_seed(config.run.seed, "rank", ranks.rank) if ranks.rank else config.run.seed
    torch.manual_seed(own)


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


def drops_last(
    samples: int, network: Network, config: Config, notes: list[str], ranks: Distributed
) -> bool:
    """Whether the last batch is dropped: on demand, or because a rank would have too few images of
    it: none, or a single one for its batch norm."""
    batch_size, world = config.data.batch_size, ranks.world
    alone = network.has_norm and not (config.run.sync_norm and world > 1)
    least = 2 * world if alone else world
    if min(samples, batch_size) < least:
        if world > 1:
            raise UsageError(
                f"--batch-size {batch_size}, {samples} images: {world} processes need at least "
                f"{least} images a batch"
            )
        raise UsageError(f"{network.name} has batch norm: it needs at least 2 images a batch")
    rest = samples % batch_size
    few = 0 < rest < least
    if few and not config.data.drop_last:
        images = "a single image" if rest == 1 else f"{rest} images"
        reason = "which batch norm cannot take" if world == 1 else f"too few for {world} processes"
        notes.append(
            f"the last batch of an epoch would be {images}, {reason}: "
            f"it is dropped ({samples} images, batches of {batch_size})"
        )
    return config.data.drop_last or few
