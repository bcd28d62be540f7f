"""`fastcnn train`: train a network, and draw what it reached."""

from typing import Any

from fastcnn.commands.output import open_page
from fastcnn.commands.parser import Parser, add_debug, add_open, add_option, new_parser, read_values
from fastcnn.config import PlaceConfig, options_by_name
from fastcnn.options import options_of, read_config_file


def parser() -> Parser:
    found = new_parser(
        "train",
        "Train a network and write everything to a run folder. Defaults are those of the modern "
        "recipe for a network with batch norm; --recipe and --arch change some of them.",
    )
    found.add_argument("--config", metavar="FILE", help="YAML file of options; flags stand above")
    titles = {
        "model": "network",
        "data": "data",
        "augment": "augmentation",
        "optim": "optimisation",
        "run": "run",
    }
    groups = {name: found.add_argument_group(title) for name, title in titles.items()}
    for option in options_by_name().values():
        add_option(groups[option.section], option, option.default)
    place = found.add_argument_group("run folder")
    for option in options_of("place", PlaceConfig):
        add_option(place, option, option.default)
    add_open(found)
    found.add_argument("--quiet", action="store_true", help="print nothing but the result")
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn import api
    from fastcnn.insight.run_page import page

    options = [*options_by_name().values(), *options_of("place", PlaceConfig)]
    named = read_values(given, options)
    written = read_config_file(given["config"], options) if "config" in given else {}
    quiet = given.get("quiet", False)
    outcome = api.train_or_resume(written | named, named.keys(), command, quiet)
    if not outcome.folder.writes:
        return  # another process of the run tells it
    print(page.lead(outcome.summary))
    print(f"run folder: {outcome.folder.path}")
    drawn = outcome.folder.path / "index.html"
    if given.get("open") and drawn.is_file():  # not without jinja2
        open_page(drawn)
