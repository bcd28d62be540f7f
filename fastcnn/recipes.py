"""Recipes: the options that a network trains with when the user says nothing else.

`modern` is the project's own recipe. `report` is the recipe printed in the report that a network
comes from, as literally as the text allows.
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

PLAIN: dict[str, Any] = {
    "crop_padding": 0,
    "flip": "none",
    "label_smoothing": 0.0,
    "schedule": "constant",
    "nesterov": False,
    "exempt_norm_bias": False,
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
    "shuffle": False,
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

    Raises UsageError for the report recipe of a network that no report describes.
    """
    if recipe == "report":
        options = BY_NETWORK.get(network.name) or BY_REPORT.get(network.report)
        if options is None:
            raise UsageError(f"--recipe report: no report describes {network.name}")
        return options
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
