"""The options of `fastcnn sweep` and `fastcnn reproduce`, defined once.

Importing this needs no torch: the command line reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastcnn.config import options_by_name
from fastcnn.errors import UsageError
from fastcnn.options import Option, option, options_of

# options of a training run that say where and how it runs, not what is studied
MACHINE = (
    "data",
    "data_dir",
    "on_bad_image",
    "bad_limit",
    "loader",
    "store",
    "workers",
    "eval_batch_size",
    "device",
    "backend",
    "conv",
    "amp",
    "amp_dtype",
    "graph",
    "threads",
    "deterministic",
    "checkpoint_steps",
    "loggers",
)
NOT_SWEPT = ("seed", "fast_dev_run", "checkpoint_steps")


@dataclass(frozen=True)
class ReproduceOptions:
    """What is run of a report, and where it goes."""

    scale: float = option(
        1.0,
        "part of the report's images and of its epochs; 0.1 suits a laptop",
        low=0,
        high=1,
        open_low=True,
    )
    seeds: int | None = option(
        None,
        "runs of each row, with seeds 0 and up; default: as many as the report had",
        low=1,
        high=1000,
    )
    rows: list[str] = option([], "train only these rows; --list-rows names them")
    modern: bool = option(
        False,
        "further rows: networks of the report, and the one it recommends next, with this project's "
        "recipe on the same images for as many epochs",
    )
    ood_data: str = option("digits", "murgolo ood: images of another kind, as --data")
    jobs: int = option(
        1, "runs at a time, each in a process (and on a GPU) of its own", low=1, high=256
    )
    output: str = option("reproductions", "folder of all reproductions")
    tables_only: bool = option(False, "train nothing: tables and figures of what is finished")
    list_rows: bool = option(False, "list the rows of the experiments, and end")


@dataclass(frozen=True)
class SweepOptions:
    """How often a study's variants are trained, and where it goes."""

    seeds: int = option(3, "runs of each variant, with seeds 0 and up", low=1, high=1000)
    jobs: int = option(
        1, "runs at a time, each in a process (and on a GPU) of its own", low=1, high=256
    )
    output: str = option("sweeps", "folder of all sweeps")
    name: str | None = option(
        None, "name of the sweep's folder; default: the options that have several values"
    )
    tables_only: bool = option(False, "train nothing: tables and figures of what is finished")


def reproduce_options() -> list[Option]:
    return options_of("reproduce", ReproduceOptions)


def sweep_options() -> list[Option]:
    return options_of("sweep", SweepOptions)


def machine_options() -> list[Option]:
    """The options of a training run that a reproduction takes."""
    return [options_by_name()[name] for name in MACHINE]


def swept_options() -> list[Option]:
    """The options of a training run that a sweep takes, with one value or several."""
    return [option for name, option in options_by_name().items() if name not in NOT_SWEPT]


def read_reproduce(given: Mapping[str, Any]) -> tuple[ReproduceOptions, dict[str, Any]]:
    """The command's own options, and by name those of a training run; raises UsageError."""
    own = {o.name: o.parse(given[o.name]) for o in reproduce_options() if o.name in given}
    machine = {o.name: o.parse(given[o.name]) for o in machine_options() if o.name in given}
    return ReproduceOptions(**own), machine


def read_sweep(given: Mapping[str, Any]) -> SweepOptions:
    """The command's own options; raises UsageError."""
    own = {o.name: o.parse(given[o.name]) for o in sweep_options() if o.name in given}
    name = own.get("name")
    if name is not None and ("/" in name or name in (".", "..") or not name.isprintable()):
        raise UsageError(f"--name: expected the name of a folder, got {name!r}")
    return SweepOptions(**own)
