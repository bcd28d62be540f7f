"""What an option is: its type, bounds and help, and how a value of it is read and checked.

The options themselves stand in config.py.
"""

import dataclasses
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fastcnn.errors import UsageError, nearest
from fastcnn.files import check_depth, check_regular
from fastcnn.text import REASON

SHOWN = 80  # characters of a value in an error


def option(
    default: Any,
    help: str,  # noqa: A002 - the word every command line uses
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
) -> Any:
    """A dataclass field with help text and bounds (closed unless open_low / open_high).

    Of a list of words `low` is the fewest there may be; 1 where it is not given.
    """
    metadata = {
        "help": help,
        "low": low,
        "high": high,
        "open_low": open_low,
        "open_high": open_high,
    }
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Option:
    """One option as the command line needs it."""

    name: str
    section: str
    type: Any
    default: Any
    help: str
    bounds: Mapping[str, Any]

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def element(self) -> Any:
        """The type of a list's elements; else the option's own."""
        return get_args(self.type)[0] if get_origin(self.type) is list else self.type

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that the option, or each element of its list, may be; () where any may."""
        return get_args(self.element) if get_origin(self.element) is Literal else ()

    @property
    def scalar(self) -> Any:
        """int, float, bool, str or list: the type without `| None`."""
        if get_origin(self.type) is list:
            return list
        if self.choices:
            return str
        return next((t for t in get_args(self.type) if t is not type(None)), self.type)

    def check(self, value: Any) -> None:
        """Raise UsageError unless `value` has the option's type and lies within its bounds."""
        if value is None and type(None) in get_args(self.type):
            return
        if self.scalar is list:
            self._check_list(value)
            return
        if self.choices:
            self._check_choice(value)
            return
        fits = type(value) is self.scalar or (self.scalar is float and type(value) is int)
        if not fits:
            words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
            raise UsageError(f"{self.flag}: expected {words[self.scalar]}, got {_shown(value)}")
        if self.scalar in (int, float):
            self._check_bounds(value)

    def parse(self, value: Any) -> Any:
        """Read a value of the command line, where numbers are text, or of a file; check it.

        A file's numbers may be text as well: YAML 1.1 takes 1e-3 for a word.
        """
        if isinstance(value, str) and self.scalar in (int, float):
            value = _number(value, self.scalar)
        if isinstance(value, list) and self.element is int:
            value = [_number(v, int) if isinstance(v, str) else v for v in value]
        if self.scalar is str and value == "":
            raise UsageError(f"{self.flag}: expected a text, got none")
        self.check(value)
        return value

    def _check_choice(self, value: Any) -> None:
        if value not in self.choices:
            given = value if isinstance(value, str) else _shown(value)
            valid, hint = ", ".join(self.choices), nearest(given[:SHOWN], self.choices)
            raise UsageError(f"{self.flag}: '{given[:SHOWN]}' is not one of {valid}{hint}")

    def _check_list(self, values: Any) -> None:
        """Whole numbers from 1 up, or words, at least one or as many as `low` says; none twice."""
        if self.element is int:
            if not isinstance(values, list) or any(type(v) is not int or v < 1 for v in values):
                given = _shown(values)
                raise UsageError(f"{self.flag}: expected whole numbers from 1 up, got {given}")
            return
        low = self.bounds.get("low")
        fewest = 1 if low is None else low
        if (
            not isinstance(values, list)
            or len(values) < fewest
            or any(type(v) is not str for v in values)
        ):
            raise UsageError(f"{self.flag}: expected one or more names, got {_shown(values)}")
        for value in values if self.choices else ():
            self._check_choice(value)
        if repeated := [value for value, count in Counter(values).items() if count > 1]:
            raise UsageError(f"{self.flag}: {', '.join(repeated)} is given twice")

    def _check_bounds(self, value: float) -> None:
        low, high = self.bounds.get("low"), self.bounds.get("high")
        if not _finite(value):
            raise UsageError(f"{self.flag}: expected a finite number, got {_shown(value)}")
        if low is not None and (value < low or (self.bounds.get("open_low") and value == low)):
            word = "more than" if self.bounds.get("open_low") else "at least"
            raise UsageError(f"{self.flag}: must be {word} {low}, got {value}")
        if high is not None and (value > high or (self.bounds.get("open_high") and value == high)):
            word = "less than" if self.bounds.get("open_high") else "at most"
            raise UsageError(f"{self.flag}: must be {word} {high}, got {value}")


