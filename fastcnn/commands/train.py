"""`fastcnn train`: train a network, and draw what it reached."""

from typing import Any

from fastcnn.commands.output import open_page, report_missing
from fastcnn.commands.parser import Parser, add_debug, add_open, add_option, new_parser, read_values
from fastcnn.config import PlaceConfig, options_by_name
from fastcnn.errors import UsageError
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
            report_missing(draw.__name__, error)
    print(page.lead(outcome.summary))
    print(f"run folder: {outcome.folder.path}")
    written = outcome.folder.path / "index.html"
    if given.get("open") and written.is_file():  # not without jinja2
        open_page(written)
