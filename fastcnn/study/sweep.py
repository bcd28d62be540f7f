"""The variants of a user's own study: every combination of the values of its options."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastcnn.config import options_by_name
from fastcnn.errors import UsageError, nearest
from fastcnn.options import Option, read_lists
from fastcnn.study.options import sweep_options, swept_options
from fastcnn.study.plan import Variant

MOST_VARIANTS = 1000
WORDS = {"true": True, "yes": True, "false": False, "no": False}


def values_of(option: Option, given: Any) -> list[Any]:
    """The values of an option: one or several, as text of the command line or read from a file.

    A list's elements are joined by commas: --milestones 30,45 40,55 are two values. Raises
    UsageError for a wrong value, and for one that is given twice.
    """
    texts = given if isinstance(given, list) else [given]
    if option.scalar is list and texts and not any(isinstance(t, str | list) for t in texts):
        texts = [texts]  # one value in a file: [30, 45]
    if not texts:
        texts = [True] if option.scalar is bool else [""]
    values = [_value(option, text) for text in texts]
    for place, value in enumerate(values):
        if value in values[:place] and type(value) is type(values[values.index(value)]):
            raise UsageError(f"{option.flag}: {value} is given twice")
    return values


def _value(option: Option, text: Any) -> Any:
    if option.scalar is bool and isinstance(text, str):
        if text.lower() not in WORDS:
            raise UsageError(f"{option.flag}: expected true or false, got '{text}'")
        return WORDS[text.lower()]
    if option.scalar is list:
        parts = text.split(",") if isinstance(text, str) else text
        return option.parse([part for part in parts if part != ""] if parts else [])
    if text is None or (text == "none" and _may_be_none(option)):
        return None
    return option.parse(text)


def _may_be_none(option: Option) -> bool:
    return option.default is None and "none" not in option.choices


def values_of_all(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The values of each option of a training run, from flags over those of --config; and what the
    file says of the sweep's own options."""
    own_names = {option.name for option in sweep_options()}
    swept = {option.name: option for option in swept_options()}
    found: dict[str, Any] = read_lists(given["config"]) if "config" in given else {}
    for name in found.keys() - own_names - swept.keys():
        raise UsageError(
            f"{given['config']}: unknown option '{name}'{nearest(name, [*swept, *own_names])}"
        )
    own = {name: found.pop(name) for name in own_names & found.keys()}
    found |= {name: given[name] for name in swept if name in given}
    return own, {name: values_of(swept[name], values) for name, values in found.items()}


def variants_of(values: Mapping[str, Sequence[Any]]) -> list[Variant]:
    """Every combination of the options' values; the last option varies fastest.

    Labels and folders name the options that vary, in the order given. Raises UsageError for more
    than 1,000 combinations.
    """
    varied = [name for name, several in values.items() if len(several) > 1]
    count = 1
    for several in values.values():
        count *= len(several)
    if count > MOST_VARIANTS:
        raise UsageError(f"{count:,} combinations of the options; at most {MOST_VARIANTS:,}")
    found = []
    for chosen in itertools.product(*values.values()):
        options = dict(zip(values, chosen, strict=True))
        found.append(Variant(_key(options, varied), _label(options, varied), options))
    keys = [variant.key for variant in found]
    if len(set(keys)) < len(keys):
        # values that a folder's name cannot tell apart
        found = [
            Variant(f"{variant.key}-{number}", variant.label, variant.options)
            for number, variant in enumerate(found, 1)
        ]
    return found


def study_name(values: Mapping[str, Sequence[Any]]) -> str:
    """What a study is called where its user gives no name: the options that vary."""
    varied = [name for name, several in values.items() if len(several) > 1]
    return "-".join(varied or ["single"]).replace("_", "-")


def _label(options: Mapping[str, Any], varied: Sequence[str]) -> str:
    if not varied:
        return str(options.get("arch", options_by_name()["arch"].default))
    return ", ".join(_said(name, options[name]) for name in varied)


def _said(name: str, value: Any) -> str:
    if name == "arch":
        return str(value)
    if isinstance(value, bool):
        value = "on" if value else "off"
    if isinstance(value, list):
        value = " ".join(map(str, value)) or "none"
    return f"{name.replace('_', ' ')} {value}"


def _key(options: Mapping[str, Any], varied: Sequence[str]) -> str:
    label = _label(options, varied).lower()
    return re.sub(r"[^a-z0-9.+]+", "-", label).strip("-.")[:100] or "variant"
