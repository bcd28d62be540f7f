"""`fastcnn compare`: several runs in one table and on one page."""

from pathlib import Path
from typing import Any

from fastcnn.commands.output import as_text, open_page
from fastcnn.commands.parser import (
    Parser,
    add_debug,
    add_json,
    add_open,
    add_options,
    new_parser,
    own_option,
    read_values,
)
from fastcnn.errors import UsageError
from fastcnn.packages import require

COMPARE_OWN = (
    own_option(
        "output", str, "compare.html", "the page; one that an earlier comparison wrote is replaced"
    ),
)


def parser() -> Parser:
    found = new_parser(
        "compare",
        "Set runs side by side, in the order given: results, the options in which they differ, "
        "and on a page their curves.",
        "RUN RUN … ",
    )
    found.add_argument("runs", type=str, nargs="+", metavar="RUN", help="run folders, two or more")
    add_options(found, COMPARE_OWN)
    add_json(found)
    add_open(found)
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    folders = [Path(name) for name in given["runs"]]
    check_different(folders)
    output = Path(read_values(given, COMPARE_OWN).get("output", "compare.html"))
    require("jinja2")
    # after the check: the rest takes torch's seconds to import
    from fastcnn.insight.html.table import show
    from fastcnn.insight.run_page import compare

    compare.check_output(output)
    found = compare.compare(folders)
    page = compare.write_comparison(found, output)
    if given.get("json"):
        print(as_text(compare.as_plain(found) | {"page": str(page)}))
    else:
        show(found.results, "results")
        if found.differing.rows:
            show(found.differing, "\noptions in which they differ")
        print(f"\n{len(found.same)} options are the same in all")
        for note in found.notes:
            print(f"- {note}")
        print(f"page: {page}")
    if given.get("open"):
        open_page(page)


def check_different(folders: list[Path]) -> None:
    """Raise UsageError for fewer than two runs, and for one that is named twice."""
    if len(folders) < 2:
        raise UsageError("compare: give two or more run folders")
    seen: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise UsageError(f"compare: {seen[folder.resolve()]} and {folder} are the same run")
        seen[folder.resolve()] = folder
