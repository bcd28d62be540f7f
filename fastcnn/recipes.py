"""Recipes: the options that a network trains with when the user says nothing else.

`modern` is the project's own recipe. `fast` aims at 94 % on CIFAR-10 in few epochs of vgg16, and
suits networks with batch norm behind every convolution. `report` is the recipe printed in the
report that a network comes from, as literally as the text allows.
"""

from pathlib import Path
from typing import Any

from fastcnn.archs import get_network
from fastcnn.archs.spec import Conv, Network
from fastcnn.config import DATA_NAMES, Config, options_by_name
from fastcnn.errors import UsageError

# without a norm behind every convolution SGD at a high rate diverges; Adam at 2e-3 does not
MODERN_WITHOUT_NORM: dict[str, Any] = {"optimizer": "adam", "lr": 2e-3, "weight_decay": 0.0}

# a mirrored or far-shifted digit is another digit or none; 1,437 images need fewer epochs
MODERN_BY_DATA: dict[str, dict[str, Any]] = {
    "digits": {"flip": "none", "crop_padding": 2, "epochs": 10},
}

# Chosen from published runs and not measured yet: Page 2018 and 2019 ("How to train your ResNet":
# 94 % with a ResNet-9 in 24, then 10 epochs) and Jordan 2024 (airbench, arXiv 2404.00498: in 10,
# 96 % in 31). vgg16 with batch norm is published at 92.6 to 94.2 % after 150 epochs and more, so
# that 94 % takes all of it.
FAST: dict[str, Any] = {
    # Page's first 24 and a quarter more: 13 plain layers learn more slowly than 9 with shortcuts.
    # To be lowered as far as the mean of 5 seeds allows
    "epochs": 30,
    # Page's: by image the rate of modern (0.1 at 128), in batches that fill a GPU and leave 98
    # steps an epoch. The rate rises over one-cycle's 23 % of the steps (Page 21 %, airbench 23 %)
    "batch_size": 512,
    "lr": 0.4,
    # Page's. (1 - momentum) / (lr · decay) = 500 steps, 5 epochs at the peak, is how long a weight
    # lasts: a sixth of the run (Page a fifth)
    "weight_decay": 5e-4,
    "momentum": 0.9,
    # the mean of about 200 steps, 2 epochs, takes out the noise that a low rate would; so the rate
    # need not go to 0 (Page ends at a tenth with 2 epochs of averaging, airbench at 0.07), and
    # weights and running statistics still move so little that the mean of either fits the other.
    # In a short run the average spans a ninth of the steps done, whatever the decay
    "ema": 0.995,
    "final_lr": 0.05,
    # Page's for his short runs, airbench's for 10 to 40 epochs
    "label_smoothing": 0.2,
    # Page's for 24 epochs; airbench cuts out 12 in 31 epochs and nothing in 15 and fewer
    "crop_padding": 4,
    "cutout": 8,
    # airbench: two epochs show each image once either way, not by chance twice the same
    "flip": "alternating",
    "test_flip": True,
    # both sources: whitening filters that are not trained
    "whiten": True,
    "freeze_first": True,
}

# 1,437 images are 3 steps of 512: modern's batches, and the rate by image
FAST_BY_DATA: dict[str, dict[str, Any]] = {
    "digits": MODERN_BY_DATA["digits"]
    | {"batch_size": 128, "lr": 0.1, "cutout": 0, "test_flip": False},
}

PLAIN: dict[str, Any] = {
    "crop_padding": 0,
    "flip": "none",
    "label_smoothing": 0.0,
    "schedule": "constant",
    "nesterov": False,
    "exempt_norm_bias": False,
    "precise_bn": "off",
}

# marie2019, section 3.2: Adam, 0.001, weight decay 5e-4 as an L2 penalty, batches of 100, 50 epochs
MARIE = PLAIN | {
    "optimizer": "adam",
    "lr": 1e-3,
    "weight_decay": 5e-4,
    "batch_size": 100,
    "epochs": 50,
    "val_fraction": 0.3,
    "normalize": "unit",
    "init": "torch",
}

# murgolo, sections 2.2 and 3.1
MURGOLO = PLAIN | {
    "optimizer": "sgd",
    "momentum": 0.9,
    "batch_size": 128,
    "val_fraction": 0.1,
    "normalize": "zscore",
    "init": "xavier",
    "best_metric": "val_loss",
}
MURGOLO_BASE = MURGOLO | {"lr": 1e-3, "epochs": 10, "weight_decay": 0.0}
MURGOLO_IMPROVED = MURGOLO | {
    "lr": 2e-4,
    "epochs": 20,
    "weight_decay": 4e-3,
    "schedule": "step",
    "step_epochs": 16,
    "gamma": 0.1,
    "restore_best": True,
}

