"""The `fastcnn` command: parse, call, print."""

import argparse
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, Literal, NoReturn

from jsonargparse import ActionConfigFile, ActionYesNo, ArgumentParser, DefaultHelpFormatter

import fastcnn
from fastcnn.config import Option, PlaceConfig, options_by_name, options_of
from fastcnn.errors import FastcnnError, UsageError, nearest

EVAL_OPTIONS = ("data_dir", "image_size", "loader", "eval_batch_size", "test_fraction")
WORDS = {int: "a whole number", float: "a number", bool: "true or false", list: "whole numbers"}
METAVARS = {int: "N", float: "X", list: "N"}


class PlainHelp(DefaultHelpFormatter):
    """Help texts with the default behind them, without the library's notes on types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default in (None, [], argparse.SUPPRESS) or action.default is False
        return action.help or "" if hidden else f"{action.help} (default: {action.default})"


class Parser(ArgumentParser):
    """A parser whose errors are one line with the nearest valid name."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(self.one_line(message))

    def one_line(self, message: str) -> str:
        """Turn the library's message, which may be a paragraph, into one line."""
        if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
            word = next((w for w in found[1].split() if w.startswith("-")), found[1].split()[0])
            return f"unknown option {word}{nearest(word.split('=')[0], self.known_flags())}"
        if found := re.search(r"does not accept option '([^']+)'", message):
            return (
                f"unknown option '{found[1]}' in the config file{nearest(found[1], option_names())}"
            )
        if found := re.search(r"invalid choice: '([^']*)'", message):
            return f"unknown command '{found[1]}'{nearest(found[1], COMMANDS)}; see fastcnn --help"
        if 'expected "subcommand"' in message:
            return f"no command given; one of {', '.join(COMMANDS)} (see fastcnn --help)"
        if found := re.match(r'Parser key "(?:\w+\.)?(\w+)"', message):
            return self._wrong_value(found[1], message)
        return " ".join(message.split())

    def known_flags(self) -> list[str]:
        """Flags of every command: an unknown one is reported by the outermost parser."""
        return [flag for parser in PARSERS for flag in parser._option_string_actions]

    def _wrong_value(self, name: str, message: str) -> str:
        given = re.search(r"(?:Got value|Given value): (.*)", message)
        value = given[1] if given else ""
        option = options_by_name().get(name)
        if option is None or not given:
            return " ".join(message.split())
        if option.choices:
            valid = ", ".join(option.choices)
            return f"{option.flag}: '{value}' is not one of {valid}{nearest(value, option.choices)}"
        return f"{option.flag}: expected {WORDS.get(option.scalar, 'a text')}, got '{value}'"


PARSERS: list[Parser] = []


def option_names() -> list[str]:
    return [*options_by_name(), *(option.name for option in options_of("place", PlaceConfig))]


def new_parser(command: str, description: str, positional: str = "") -> Parser:
    return Parser(
        usage=f"fastcnn {command} {positional}[options]",
        description=description,
        formatter_class=PlainHelp,
        print_config=None,
    )


def add_option(target: Any, option: Option, default: Any = None) -> None:
    """Add a config option as a flag; `default` is what the help shows, if anything."""
    words: dict[str, Any] = {"default": default, "help": option.help}
    if option.scalar is bool:
        target.add_argument(option.flag, action=ActionYesNo(no_prefix="no-"), **words)
    elif option.scalar is list:
        target.add_argument(option.flag, type=int, nargs="*", metavar="N", **words)
    elif option.choices:
        target.add_argument(option.flag, type=option.type, **words)
    else:
        metavar = METAVARS.get(option.scalar, option.name.upper())
        target.add_argument(option.flag, type=option.type, metavar=metavar, **words)