def options_of(section: str, cls: type) -> list[Option]:
    """The options of one dataclass, in its order."""
    hints = get_type_hints(cls)
    found = []
    for item in dataclasses.fields(cls):
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        help_text = item.metadata["help"]
        found.append(
            Option(item.name, section, hints[item.name], default, help_text, item.metadata)
        )
    return found


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is no float
        return False


def _shown(value: Any) -> str:
    """A value in an error: its beginning, for a few lines of YAML can stand for billions."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = SHOWN
    return brief.repr(value)


def _number(text: str, kind: type) -> Any:
    """The number that `text` spells, or `text` itself if it spells none."""
    try:
        return kind(text)
    except ValueError:
        return text


def read_config_file(path: str, options: Iterable[Option]) -> dict[str, Any]:
    """The options in a YAML file, by name, read and checked.

    Raises UsageError, which names the file, for one that is missing, no mapping of names to values,
    or repeats a name, and for a value that an option cannot take.
    """
    known = {option.name: option for option in options}
    values = {}
    for name, value in _mapping(path).items():
        if name not in known:
            raise UsageError(f"{path}: {unknown_option(name, known)}")
        try:
            values[name] = known[name].parse(value)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    return values


def unknown_option(name: Any, known: Iterable[str]) -> str:
    """Say that there is no such option, and which one may be meant."""
    given = str(name)[:SHOWN]
    return f"unknown option '{given}'{nearest(given, known)}"


def read_lists(path: str) -> dict[str, Any]:
    """The values in a YAML file by name, as they stand: one, or a list of several.

    Raises UsageError as `read_config_file`, but for the names.
    """
    return {str(name): value for name, value in _mapping(path).items()}


def _mapping(path: str) -> dict[Any, Any]:
    try:
        check_regular(Path(path))
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: not YAML: {error}") from error
    try:
        found, names = read_yaml(text)
    except ValueError as error:
        raise UsageError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--config {path}: expected lines of 'option: value'")
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise UsageError(f"--config {path}: {', '.join(repeated[:SHOWN])} is given twice")
    return found


def read_yaml(text: str) -> tuple[Any, list[str]]:
    """The plain value in a YAML text and, of a mapping, its names as they stand there.

    Raises ValueError, with one line, for what is no YAML, is too deep (`check_depth`) or has
    aliases: a few lines of these can stand for billions of values, or for one that holds itself.
    """
    # here, so that what reads no file (a benchmark from a bare source tree) does not need it
    import yaml

    try:
        check_depth(map(_step, yaml.parse(text, Loader=yaml.SafeLoader)))
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if _repeats(node):
            raise ValueError("it has aliases (*name); write their values out")
        found = None if node is None else yaml.SafeLoader("").construct_document(node)
    except Exception as error:  # dates and tags raise what they like
        reason = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise ValueError(reason) from error
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return found, [str(key.value) for key, _ in pairs]


def _step(event: Any) -> int:
    """1 for an event of PyYAML that begins a list or a mapping, -1 for one that ends it."""
    import yaml

    begins = isinstance(event, yaml.CollectionStartEvent)
    return begins - isinstance(event, yaml.CollectionEndEvent)


def _repeats(root: Any) -> bool:
    """Whether a node stands at two places of a composed YAML text, as an alias makes it."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            return True
        seen.add(id(node))
        inner = node.value if isinstance(getattr(node, "value", None), list) else []
        waiting += [one for item in inner for one in (item if isinstance(item, tuple) else (item,))]
    return False
