"""Every option of `fastcnn bench`, defined once; those that a training run has are config.py's.

Importing this needs no torch: the command line reads it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from fastcnn.config import Config, options_by_name
from fastcnn.errors import UsageError
from fastcnn.options import Option, option, options_of

Backend = Literal[
    "eager-fp32",
    "eager",
    "compile",
    "reduce-overhead",
    "max-autotune",
    "fused",
    "graph",
    "fused-compile",
    "onnxruntime",
    "openvino",
]
TORCH = ("eager", "eager-fp32", "compile", "reduce-overhead", "max-autotune")  # plain PyTorch
ENGINES = ("onnxruntime", "openvino")  # of inference on a CPU, where installed
RIVALS = (*TORCH, *ENGINES)
CUDA_BACKENDS = (*TORCH, "fused-compile", "fused", "graph")
CPU_BACKENDS = ("eager", "compile", "fused")
LAYER_BACKENDS = ("eager", "compile")  # of --layers, beside what is ours
LOADERS = ("resident", "dali", "torch")  # of --data-only, where installed, unless it names them
BATCHES = {"cuda": (1024, 128), "cpu": (256, 64)}
# what a run does beside training, which a trial does not
OF_A_RUN = (
    "fast_dev_run",
    "loggers",
    "checkpoint_steps",
    "keep_checkpoints",
    "early_stop",
    "restore_best",
    "best_metric",
)
# options of a training run that a throughput has too
SHARED = ("device", "threads", "workers", "amp_dtype", "seed", "conv")


@dataclass(frozen=True)
class BenchOptions:
    """What is measured, how often, and where it goes."""

    arch: list[str] = option(
        ["vgg16", "cnn-a+norm"],
        "networks; NETWORK+norm has batch norm behind each convolution",
    )
    backends: list[Backend] = option(
        [],
        "what a step runs under: plain PyTorch eager (in fp32, or as --amp says) or under "
        "torch.compile (compile is its default mode), fastcnn's ops, the whole step as a CUDA "
        "graph, torch.compile of the fused network; on a CPU with --inference also onnxruntime and "
        "openvino, in fp32, on the exported network; default: all on a GPU, eager, compile and "
        "fused on a CPU, with --inference also the engines that are installed; with --layers, "
        "rivals of the fused convolutions: eager, compile",
    )
    batch_size: list[int] = option([], "images a step; default: 1024 128 on a GPU, 256 64 on a CPU")
    loader: list[Literal["resident", "dali", "torch"]] = option(
        ["resident"], "where the images come from"
    )
    amp: bool | None = option(None, "mixed precision; default: on a GPU")
    rounds: int = option(
        15, "timed rounds, at least 7, in each of which every backend has a turn", 7, 1000
    )
    inference: bool = option(
        False,
        "forward passes in place of training steps: the network for evaluation, ours with its "
        "batch norms folded, on images that lie on the device",
    )
    layers: bool = option(False, "each layer's share: convolution, gradients, what follows it")
    data_only: bool = option(False, "the loaders' rate, against what a step consumes")
    time_to_accuracy: float | None = option(
        None,
        "train until this top-1 on the test images (0.94), once a seed; takes every option of "
        "`fastcnn train`",
        low=0,
        high=1,
        open_low=True,
    )
    seeds: int = option(5, "runs of --time-to-accuracy, seeds --seed and up", low=1, high=1000)
    budget: float | None = option(None, "seconds after which what is left is left out", low=1)
    json: str | None = option(None, "write the figures to this file")
    plot: str | None = option(None, "draw a bar chart to this PNG file")


def own_options() -> list[Option]:
    return options_of("bench", BenchOptions)


def train_options() -> list[Option]:
    """Options of a training run that `fastcnn bench` takes as they are."""
    own = {item.name for item in fields(BenchOptions)}
    return [option for name, option in options_by_name().items() if name not in own]


@dataclass(frozen=True)
class Settings:
    """The options as given: the command's own, and by name those of a training run."""

    own: BenchOptions
    train: Mapping[str, Any] = field(default_factory=dict)
    given: frozenset[str] = frozenset()

    @property
    def config(self) -> Config:
        """The options shared with a training run, the rest at their defaults."""
        return Config.from_flat({k: v for k, v in self.train.items() if k in SHARED})


def settings_of(given: Mapping[str, Any]) -> Settings:
    """Read and check what the user gave, values as text or read already.

    Raises UsageError for a wrong value and for options that do not go together.
    """
    own = {o.name: o.parse(given[o.name]) for o in own_options() if o.name in given}
    train = {o.name: o.parse(given[o.name]) for o in train_options() if o.name in given}
    options = BenchOptions(**own)
    modes = {
        "--inference": options.inference,
        "--layers": options.layers,
        "--data-only": options.data_only,
        "--time-to-accuracy": options.time_to_accuracy is not None,
    }
    chosen = [name for name, on in modes.items() if on]
    if len(chosen) > 1:
        raise UsageError(f"{chosen[0]}: leave out {' and '.join(chosen[1:])} with it")
    if options.time_to_accuracy is None:
        _refuse(train.keys() - set(SHARED), "goes with --time-to-accuracy alone")
        _refuse(own.keys() & {"seeds"}, "goes with --time-to-accuracy alone")
    else:
        _refuse(own.keys() & {"backends", "rounds"}, "means nothing to --time-to-accuracy")
        _refuse(train.keys() & set(OF_A_RUN), "means nothing to --time-to-accuracy")
    if options.data_only:
        _refuse(own.keys() & {"backends"}, "means nothing to --data-only")
    strange = [word for word in options.backends if word not in LAYER_BACKENDS]
    if options.layers and strange:
        raise UsageError(f"--backends {strange[0]}: --layers takes {' '.join(LAYER_BACKENDS)}")
    engines = [word for word in options.backends if word in ENGINES]
    if engines and not options.inference:
        raise UsageError(f"--backends {engines[0]}: goes with --inference alone")
    for name, mode in (("inference", "--inference"), ("layers", "--layers")):
        if getattr(options, name):
            _refuse(own.keys() & {"loader"}, f"means nothing to {mode}")
    if options.inference:
        _refuse(train.keys() & {"workers"}, "means nothing to --inference")
    elif chosen:
        _refuse(own.keys() & {"plot"}, f"there is no chart of {chosen[0]}")
    return Settings(options, train, frozenset(own))


def _refuse(names: Any, why: str) -> None:
    known = {option.name: option.flag for option in [*own_options(), *train_options()]}
    for name in sorted(names):
        raise UsageError(f"{known[name]}: {why}")
