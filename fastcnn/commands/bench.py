"""`fastcnn bench`: steps, inference, loaders and layers beside their rivals."""

from typing import Any

from fastcnn.commands.parser import Parser, add_debug, add_options, new_parser


def parser() -> Parser:
    from fastcnn.bench.options import own_options, train_options

    found = new_parser(
        "bench",
        "Compare training steps or inference of networks under several backends in interleaved "
        "rounds of one run: images/s, memory, launches and the share of the roofline on a GPU, "
        "ratios on a CPU.",
    )
    add_options(found, own_options())
    other = found.add_argument_group("options of fastcnn train")
    add_options(other, train_options())
    found.add_argument("--quiet", action="store_true", help="print nothing but errors")
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.bench.options import settings_of

    settings = settings_of(given)
    # after the check: the rest takes torch's seconds to import
    from fastcnn.bench.run import measure, show

    show(measure(settings, command), settings, given.get("quiet", False))
