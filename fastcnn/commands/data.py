"""`fastcnn data`: check, pack or show the images of a data set."""

from pathlib import Path
from typing import Any

from fastcnn.commands.output import as_text, report_missing
from fastcnn.commands.parser import (
    Parser,
    add_debug,
    add_json,
    add_options,
    new_parser,
    own_option,
    read_values,
    shared_options,
)
from fastcnn.config import DATA_NAMES, DataConfig
from fastcnn.errors import DataError, UsageError, nearest
from fastcnn.packages import PackageError, require

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


def parser() -> Parser:
    actions = "; ".join(f"{name}: {text}" for name, text in DATA_ACTIONS.items())
    found = new_parser(
        "data",
        f"Look at the images of a data set before training. {actions}.",
        "{" + ",".join(DATA_ACTIONS) + "} DATA ",
    )
    found.add_argument("action", type=str, nargs="?", help=", ".join(DATA_ACTIONS))
    found.add_argument("target", type=str, nargs="?", help="as --data of fastcnn train")
    add_options(found, shared_options(DATA_SHARED))
    add_options(found, SHOW_OWN)
    add_json(found)
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    action, target = given.get("action"), given.get("target")
    if action not in DATA_ACTIONS:
        problem = "no action given" if action is None else f"unknown action '{action}'"
        hint = "" if action is None else nearest(action, DATA_ACTIONS)
        raise UsageError(f"data: {problem}{hint}; one of {', '.join(DATA_ACTIONS)}")
    if target is None:
        raise UsageError(f"data {action}: give a path or one of {', '.join(DATA_NAMES)}")
    own = read_values(given, SHOW_OWN)
    if own and action != "show":
        flag = next(option.flag for option in SHOW_OWN if option.name in own)
        raise UsageError(f"data {action}: {flag} belongs to fastcnn data show")
    values = read_values(given, shared_options(DATA_SHARED))
    config = DataConfig(data=target, **values)
    # after the check: the rest takes torch's seconds to import
    from fastcnn.data import inspect as report

    as_json = given.get("json", False)
    if action == "show":
        show_data(config, own, as_json)
    elif action == "pack":
        packed = report.pack(config)
        print(as_text(packed) if as_json else report.pack_text(packed))
    else:
        found = report.check(config)
        print(as_text(found) if as_json else report.check_text(found))
        if found["unreadable"]:
            raise DataError(report.unreadable_line(found))


def show_data(config: DataConfig, own: dict[str, Any], as_json: bool) -> None:
    from fastcnn.data import inspect as report
    from fastcnn.insight.drawing import data_figures

    found, drawn = report.show(config, own.get("samples", 40), own.get("seed", 0))
    folder = Path(own.get("output") or f"show-{found['name']}")
    folder.mkdir(parents=True, exist_ok=True)
    name, classes = found["name"], found["classes"]
    found["figures"] = []
    try:
        require("matplotlib.figure")
        for path in (
            data_figures.draw_histogram(folder, name, classes),
            data_figures.draw_samples(folder, name, drawn.pixels, drawn.labels, list(classes)),
        ):
            found["figures"].append(str(path))
    except PackageError as error:
        report_missing("data show", error)
    print(as_text(found) if as_json else report.show_text(found))