def add_debug(parser: Parser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def train_parser() -> Parser:
    parser = new_parser(
        "train",
        "Train a network and write everything to a run folder. Defaults are those of the modern "
        "recipe for a network with batch norm; --recipe and --arch change some of them.",
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options")
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
    parser.add_argument("--data", type=str | None, help="other data than the run's own")
    parser.add_argument(
        "--split",
        type=Literal["test", "val", "train"],
        default="test",
        help="which images",
    )
    parser.add_argument(
        "--weights",
        type=Literal["last", "best"],
        help="which checkpoint of a run; default: the one its summary speaks of",
    )
    for name in (*EVAL_OPTIONS, "device", "amp", "amp_dtype", "threads"):
        add_option(parser, options_by_name()[name])
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_debug(parser)
    return parser


def archs_parser() -> Parser:
    parser = new_parser("archs", "List the networks, or show the layers of one.", "[NAME] ")
    parser.add_argument("name", type=str, nargs="?", help="a network")
    add_option(parser, options_by_name()["image_size"])
    parser.add_argument("--classes", type=int | None, help="classes; default: the network's own")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_debug(parser)
    return parser


def doctor_parser() -> Parser:
    parser = new_parser("doctor", "Show versions and devices, what is missing, and the remedy.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_debug(parser)
    return parser


def run_train(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.insight.figures import draw_confusion, draw_curves
    from fastcnn.insight.page import lead, write_page
    from fastcnn.recipes import resolve
    from fastcnn.train import run

    place_names = {option.name for option in options_of("place", PlaceConfig)}
    place = PlaceConfig(**{name: given[name] for name in place_names if name in given})
    explicit = {name: value for name, value in given.items() if name in options_by_name()}
    quiet = given.get("quiet", False)
    if place.resume:
        outcome = run.resume(place, explicit, command, quiet)
    else:
        outcome = run.start(resolve(explicit), place, command, quiet)
    folder = outcome.folder.path
    for draw in (draw_curves, draw_confusion, write_page):
        draw(folder)
    print(lead(outcome.summary))
    print(f"run folder: {folder}")


def run_eval(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.train.run import evaluate_run

    names = {*EVAL_OPTIONS, "device", "amp", "amp_dtype", "threads"}
    overrides = {name: given[name] for name in names if name in given}
    for name, value in overrides.items():
        options_by_name()[name].check(value)
    result = evaluate_run(
        given["run"],
        data=given.get("data"),
        split_name=given.get("split", "test"),
        weights=given.get("weights"),
        overrides=overrides,
    )
    if given.get("json"):
        print(json.dumps(result, indent=2))
        return
    print(
        f"{result['arch']} ({result['checkpoint']}) on {result['data']} {result['split']}, "
        f"{result['images']:,} images: top-1 {result['top1']:.2%}, top-5 {result['top5']:.2%}, "
        f"loss {result['loss']:.4f}, {result['images_per_s']:,.0f} images/s"
    )


def run_archs(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.archs import table

    if given.get("classes") is not None and given["classes"] < 2:
        raise UsageError(f"--classes: must be at least 2, got {given['classes']}")
    if given.get("image_size") is not None:
        options_by_name()["image_size"].check(given["image_size"])
    size, classes = given.get("image_size"), given.get("classes")
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
    "doctor": (doctor_parser, run_doctor, "what this machine offers, what is missing"),
}


def build_parser() -> Parser:
    parser = Parser(
        prog="fastcnn",
        description="Train convolutional image classifiers as fast as the hardware allows.",
        formatter_class=PlainHelp,
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
    given = dict(vars(namespace.get(name))) if namespace.get(name) else {}
    given.pop("config", None)
    return name, given


def log_to_stderr(level: int) -> None:
    """Let the package's notes and warnings appear as lines on standard error."""
    logger = logging.getLogger("fastcnn")
    logger.setLevel(level)
    logger.handlers[:] = [logging.StreamHandler()]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 2 usage, 3 data, 4 checkpoint, 6 numbers."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        name, given = parse(words)
        log_to_stderr(logging.WARNING if given.get("quiet") else logging.INFO)
        COMMANDS[name][1](given, ["fastcnn", *words])
    except FastcnnError as error:
        if "--debug" in words:
            traceback.print_exc()
        print(f"fastcnn: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fastcnn: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
