"""`fastcnn reproduce`: a report's experiments, published figures beside ours."""

from typing import Any

from fastcnn.commands.output import report_failures, say_on, show_record
from fastcnn.commands.parser import Parser, add_debug, add_option, add_options, new_parser
from fastcnn.packages import require


def parser() -> Parser:
    from fastcnn.study.options import machine_options, reproduce_options

    found = new_parser(
        "reproduce",
        "Train the experiments of a student report and set the published figures beside ours: "
        "tables, figures, verdicts. Without a report: list them. Finished runs are kept, so that "
        "the same command goes on where it was stopped.",
        "[REPORT [EXPERIMENT …]] ",
    )
    found.add_argument("report", type=str, nargs="?", help="a report, such as marie2019")
    found.add_argument(
        "experiments", type=str, nargs="*", help="experiments of it, such as table1; default: all"
    )
    add_options(found, reproduce_options())
    other = found.add_argument_group("options of fastcnn train, for every run")
    for option in machine_options():
        shown = None if option.name == "data" else option.default
        add_option(other, option, shown)
    found.add_argument("--quiet", action="store_true", help="print nothing but the tables")
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.study.options import read_reproduce

    options, machine = read_reproduce(given)
    # after the check: the rest takes torch's seconds to import
    from fastcnn.insight.html.table import show
    from fastcnn.reports.catalogue import experiments_named, report_named, reports_table, rows_table

    if given.get("report") is None:
        show(reports_table(), "fastcnn reproduce REPORT [EXPERIMENT …]")
        return
    report = report_named(given["report"])
    experiments = experiments_named(report, given.get("experiments") or [])
    if options.list_rows:
        show(rows_table(report, experiments), f"{report.authors}, {report.year}: {report.title}")
        return
    require("matplotlib.figure", "jinja2", "scipy.stats")
    from fastcnn.reports.reproduce import reproduce

    quiet = given.get("quiet", False)
    found = reproduce(report, experiments, options, machine, command, quiet, say_on(quiet))
    for one in found:
        show_record(one.record)
    print(f"written to {found[0].folder} (index.html, tables, figures)")
    report_failures([failure for one in found for failure in one.failures])
