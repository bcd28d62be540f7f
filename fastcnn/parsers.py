"""What the `fastcnn` commands take: their arguments, help texts, and errors of one line."""

import argparse
import re
from collections.abc import Callable, Iterable
from typing import Any, Literal, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

import fastcnn
from fastcnn.config import PlaceConfig, options_by_name
from fastcnn.errors import UsageError, nearest
from fastcnn.options import Option, options_of

METAVARS = {int: "N", float: "X"}


def own_option(name: str, kind: Any, default: Any, text: str, low: int | None = None) -> Option:
    """An option of one command alone, which is no part of a configuration."""
    return Option(name, "command", kind, default, text, {"low": low})


EVAL_OWN = (
    own_option("data", str | None, None, "other data than the run's own"),
    own_option("split", Literal["test", "val", "train"], "test", "which images"),
    own_option(
        "weights",
        Literal["last", "best"],
        None,
        "which checkpoint of a run; default: the one its summary speaks of",
    ),
)
EVAL_SHARED = (
    "data_dir",
    "on_bad_image",
    "bad_limit",
    "loader",
    "store",
    "workers",
    "eval_batch_size",
    "test_fraction",
    "test_flip",
    "device",
    "backend",
    "conv",
    "amp",
    "amp_dtype",
    "threads",
)
DATA_ACTIONS = {
    "check": "decode every image; say what the data hold and name each unreadable file",
    "pack": "decode them once into the cache, as the first training would",
    "show": "class histogram, channel mean and std, a grid of samples as PNG",
}
DATA_SHARED = (
    "data_dir",
    "image_size",
    "resize",
    "grayscale",
    "on_bad_image",
    "bad_limit",
    "test_fraction",
)
SHOW_OWN = (
    own_option("output", str | None, None, "show: folder for the figures; default: show-<data>"),
    own_option("samples", int, 40, "show: training images in the grid", 1),
    own_option("seed", int, 0, "show: which images are drawn", 0),
)
ARCHS_OWN = (
    own_option("classes", int | None, None, "classes; default: the network's own", low=2),
    own_option("image_size", int | None, None, "side of the images; default: the network's own", 8),
)


BUILD_OWN = (
    own_option(
        "archs",
        str | None,
        None,
        "CUDA architectures such as 8.0;9.0+PTX, or none; default: FASTCNN_CUDA_ARCHS, else those "
        "of the GPUs present",
    ),
)


class PlainHelp(DefaultHelpFormatter):
    """Help texts with the default behind them, without the library's notes on types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default in (None, [], argparse.SUPPRESS) or action.default is False
        return action.help or "" if hidden else f"{action.help} (default: {action.default})"


class Parser(ArgumentParser):
    """A parser whose errors are one line with the nearest valid name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(one_line(message))


def one_line(message: str) -> str:
    """Turn the library's message, which may be a paragraph, into one line."""
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        words = found[1].split() or ["''"]
        word = next((w for w in words if w.startswith("-")), words[0])
        # another command may have it
        flags = [flag for flag in known_flags() if flag != word.split("=")[0]]
        return f"unknown option {word}{nearest(word.split('=')[0], flags)}"
    if found := re.search(r"invalid choice: '([^']*)'", message):
        return f"unknown command '{found[1]}'{nearest(found[1], COMMANDS)}; see fastcnn --help"
    if 'expected "subcommand"' in message:
        return f"no command given; one of {', '.join(COMMANDS)} (see fastcnn --help)"
    return " ".join(message.split())


def known_flags() -> list[str]:
    """Flags of every command: an unknown one is reported by the outermost parser."""
    return [flag for parser in PARSERS for flag in parser._option_string_actions]


PARSERS: list[Parser] = []


def new_parser(command: str, description: str, positional: str = "") -> Parser:
    return Parser(
        usage=f"fastcnn {command} {positional}[options]",
        description=description,
        formatter_class=PlainHelp,
        allow_abbrev=False,
    )


