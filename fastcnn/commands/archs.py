"""`fastcnn archs`: the networks, or the layers of one."""

from collections.abc import Callable
from typing import Any

from fastcnn.commands.output import as_text
from fastcnn.commands.parser import (
    Parser,
    add_debug,
    add_json,
    add_options,
    new_parser,
    own_option,
    read_values,
)

ARCHS_OWN = (
    own_option("classes", int | None, None, "classes; default: the network's own", low=2),
    own_option("image_size", int | None, None, "side of the images; default: the network's own", 8),
)


def parser() -> Parser:
    found = new_parser("archs", "List the networks, or show the layers of one.", "[NAME] ")
    found.add_argument("name", type=str, nargs="?", help="a network")
    add_options(found, ARCHS_OWN)
    add_json(found)
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
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
        print(as_text(content))
    else:
        show(content)
