"""README and docs/: commands parse, links lead somewhere, the reference is what the code says.

`python tests/test_docs.py` writes docs/reference/options.md; a test checks that it is current.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fastcnn.archs import get_network
from fastcnn.cli import COMMANDS, parse
from fastcnn.commands.parser import METAVARS, read_values
from fastcnn.config import SECTIONS, PlaceConfig, options_by_name
from fastcnn.errors import UsageError
from fastcnn.options import Option, options_of

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = ROOT / "docs" / "reference" / "options.md"
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "csrc/README.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
TITLES = {
    "model": "Network",
    "data": "Data",
    "augment": "Augmentation",
    "optim": "Optimisation",
    "run": "Run",
    "place": "Run folder",
}
HEAD = """# Commands and options

<!-- written by python tests/test_docs.py -->

`fastcnn COMMAND --help` prints the options of a command. An option has the same meaning in every
command.

{commands}

## Options of `fastcnn train`

A value comes from the flag, else from `--config FILE` (a YAML file of the names with `_` for `-`),
else from the recipe, else from the default below. The defaults are those of the recipe `modern` for
a network with batch norm; `--recipe` and `--arch` change some of them. An option that is on or off
has a `--no-` form. `--open` opens the run's page, `--quiet` prints nothing but the result, and
`--debug` shows the traceback of an error.
"""


# The reference


def reference() -> str:
    commands = [f"- **`fastcnn {name}`**: {text}" for name, (_, text) in COMMANDS.items()]
    parts = [HEAD.format(commands="\n".join(commands))]
    for section, config in (SECTIONS | {"place": PlaceConfig}).items():
        lines = "\n".join(entry(each) for each in options_of(section, config))
        parts.append(f"### {TITLES[section]}\n\n{lines}\n")
    return "\n".join(parts)


def entry(option: Option) -> str:
    told = "; ".join(fact for fact in (default(option), bounds(option)) if fact)
    told = told[:1].upper() + told[1:]
    text = option.help.replace("<", "&lt;")  # Markdown would take <n> for HTML
    text += "" if text.endswith(".") else "."
    return f"- **`{value(option)}`**: {text}" + (f" *{told}.*" if told else "")


def value(option: Option) -> str:
    if option.scalar is bool:
        return option.flag
    metavar = METAVARS.get(option.element if option.scalar is list else option.scalar, "TEXT")
    if option.choices:
        metavar = "{" + ",".join(option.choices) + "}"
    return f"{option.flag} {metavar}" + (" ..." if option.scalar is list else "")


def default(option: Option) -> str:
    if option.default in (None, []):
        return ""
    told = {True: "on", False: "off"}[option.default] if option.scalar is bool else option.default
    return f"Default: `{told}`"


def bounds(option: Option) -> str:
    if option.scalar not in (int, float):
        return ""
    low, high = option.bounds["low"], option.bounds["high"]
    words = []
    if low is not None:
        words.append(f"{'more than' if option.bounds['open_low'] else 'at least'} {low}")
    if high is not None:
        words.append(f"{'less than' if option.bounds['open_high'] else 'at most'} {high:,}")
    return ", ".join(words)


def test_the_options_are_those_of_the_code():
    hint = "run python tests/test_docs.py"
    assert OPTIONS.read_text("utf-8") == reference(), hint


# Commands and links


def commands_of(page):
    """The words of each command in a page's shell blocks and inline code."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    inline = re.findall(r"(?<!`)`((?:fastcnn|python)\s[^`]+)`", outside)
    for line in [*lines, *(" ".join(words.split()) for words in inline)]:
        command = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "|"):
                command.append(word)
            elif command:
                yield command
                command = []


@EVERY_PAGE
def test_commands_are_such_as_the_program_takes(page):
    for words in commands_of(page):
        if scripts := [word for word in words if word.endswith(".py")]:
            assert (ROOT / scripts[0]).is_file(), words
        start = next((i for i, word in enumerate(words) if Path(word).name == "fastcnn"), None)
        command = [] if start is None else words[start + 1 :]
        if not command or "COMMAND" in command:
            continue
        if len(command) == 1:  # mentioned, not given
            assert command[0] in COMMANDS, words
            continue
        if command[-1] in ("--help", "--version"):
            continue
        name, given = parse(command)
        if name == "train":
            read_values(given, [*options_by_name().values(), *options_of("place", PlaceConfig)])
            get_network(given.get("arch", "vgg16"))


def test_a_wrong_command_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("x\n```sh\na | fastcnn train --epoch 3  # it's wrong\n```\n`fastcnn\ndoctor`\n")
    found = list(commands_of(page))
    assert found == [["a"], ["fastcnn", "train", "--epoch", "3"], ["fastcnn", "doctor"]]
    with pytest.raises(UsageError, match="--epochs"):
        parse(found[1][1:])


@EVERY_PAGE
def test_links_within_the_project_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


@EVERY_PAGE
def test_files_that_a_page_names_exist(page):
    named = re.findall(
        r"`((?:fastcnn|csrc|tests|benchmarks|docs)/[\w./*-]+)`", page.read_text("utf-8")
    )
    for name in named:
        assert any(ROOT.glob(name.rstrip("/"))), name


def test_readme_is_short_and_its_python_is_that_of_the_guide():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 150
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    # which tests/commands/test_api.py runs
    assert code in (ROOT / "docs" / "guides" / "predict.md").read_text("utf-8")


def test_the_example_of_a_network_builds():
    text = (ROOT / "docs" / "guides" / "networks.md").read_text("utf-8")
    [code] = re.findall(r"<!-- network example -->\n```python\n(.*?)```", text, re.DOTALL)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    # weights and norms of two convolutions, 64·16·16 pixels to 128 units, 10 classes
    pixels = 64 * 16 * 16
    parts = (27 * 32 + 64, 9 * 32 * 64 + 128, pixels * 128 + 128, 128 * 10 + 10)
    assert int(found.stdout) == sum(parts)


if __name__ == "__main__":
    OPTIONS.write_text(reference(), "utf-8")