def add_option(target: Any, option: Option, default: Any = None) -> None:
    """Add an option as a flag; `default` is what the help shows, if anything.

    Values arrive as text and are read by `Option.parse`, so that flags and files share one check.
    """
    words: dict[str, Any] = {"default": default, "help": option.help}
    if option.scalar is bool:
        target.add_argument(option.flag, action=ActionYesNo(no_prefix="no-"), **words)
        return
    metavar = "{" + ",".join(option.choices) + "}" if option.choices else None
    words["metavar"] = metavar or METAVARS.get(option.scalar, option.name.upper())
    if option.scalar is list:
        words["nargs"] = "*"
        words["metavar"] = metavar or {int: "N"}.get(option.element, "NAME")
    target.add_argument(option.flag, **words)


def read_values(given: dict[str, Any], options: Iterable[Option]) -> dict[str, Any]:
    """The options among what the user gave, by name, read and checked."""
    return {
        option.name: option.parse(given[option.name]) for option in options if option.name in given
    }


def add_debug(parser: Parser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def train_parser() -> Parser:
    parser = new_parser(
        "train",
        "Train a network and write everything to a run folder. Defaults are those of the modern "
        "recipe for a network with batch norm; --recipe and --arch change some of them.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options; flags stand above")
    titles = {
        "model": "network",
        "data": "data",
        "augment": "augmentation",
        "optim": "optimisation",
        "run": "run",
    }
    groups = {name: parser.add_argument_group(title) for name, title in titles.items()}
    for option in options_by_name().values():
        add_option(groups[option.section], option, option.default)
    place = parser.add_argument_group("run folder")
    for option in options_of("place", PlaceConfig):
        add_option(place, option, option.default)
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")
    add_debug(parser)
    return parser


def eval_parser() -> Parser:
    parser = new_parser("eval", "Evaluate a run or a checkpoint.", "RUN ")
    parser.add_argument("run", type=str, help="run folder or checkpoint file")
    for option in EVAL_OWN:
        add_option(parser, option, option.default)
    for name in EVAL_SHARED:
        add_option(parser, options_by_name()[name])
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_debug(parser)
    return parser


def data_parser() -> Parser:
    actions = "; ".join(f"{name}: {text}" for name, text in DATA_ACTIONS.items())
    parser = new_parser(
        "data",
        f"Look at the images of a data set before training. {actions}.",
        "{" + ",".join(DATA_ACTIONS) + "} DATA ",
    )
    parser.add_argument("action", type=str, nargs="?", help=", ".join(DATA_ACTIONS))
    parser.add_argument("target", type=str, nargs="?", help="as --data of fastcnn train")
    for name in DATA_SHARED:
        option = options_by_name()[name]
        add_option(parser, option, option.default)
    for option in SHOW_OWN:
        add_option(parser, option, option.default)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_debug(parser)
    return parser


def archs_parser() -> Parser:
    parser = new_parser("archs", "List the networks, or show the layers of one.", "[NAME] ")
    parser.add_argument("name", type=str, nargs="?", help="a network")
    for option in ARCHS_OWN:
        add_option(parser, option)
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_debug(parser)
    return parser


def compile_parser() -> Parser:
    parser = new_parser(
        "build",
        "Compile the native library, which the first training would do else. One that is there "
        "and holds all that is asked for is not compiled again.",
    )
    parser.add_argument(
        "--cuda",
        action="store_true",
        help="with CUDA kernels, on a machine without a GPU too: for 8.0;9.0+PTX if no "
        "architectures are named",
    )
    parser.add_argument("--cpu", action="store_true", help="for the CPU alone")
    for option in BUILD_OWN:
        add_option(parser, option, option.default)
    parser.add_argument("--force", action="store_true", help="compile in any case")
    parser.add_argument("--quiet", action="store_true", help="print nothing but the result")
    add_debug(parser)
    return parser


def bench_parser() -> Parser:
    from fastcnn.bench.options import own_options, train_options

    parser = new_parser(
        "bench",
        "Compare training steps or inference of networks under several backends in interleaved "
        "rounds of one run: images/s, memory, launches and the share of the roofline on a GPU, "
        "ratios on a CPU.",
    )
    for option in own_options():
        add_option(parser, option, option.default)
    other = parser.add_argument_group("options of fastcnn train")
    for option in train_options():
        add_option(other, option, option.default)
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_debug(parser)
    return parser


def reproduce_parser() -> Parser:
    from fastcnn.study.options import machine_options, reproduce_options

    parser = new_parser(
        "reproduce",
        "Train the experiments of a student report and set the published figures beside ours: "
        "tables, figures, verdicts. Without a report: list them. Finished runs are kept, so that "
        "the same command goes on where it was stopped.",
        "[REPORT [EXPERIMENT …]] ",
    )
    parser.add_argument("report", type=str, nargs="?", help="a report, such as marie2019")
    parser.add_argument(
        "experiments", type=str, nargs="*", help="experiments of it, such as table1; default: all"
    )
    for option in reproduce_options():
        add_option(parser, option, option.default)
    other = parser.add_argument_group("options of fastcnn train, for every run")
    for option in machine_options():
        shown = None if option.name == "data" else option.default
        add_option(other, option, shown)
    parser.add_argument("--quiet", action="store_true", help="print nothing but the tables")
    add_debug(parser)
    return parser


def sweep_parser() -> Parser:
    from fastcnn.study.options import sweep_options, swept_options

    parser = new_parser(
        "sweep",
        "Train every combination of the values of its options, each with several seeds, and "
        "compare them in one table: --arch cnn-a cnn-b --lr 1e-3 2e-3. Lists are joined by commas "
        "(--milestones 30,45), switches are true or false. Finished runs are kept, so that the "
        "same command goes on where it was stopped.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options, lists for several")
    for option in sweep_options():
        add_option(parser, option, option.default)
    swept = parser.add_argument_group("options of fastcnn train, with one value or several")
    for option in swept_options():
        metavar = "{" + ",".join(option.choices) + "}" if option.choices else None
        metavar = metavar or METAVARS.get(option.element, option.name.upper())
        words = {"metavar": metavar, "help": option.help, "default": option.default}
        swept.add_argument(option.flag, nargs="*", **words)
    parser.add_argument("--quiet", action="store_true", help="print nothing but the table")
    add_debug(parser)
    return parser


def doctor_parser() -> Parser:
    parser = new_parser("doctor", "Show versions and devices, what is missing, and the remedy.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_debug(parser)
    return parser


# name: what makes its parser, and a line about it
COMMANDS: dict[str, tuple[Callable[[], Parser], str]] = {
    "train": (train_parser, "train a network"),
    "eval": (eval_parser, "evaluate a run or a checkpoint"),
    "data": (data_parser, "check, pack or show the images of a data set"),
    "archs": (archs_parser, "list the networks, show their layers"),
    "bench": (bench_parser, "compare training steps, measure loaders and layers"),
    "reproduce": (reproduce_parser, "train a report's experiments, published figures beside ours"),
    "sweep": (sweep_parser, "train every combination of options, compare them in one table"),
    "build": (compile_parser, "compile the native library"),
    "doctor": (doctor_parser, "what this machine offers, what is missing"),
}


def build_parser() -> Parser:
    parser = Parser(
        prog="fastcnn",
        description="Train convolutional image classifiers as fast as the hardware allows.",
        formatter_class=PlainHelp,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"fastcnn {fastcnn.__version__}")
    commands = parser.add_subcommands(required=True, title="commands")
    PARSERS[:] = [parser]
    for name, (make, text) in COMMANDS.items():
        sub = make()
        PARSERS.append(sub)
        commands.add_subcommand(name, sub, help=text)
    return parser


def parse(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """The command and only what the user gave it, by option name."""
    parser = build_parser()
    namespace = parser.parse_args(arguments, defaults=False)
    name = namespace.subcommand
    return name, dict(vars(namespace.get(name))) if namespace.get(name) else {}
