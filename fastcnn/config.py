"""Every option of a training run, defined once.

The command line, `--help`, the saved config.yaml and the checks of values all come from the
dataclasses below: a field's name is its flag (`weight_decay` → `--weight-decay`) and its YAML key,
its metadata holds the help text and the bounds. Names are unique over all sections, so that a
config file is flat.
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, Literal

from fastcnn.errors import UsageError
from fastcnn.options import Option, option, options_of, unknown_option

DATA_NAMES = ("cifar10", "tiny-imagenet", "digits")  # what --data may name beside a path


@dataclass(frozen=True)
class ModelConfig:
    arch: str = option("vgg16", "network; `fastcnn archs` lists them")
    init: Literal["he", "xavier", "uniform", "torch"] = option(
        "he", "weights: He normal, Glorot uniform, uniform in ±0.05, or torch's own default"
    )
    whiten: bool = option(
        False,
        "the first layer's filters start as whitening filters of the training images' patches",
    )
    freeze_first: bool = option(
        False, "leave the first convolution as it starts; its norm is trained"
    )


@dataclass(frozen=True)
class DataConfig:
    data: str = option(
        "cifar10",
        "cifar10, tiny-imagenet, digits, or the path of an image folder or of a tar or zip of one",
    )
    data_dir: str | None = option(
        None, "folder that holds (or receives) the archive of CIFAR-10 or Tiny ImageNet"
    )
    image_size: int | None = option(
        None, "resize every image to this many pixels a side", low=8, high=1024
    )
    resize: Literal["stretch", "crop"] = option(
        "stretch",
        "how an image that is not square gets --image-size: stretched, or its middle square",
    )
    grayscale: Literal["rgb", "drop"] = option(
        "rgb", "grey images of a folder or archive: taken as RGB, or left out"
    )
    on_bad_image: Literal["refuse", "skip"] = option(
        "refuse",
        "unreadable images of a folder or archive: refuse to start, or leave them out and list "
        "them",
    )
    bad_limit: float = option(
        0.05,
        "with --on-bad-image skip: largest part of the images that may be unreadable",
        low=0,
        high=1,
    )
    train_subset: int | None = option(None, "train on this many images, drawn by the seed", low=1)
    test_subset: int | None = option(None, "test on this many images, drawn by the seed", low=1)
    epoch_images: int | None = option(
        None, "train on this many images an epoch, drawn anew each time; default: all", low=1
    )
    val_fraction: float = option(
        0.0,
        "part of the training images held out for validation; 0: the test images are the "
        "validation images",
        low=0,
        high=1,
        open_high=True,
    )
    test_fraction: float = option(
        0.2,
        "part of a folder without test/ or val/ that becomes the test images",
        low=0,
        high=1,
        open_low=True,
        open_high=True,
    )
    loader: Literal["auto", "resident", "dali", "torch"] = option(
        "auto",
        "resident: images on the device, augmented in batches; dali: decoded or streamed by NVIDIA "
        "DALI ahead of the step; torch: DataLoader and torchvision transforms; auto: resident "
        "where they fit, else dali, else torch",
    )
    store: Literal["auto", "packed", "files"] = option(
        "auto",
        "images of a folder: packed: decoded once into the cache; files: decoded every epoch; "
        "auto: packed for the resident loader, files for the others",
    )
    workers: int = option(2, "worker processes of the torch loader", low=0, high=256)
    batch_size: int = option(
        128, "images a training step, of all processes together", low=1, high=1_000_000
    )
    eval_batch_size: int = option(
        512, "images an evaluation step, of each process", low=1, high=1_000_000
    )
    drop_last: bool = option(False, "drop the last, smaller training batch of an epoch")
    shuffle: bool = option(
        True, "a new order of the training images every epoch; else one for all, drawn by the seed"
    )


@dataclass(frozen=True)
class AugmentConfig:
    crop_padding: int = option(
        4, "pad by this many pixels, then crop at random; 0: off", low=0, high=512
    )
    crop_mode: Literal["reflect", "zero"] = option("reflect", "what the padding holds")
    flip: Literal["random", "alternating", "none"] = option(
        "random", "mirror left-right: at random, or every image every other epoch"
    )
    rotation: float = option(0.0, "rotate by up to this many degrees", low=0, high=180)
    shift: float = option(
        0.0, "shift by up to this fraction of the side", low=0, high=1, open_high=True
    )
    cutout: int = option(0, "side in pixels of a square set to the mean; 0: off", low=0, high=1024)
    resized_crop: float = option(
        1.0,
        "smallest area of a random resized crop; 1: off",
        low=0,
        high=1,
        open_low=True,
    )
    color_jitter: float = option(
        0.0, "strength of random brightness, contrast and saturation", low=0, high=1
    )
    normalize: Literal["zscore", "unit", "centered", "mean-image", "levels"] = option(
        "zscore",
        "inputs: mean 0 and deviation 1 a channel, [0, 1], [-0.5, 0.5], "
        "[0, 1] less the mean training image, or 0 to 255 less a channel's mean",
    )


@dataclass(frozen=True)
class OptimConfig:
    epochs: int = option(60, "passes over the training images", low=1, high=1_000_000)
    optimizer: Literal["sgd", "adam", "adamw"] = option("sgd", "the optimiser")
    lr: float = option(0.1, "peak learning rate", low=0, open_low=True)
    momentum: float = option(0.9, "momentum of SGD", low=0, high=1, open_high=True)
    nesterov: bool = option(True, "Nesterov momentum (SGD)")
    weight_decay: float = option(5e-4, "weight decay", low=0)
    decay: Literal["auto", "l2", "decoupled"] = option(
        "auto",
        "l2: the gradient of ½·λ·‖w‖² joins the gradient; decoupled: w shrinks by lr·λ; "
        "auto: decoupled for adamw, else l2",
    )
    exempt_norm_bias: bool = option(True, "no weight decay on norms and biases")
    schedule: Literal["constant", "step", "milestones", "cosine", "one-cycle", "inverse-time"] = (
        option("one-cycle", "how the learning rate moves")
    )
    warmup_epochs: float = option(
        0.0,
        "linear rise of the learning rate; with one-cycle: its rise, 0 = 23 % of the run",
        low=0,
    )
    step_epochs: int = option(30, "step: epochs between two drops", low=1)
    milestones: list[int] = option([], "milestones: epochs at which the rate drops")
    gamma: float = option(0.1, "step, milestones: factor of a drop", low=0, open_low=True, high=1)
    final_lr: float = option(
        0.0, "cosine, one-cycle: last learning rate as a fraction of the peak", low=0, high=1
    )
    time_decay: float = option(1e-6, "inverse-time: d in lr / (1 + d·step)", low=0)
    loss: Literal["cross-entropy", "softmax-twice"] = option(
        "cross-entropy",
        "cross-entropy: of the logits; softmax-twice: of their softmax, taken for logits by "
        "mistake, as figures of one report suggest",
    )
    label_smoothing: float = option(0.1, "label smoothing", low=0, high=1, open_high=True)
    mixup: float = option(0.0, "alpha of mixup; 0: off", low=0, high=100)
    cutmix: float = option(0.0, "alpha of cutmix; 0: off", low=0, high=100)
    clip_grad: float = option(0.0, "largest norm of the gradient; 0: off", low=0)
    ema: float = option(
        0.0,
        "decay a step of averaged weights, which are then evaluated; 0: off",
        low=0,
        high=1,
        open_high=True,
    )
    precise_bn: Literal["auto", "on", "off"] = option(
        "auto",
        "batch norm's running statistics taken anew from 2,048 training images before each "
        "evaluation; auto: where an epoch has fewer than 200 steps",
    )
    test_flip: bool = option(
        False, "evaluation takes the mean of the logits of an image and of its mirror image"
    )
    early_stop: int = option(
        0, "stop after this many epochs without a better validation figure; 0: off", low=0
    )
    best_metric: Literal["val_top1", "val_loss"] = option(
        "val_top1", "the validation figure that best.pt and early stopping follow"
    )
    restore_best: bool = option(
        False, "test the best-validation model, not the last; needs validation images of their own"
    )


@dataclass(frozen=True)
class RunConfig:
    recipe: Literal["modern", "fast", "report"] = option(
        "modern",
        "where unset options come from: the project's recipe for the network, the one that needs "
        "few epochs, or the one printed in the network's report",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N")
    backend: Literal["auto", "fused", "torch"] = option(
        "auto",
        "fused: the native library's kernels; torch: plain torch; auto: fused where it can be had",
    )
    conv: Literal["auto", "fused", "vendor"] = option(
        "auto",
        "convolutions of 3x3 filters in fp32 on a CPU, and all in half precision on a GPU: fused: "
        "the native library's; vendor: torch's; auto: for each layer the faster one, by a "
        "measurement in its first step (kept in the cache), but torch's with --deterministic, "
        "where no timing may decide, and on a GPU until the library's have passed tests on one",
    )
    amp: bool = option(False, "mixed precision, where the hardware has it")
    amp_dtype: Literal["auto", "bf16", "fp16", "fp32"] = option(
        "auto",
        "number format of --amp: auto: bf16, but in training on a CPU the faster of bf16 and fp32, "
        "by a measurement before the first step (kept in the cache), and fp32 with "
        "--deterministic, where no timing may decide; fp32: as without --amp, which is how a run "
        "that auto has decided so is saved",
    )
    graph: Literal["auto", "on", "off"] = option(
        "auto",
        "the whole step as one CUDA graph: auto: where it can be captured; on: or not at all",
    )
    threads: int | None = option(None, "CPU threads; default: all cores", low=1, high=1024)
    sync_norm: bool = option(
        False, "with torchrun: batch norm over the batches of all processes, not each one's own"
    )
    deterministic: bool = option(False, "bit-equal runs on the same machine, build and batch size")
    seed: int = option(0, "seed of weights, order, augmentation, subsets", low=0, high=2**31 - 1)
    checkpoint_steps: int = option(
        0, "also write last.pt every N steps; 0: at the end of an epoch", low=0
    )
    keep_checkpoints: int = option(
        2, "checkpoints to go on from that are kept: last.pt, last-2.pt, ...", low=1, high=1000
    )
    loggers: list[Literal["tensorboard", "wandb"]] = option(
        [], "also log each epoch's figures there, in the run folder; no name: nowhere", low=0
    )
    fast_dev_run: bool = option(False, "one batch of everything, to see that it works")


@dataclass(frozen=True)
class PlaceConfig:
    """Where a run is written. Not part of the saved configuration, which describes only the run."""

    output: str = option("runs", "folder of all runs")
    name: str | None = option(None, "name of the run folder; default: <arch>-<n>")
    resume: str | None = option(
        None,
        "continue the run in this folder at its last checkpoint, or at the older one in this file",
    )
    allow_changes: bool = option(
        False, "with --resume: accept options that differ from the saved ones"
    )


@dataclass(frozen=True)
class Config:
    """A whole run. `flat()` and `from_flat()` turn it into the keys of a config file and back."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def flat(self) -> dict[str, Any]:
        """Every option by name: plain Python values only."""
        return {
            item.name: getattr(section, item.name)
            for section in (self.model, self.data, self.augment, self.optim, self.run)
            for item in dataclasses.fields(section)
        }

    @classmethod
    def from_flat(cls, options: dict[str, Any]) -> "Config":
        """Build and check a configuration; missing options take their defaults.

        Raises UsageError for an unknown name, a wrong type, a value out of bounds or a
        combination that makes no sense.
        """
        known = options_by_name()
        for name, value in options.items():
            if name not in known:
                raise UsageError(unknown_option(name, known))
            known[name].check(value)
        sections = {}
        for section in dataclasses.fields(cls):
            names = [item.name for item in dataclasses.fields(SECTIONS[section.name])]
            values = {name: options[name] for name in names if name in options}
            sections[section.name] = SECTIONS[section.name](**values)
        config = cls(**sections)
        check_combinations(config)
        return config


