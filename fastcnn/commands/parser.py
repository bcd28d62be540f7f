"""The parsers of the commands: flags from options, help texts, errors of one line."""

import argparse
import re
from collections.abc import Iterable
from typing import Any, Literal, NoReturn

from jsonargparse import ActionYesNo, ArgumentParser, DefaultHelpFormatter

from fastcnn.config import options_by_name
from fastcnn.errors import UsageError, nearest
from fastcnn.options import Option

METAVARS = {int: "N", float: "X"}


def own_option(name: str, kind: Any, default: Any, text: str, low: int | None = None) -> Option:
    """An option of one command alone, which is no part of a configuration."""
    return Option(name, "command", kind, default, text, {"low": low})


WEIGHTS = own_option(
    "weights",
    Literal["last", "best"],
    None,
    "which checkpoint of a run; default: the one its summary speaks of",
)


class PlainHelp(DefaultHelpFormatter):
    """Help texts with the default behind them, without the library's notes on types."""

    def _get_help_string(self, action: argparse.Action) -> str:
        hidden = action.default in (None, [], argparse.SUPPRESS) or action.default is False
        return action.help or "" if hidden else f"{action.help} (default: {action.default})"


class Parser(ArgumentParser):
    """A parser whose errors are one line with the nearest valid name. command: the one that was
    given, if any: the outermost parser reports what no other takes."""

    command: str | None = None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        own = PARSERS.get(self.command or "", self)
        raise UsageError(one_line(message, own))


def one_line(message: str, parser: Parser) -> str:
    """Turn the library's message, which may be a paragraph, into one line."""
    if found := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        words = found[1].split() or ["''"]
        word = next((w for w in words if w.startswith("-")), None)
        if word is None:
            where = "files and folders go together, before the options"
            return f"unexpected argument '{words[0]}'; {where}"
        return f"unknown option {word}{nearest(word.split('=')[0], parser._option_string_actions)}"
    if found := re.match(r"the following arguments are required: (.*)", message):
        names = [word.rpartition(".")[2] for word in found[1].split(", ")]
        metavars = {action.dest: action.metavar for action in parser._actions}
        shown = ", ".join(str(metavars.get(name) or name.upper()) for name in names)
        return f"the following arguments are required: {shown}; see {parser.usage}"
    if found := re.search(r"invalid choice: '([^']*)'", message):
        return f"unknown command '{found[1]}'{nearest(found[1], PARSERS)}; see fastcnn --help"
    if 'expected "subcommand"' in message:
        return f"no command given; one of {', '.join(PARSERS)} (see fastcnn --help)"
    return " ".join(message.split())


PARSERS: dict[str, Parser] = {}
"""Of each command by its name."""


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


def add_options(target: Any, options: Iterable[Option], defaults: bool = True) -> None:
    """Add options as flags, their defaults in the help unless the run decides what they are."""
    for option in options:
        add_option(target, option, option.default if defaults else None)


def shared_options(names: Iterable[str]) -> list[Option]:
    """Options of `fastcnn train` that another command takes as well."""
    return [options_by_name()[name] for name in names]


def read_values(given: dict[str, Any], options: Iterable[Option]) -> dict[str, Any]:
    """The options among what the user gave, by name, read and checked."""
    return {
        option.name: option.parse(given[option.name]) for option in options if option.name in given
    }


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_open(parser: Parser) -> None:
    parser.add_argument("--open", action="store_true", help="open the page in a browser")


def add_debug(parser: Parser) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
