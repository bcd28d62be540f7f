"""The `fastcnn` command: parse, call, print."""

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Literal, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

import fastcnn
from fastcnn.config import PlaceConfig, options_by_name
from fastcnn.errors import FastcnnError, UsageError, nearest
from fastcnn.options import Option, options_of, read_config_file
from fastcnn.train.host import share_the_cores

METAVARS = {int: "N", float: "X"}
BROKEN_PIPE = 141  # what a shell reports of a command that SIGPIPE ended


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
        return f"unknown option {word}{nearest(word.split('=')[0], known_flags())}"
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


def doctor_parser() -> Parser:
    parser = new_parser("doctor", "Show versions and devices, what is missing, and the remedy.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_debug(parser)
    return parser


def run_train(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.insight import figures, page
    from fastcnn.recipes import resolve
    from fastcnn.train import run

    place_options = options_of("place", PlaceConfig)
    explicit = read_values(given, options_by_name().values())
    place = PlaceConfig(**read_values(given, place_options))
    if "config" in given:
        wanted = [*options_by_name().values(), *place_options]
        values = read_config_file(given["config"], wanted)
        place_names = {option.name for option in place_options}
        placed = {name: values.pop(name) for name in place_names & values.keys()}
        place = PlaceConfig(**(placed | read_values(given, place_options)))
        explicit = values | explicit
    if place.resume is not None:
        if given.keys() & {"name", "output"}:
            raise UsageError(
                "--resume: a resumed run stays in its folder; leave --name, --output out"
            )
        outcome = run.resume(place, explicit, command, given.get("quiet", False))
    else:
        outcome = run.start(resolve(explicit), place, command, given.get("quiet", False))
    for draw in (figures.draw_curves, figures.draw_confusion, page.write_page):
        try:
            draw(outcome.folder.path)
        except ImportError as error:
            package = (error.name or str(error)).split(".")[0]
            print(
                f"note: {draw.__name__}: {package} is missing; see fastcnn doctor",
                file=sys.stderr,
            )
    print(page.lead(outcome.summary))
    print(f"run folder: {outcome.folder.path}")


def run_eval(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.train.run import evaluate_run

    own = read_values(given, EVAL_OWN)
    result = evaluate_run(
        given["run"],
        data=own.get("data"),
        split_name=own.get("split", "test"),
        weights=own.get("weights"),
        overrides=read_values(given, [options_by_name()[name] for name in EVAL_SHARED]),
    )
    if given.get("json"):
        print(json.dumps(result, indent=2))
        return
    flipped = " seen both ways" if result["test_flip"] else ""
    print(
        f"{result['arch']} ({result['checkpoint']}) on {result['data']} {result['split']}, "
        f"{result['images']:,} images{flipped}: top-1 {result['top1']:.2%}, "
        f"top-5 {result['top5']:.2%}, loss {result['loss']:.4f}, "
        f"{result['images_per_s']:,.0f} images/s"
    )


def run_archs(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.archs import table

    own = read_values(given, ARCHS_OWN)
    size, classes = own.get("image_size"), own.get("classes")
    if given.get("name"):
        content: Any = table.network_table(given["name"], size, classes)
        show: Callable[[Any], None] = table.print_network
    else:
        content = table.zoo_table(size, classes)
        show = table.print_zoo
    if given.get("json"):
        print(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        show(content)


def run_build(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.ops import build

    quiet = given.get("quiet", False)
    named = read_values(given, BUILD_OWN).get("archs")
    archs = build.archs_of_flags(named, given.get("cuda", False), given.get("cpu", False))
    built = build.ensure(archs, given.get("force", False), quiet)
    print(built.summary)
    path, reason = build.ensure_module(built, quiet)
    print(f"Python module: {path}" if path else f"note: {reason}")


def run_bench(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.bench.options import settings_of

    settings = settings_of(given)
    # after the check: the rest takes torch's seconds to import
    from fastcnn.bench.run import measure, show

    show(measure(settings, command), settings, given.get("quiet", False))


def run_doctor(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn import doctor

    findings = doctor.examine()
    if given.get("json"):
        print(json.dumps(doctor.as_json(findings), indent=2, ensure_ascii=False))
    else:
        doctor.print_report(findings)
    if any(finding.needed and not finding.ok for finding in findings):
        raise UsageError("fastcnn cannot train on this machine; the remedies stand above")


COMMANDS: dict[
    str, tuple[Callable[[], Parser], Callable[[dict[str, Any], list[str]], None], str]
] = {
    "train": (train_parser, run_train, "train a network"),
    "eval": (eval_parser, run_eval, "evaluate a run or a checkpoint"),
    "archs": (archs_parser, run_archs, "list the networks, show their layers"),
    "bench": (bench_parser, run_bench, "compare training steps, measure loaders and layers"),
    "build": (compile_parser, run_build, "compile the native library"),
    "doctor": (doctor_parser, run_doctor, "what this machine offers, what is missing"),
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
    for name, (make, _, text) in COMMANDS.items():
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


def log_to_stderr(level: int) -> None:
    """Let the package's notes and warnings appear as lines on standard error."""
    logger = logging.getLogger("fastcnn")
    logger.setLevel(level)
    logger.handlers[:] = [logging.StreamHandler()]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 2 usage, 3 data, 4 checkpoint, 5 build,
    6 numbers."""
    words = sys.argv[1:] if arguments is None else arguments
    share_the_cores()
    try:
        name, given = parse(words)
        log_to_stderr(logging.WARNING if given.get("quiet") else logging.INFO)
        COMMANDS[name][1](given, ["fastcnn", *words])
        sys.stdout.flush()
    except FastcnnError as error:
        return failed(str(error), error.exit_code, words)
    except KeyboardInterrupt:
        return failed("interrupted", 130, words)
    except BrokenPipeError:
        # whoever read the output has gone; let the interpreter's last flush go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return failed(f"{where}{error.strerror or error}", 1, words)
    except Exception as error:  # a fault of this program: still one line, and how to see more
        reason = " ".join(str(error).split())[:200]
        return failed(f"unexpected {type(error).__name__}: {reason}; --debug shows where", 1, words)
    return 0


def failed(message: str, exit_code: int, words: list[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        print(f"fastcnn: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
