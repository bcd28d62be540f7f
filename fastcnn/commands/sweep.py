"""`fastcnn sweep`: every combination of options in one table."""

from typing import Any

from fastcnn.commands.output import report_failures, say_on, show_record
from fastcnn.commands.parser import METAVARS, Parser, add_debug, add_options, new_parser
from fastcnn.packages import require


def parser() -> Parser:
    from fastcnn.study.options import sweep_options, swept_options

    found = new_parser(
        "sweep",
        "Train every combination of the values of its options, each with several seeds, and "
        "compare them in one table: --arch cnn-a cnn-b --lr 1e-3 2e-3. Lists are joined by commas "
        "(--milestones 30,45), switches are true or false. Finished runs are kept, so that the "
        "same command goes on where it was stopped.",
    )
    found.add_argument("--config", metavar="FILE", help="YAML file of options, lists for several")
    add_options(found, sweep_options())
    swept = found.add_argument_group("options of fastcnn train, with one value or several")
    for option in swept_options():
        metavar = "{" + ",".join(option.choices) + "}" if option.choices else None
        metavar = metavar or METAVARS.get(option.element, option.name.upper())
        words = {"metavar": metavar, "help": option.help, "default": option.default}
        swept.add_argument(option.flag, nargs="*", **words)
    found.add_argument("--quiet", action="store_true", help="print nothing but the table")
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.study.options import read_sweep, sweep_options
    from fastcnn.study.sweep import values_of_all

    own, values = values_of_all(given)
    own_names = {option.name for option in sweep_options()}
    options = read_sweep(own | {k: v for k, v in given.items() if k in own_names})
    require("matplotlib.figure", "jinja2", "scipy.stats")
    # after the check: the rest takes torch's seconds to import
    from fastcnn.study.swept import sweep

    quiet = given.get("quiet", False)
    record, folder, failures = sweep(values, options, command, quiet, say_on(quiet))
    show_record(record)
    print(f"written to {folder} (index.html, tables, figures)")
    report_failures(failures)