SECTIONS: dict[str, Any] = {
    "model": ModelConfig,
    "data": DataConfig,
    "augment": AugmentConfig,
    "optim": OptimConfig,
    "run": RunConfig,
}


@functools.cache
def options_by_name() -> dict[str, Option]:
    """Every option of a configuration, in the order of `--help`."""
    return {
        option.name: option
        for section, cls in SECTIONS.items()
        for option in options_of(section, cls)
    }


def check_combinations(config: Config) -> None:
    """Raise UsageError where two options contradict each other."""
    optim, augment = config.optim, config.augment
    if optim.optimizer == "adamw" and optim.decay == "l2":
        raise UsageError("--decay l2: adamw decouples its decay; use --optimizer adam")
    if optim.schedule == "milestones" and not optim.milestones:
        raise UsageError("--schedule milestones: give the epochs, e.g. --milestones 30 45")
    if optim.milestones != sorted(set(optim.milestones)):
        raise UsageError(f"--milestones: expected rising epochs, got {optim.milestones}")
    if optim.warmup_epochs >= optim.epochs:
        raise UsageError("--warmup-epochs: must be less than --epochs")
    if config.data.epoch_images is not None and not config.data.shuffle:
        raise UsageError("--epoch-images: are drawn anew each epoch; leave --no-shuffle out")
    if augment.resized_crop < 1 and augment.crop_padding > 0:
        raise UsageError("--resized-crop: takes the place of pad-and-crop; add --crop-padding 0")