# skagerstrom2018, tables 1 and 2, 3.3 and 4: A-D in [0, 1], E and F less the mean image
SKAGERSTROM = PLAIN | {"weight_decay": 0.0, "normalize": "unit", "batch_size": 128, "epochs": 20}
ADAM_RUI: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "init": "uniform"}
ADAM_HE: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "init": "he"}
LATE = {"normalize": "mean-image", "schedule": "inverse-time", "time_decay": 1e-6}

# mao2022, sections 2.1, 2.2 and 4
MAO = PLAIN | {
    "optimizer": "sgd",
    "momentum": 0.0,
    "lr": 1e-3,
    "weight_decay": 0.0,
    "batch_size": 64,
    "epochs": 300,
    "shuffle": False,  # one order for all epochs: CIFAR-10 as published is in no order of classes
    "normalize": "centered",
    "init": "torch",
}

# bohnstedt2019, sections 3.1, 3.2 and 4.1; rates and strengths are not printed. Chosen: 0.1, halved
# every 20 epochs, batches of 128, and λ = 5e-4 in the ½·λ·w² by which the text defines its L2
BOHNSTEDT = PLAIN | {
    "optimizer": "sgd",
    "momentum": 0.9,
    "nesterov": True,
    "lr": 0.1,
    "schedule": "step",
    "step_epochs": 20,
    "gamma": 0.5,
    "weight_decay": 5e-4,
    "batch_size": 128,
    "epochs": 100,
    "rotation": 15.0,
    "shift": 0.1,
    "flip": "random",
    "normalize": "zscore",
}

BY_REPORT = {"marie2019": MARIE, "mao2022": MAO, "bohnstedt2019": BOHNSTEDT}

BY_NETWORK = {
    "murgolo-base": MURGOLO_BASE,
    "murgolo-improved": MURGOLO_IMPROVED,
    "murgolo-no-scheduler": MURGOLO_IMPROVED | {"schedule": "constant"},
    "murgolo-no-l2": MURGOLO_IMPROVED | {"weight_decay": 0.0},
    "murgolo-no-batchnorm": MURGOLO_IMPROVED,
    "murgolo-no-dropout": MURGOLO_IMPROVED,
    "tiny-a": SKAGERSTROM | {"optimizer": "sgd", "momentum": 0.0, "lr": 0.01, "init": "uniform"},
    "tiny-b": SKAGERSTROM | ADAM_RUI,
    "tiny-c": SKAGERSTROM | ADAM_RUI,
    "tiny-d": SKAGERSTROM | ADAM_HE,
    "tiny-e": SKAGERSTROM | ADAM_HE | LATE | {"lr": 1e-2, "epochs": 60},
    "tiny-f": SKAGERSTROM | ADAM_HE | LATE | {"epochs": 100},
}


def recipe_options(network: Network, recipe: str, data: str) -> dict[str, Any]:
    """The options that `recipe` sets for `network` on `data`.

    Raises UsageError for the report recipe of a network that no report describes, and for the fast
    one of a network with a convolution that no batch norm follows.
    """
    if recipe == "report":
        options = BY_NETWORK.get(network.name) or BY_REPORT.get(network.report)
        if options is None:
            raise UsageError(f"--recipe report: no report describes {network.name}")
        return options
    if recipe == "fast":
        if not norm_everywhere(network):
            raise UsageError(
                f"--recipe fast: its learning rate needs a batch norm behind every convolution, "
                f"which {network.name} lacks; take --recipe modern"
            )
        return FAST | FAST_BY_DATA.get(data, {})
    by_norm = {} if norm_everywhere(network) else MODERN_WITHOUT_NORM
    return by_norm | MODERN_BY_DATA.get(data, {})


def norm_everywhere(network: Network) -> bool:
    """Whether a batch norm follows every convolution (residual blocks have theirs)."""
    return all(layer.norm for layer in network.layers if isinstance(layer, Conv))


def resolve(explicit: dict[str, Any]) -> Config:
    """Fill what the user left open from the recipe, then from the defaults, and check it all."""
    known = options_by_name()
    for name in ("arch", "recipe", "data"):
        if name in explicit:
            known[name].check(explicit[name])
    network = get_network(explicit.get("arch", known["arch"].default))
    recipe = explicit.get("recipe", known["recipe"].default)
    data = explicit.get("data", known["data"].default)
    options = recipe_options(network, recipe, data) | explicit
    # a run must find its images from another folder as well
    for name in {"data", "data_dir"} & explicit.keys():
        if explicit[name] not in (None, *DATA_NAMES):
            options[name] = absolute(explicit[name])
    return Config.from_flat(options)


def absolute(path: str) -> str:
    """The absolute path, or `path` as it stands if there is nothing: its reader says so."""
    try:
        return str(Path(path).expanduser().resolve(strict=True))
    except (OSError, RuntimeError, ValueError):
        return path
