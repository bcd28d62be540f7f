"""The `fastcnn` command: parse, call, print."""

import contextlib
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastcnn.config import DATA_NAMES, DataConfig, PlaceConfig, options_by_name
from fastcnn.errors import DataError, FastcnnError, NumbersError, UsageError, nearest
from fastcnn.options import options_of, read_config_file
from fastcnn.parsers import (
    ARCHS_OWN,
    BUILD_OWN,
    DATA_ACTIONS,
    DATA_SHARED,
    EVAL_OWN,
    EVAL_SHARED,
    SHOW_OWN,
    parse,
    read_values,
)
from fastcnn.train.host import share_the_cores

BROKEN_PIPE = 141  # what a shell reports of a command that SIGPIPE ended


def run_train(given: dict[str, Any], command: list[str]) -> None:
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


def run_eval(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.train.run import evaluate_run

    own = read_values(given, EVAL_OWN)
    result = evaluate_run(
        given["run"],
        data=own.get("data"),
        split_name=own.get("split", "test"),
        weights=own.get("weights"),
        overrides=read_values(given, [options_by_name()[name] for name in EVAL_SHARED]),
    )
    if given.get("json"):
        print(json.dumps(result, indent=2))
        return
    flipped = " seen both ways" if result["test_flip"] else ""
    print(
        f"{result['arch']} ({result['checkpoint']}) on {result['data']} {result['split']}, "
        f"{result['images']:,} images{flipped}: top-1 {result['top1']:.2%}, "
        f"top-5 {result['top5']:.2%}, loss {result['loss']:.4f}, "
        f"{result['images_per_s']:,.0f} images/s"
    )


def run_data(given: dict[str, Any], command: list[str]) -> None:
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
    values = read_values(given, [options_by_name()[name] for name in DATA_SHARED])
    config = DataConfig(data=target, **values)
    # after the check: the rest takes torch's seconds to import
    from fastcnn.data import report

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


def as_text(content: Any) -> str:
    """JSON as every command prints it."""
    return json.dumps(content, indent=2, ensure_ascii=False)


def show_data(config: DataConfig, own: dict[str, Any], as_json: bool) -> None:
    from fastcnn.data import report
    from fastcnn.insight import data_figures

    found, drawn = report.show(config, own.get("samples", 40), own.get("seed", 0))
    folder = Path(own.get("output") or f"show-{found['name']}")
    folder.mkdir(parents=True, exist_ok=True)
    name, classes = found["name"], found["classes"]
    found["figures"] = []
    try:
        for path in (
            data_figures.draw_histogram(folder, name, classes),
            data_figures.draw_samples(folder, name, drawn.pixels, drawn.labels, list(classes)),
        ):
            found["figures"].append(str(path))
    except ImportError as error:
        report_missing("data show", error)
    print(as_text(found) if as_json else report.show_text(found))


def report_missing(what: str, error: ImportError) -> None:
    """Say that something was not drawn, for want of a package that can be done without."""
    package = (error.name or str(error)).split(".")[0]
    print(f"note: {what}: {package} is missing; see fastcnn doctor", file=sys.stderr)


def run_archs(given: dict[str, Any], command: list[str]) -> None:
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


def run_build(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.ops import build

    quiet = given.get("quiet", False)
    named = read_values(given, BUILD_OWN).get("archs")
    archs = build.archs_of_flags(named, given.get("cuda", False), given.get("cpu", False))
    built = build.ensure(archs, given.get("force", False), quiet)
    print(built.summary)
    path, reason = build.ensure_module(built, quiet)
    print(f"Python module: {path}" if path else f"note: {reason}")


def run_bench(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.bench.options import settings_of

    settings = settings_of(given)
    # after the check: the rest takes torch's seconds to import
    from fastcnn.bench.run import measure, show

    show(measure(settings, command), settings, given.get("quiet", False))


def run_reproduce(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.study.options import read_reproduce

    options, machine = read_reproduce(given)
    # after the check: the rest takes torch's seconds to import
    from fastcnn.reports.catalogue import (
        experiments_named,
        report_named,
        reports_table,
        rows_table,
    )
    from fastcnn.study.table import show

    if given.get("report") is None:
        show(reports_table(), "fastcnn reproduce REPORT [EXPERIMENT …]")
        return
    report = report_named(given["report"])
    experiments = experiments_named(report, given.get("experiments") or [])
    if options.list_rows:
        show(rows_table(report, experiments), f"{report.authors}, {report.year}: {report.title}")
        return
    from fastcnn.reports.reproduce import reproduce

    quiet = given.get("quiet", False)
    found = reproduce(report, experiments, options, machine, command, quiet, say_on(quiet))
    for one in found:
        show_record(one.record)
    print(f"written to {found[0].folder} (index.html, tables, figures)")
    report_failures([failure for one in found for failure in one.failures])


def run_sweep(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn.study.options import read_sweep, sweep_options
    from fastcnn.study.sweep import values_of_all

    own, values = values_of_all(given)
    own_names = {option.name for option in sweep_options()}
    options = read_sweep(own | {k: v for k, v in given.items() if k in own_names})
    # after the check: the rest takes torch's seconds to import
    from fastcnn.study.swept import sweep

    quiet = given.get("quiet", False)
    record, folder, failures = sweep(values, options, command, quiet, say_on(quiet))
    show_record(record)
    print(f"written to {folder} (index.html, tables, figures)")
    report_failures(failures)


def say_on(quiet: bool) -> Callable[[str], None]:
    """What prints a line of a study's progress on standard error, or nothing."""
    return (lambda text: None) if quiet else (lambda text: print(text, file=sys.stderr, flush=True))


def show_record(record: Any) -> None:
    """Print a study's table and what it says."""
    from fastcnn.study.table import show

    print(f"\n{record.lead}")
    show(record.table, record.title)
    for line in (*record.sentences, *record.notes):
        print(f"- {line}")


def report_failures(failures: Sequence[Any]) -> None:
    """Raise NumbersError if any run of a study had numbers that were not finite."""
    if failures:
        names = ", ".join(failure.planned.name for failure in failures)
        raise NumbersError(f"{len(failures)} failed ({names}); the other runs are in the table")


def run_doctor(given: dict[str, Any], command: list[str]) -> None:
    from fastcnn import doctor

    findings = doctor.examine()
    if given.get("json"):
        print(as_text(doctor.as_json(findings)))
    else:
        doctor.print_report(findings)
    if any(finding.needed and not finding.ok for finding in findings):
        raise UsageError("fastcnn cannot train on this machine; the remedies stand above")


RUNS: dict[str, Callable[[dict[str, Any], list[str]], None]] = {
    "train": run_train,
    "eval": run_eval,
    "data": run_data,
    "archs": run_archs,
    "bench": run_bench,
    "reproduce": run_reproduce,
    "sweep": run_sweep,
    "build": run_build,
    "doctor": run_doctor,
}


def log_to_stderr(level: int) -> None:
    """Let the package's notes and warnings appear as lines on standard error."""
    logger = logging.getLogger("fastcnn")
    logger.setLevel(level)
    logger.handlers[:] = [logging.StreamHandler()]


def main(arguments: list[str] | None = None) -> int:
    """Run a command; return its exit code: 0 done, 2 usage, 3 data, 4 checkpoint, 5 build,
    6 numbers."""
    words = sys.argv[1:] if arguments is None else arguments
    share_the_cores()
    try:
        name, given = parse(words)
        log_to_stderr(logging.WARNING if given.get("quiet") else logging.INFO)
        RUNS[name](given, ["fastcnn", *words])
        sys.stdout.flush()
    except FastcnnError as error:
        return failed(str(error), error.exit_code, words)
    except KeyboardInterrupt:
        return failed("interrupted", 130, words)
    except BrokenPipeError:
        # whoever read the output has gone; let the interpreter's last flush go nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return failed(f"{where}{error.strerror or error}", 1, words)
    except Exception as error:  # a fault of this program: still one line, and how to see more
        reason = " ".join(str(error).split())[:200]
        return failed(f"unexpected {type(error).__name__}: {reason}; --debug shows where", 1, words)
    return 0


def failed(message: str, exit_code: int, words: list[str]) -> int:
    if "--debug" in words:
        traceback.print_exc()
    with contextlib.suppress(OSError):
        print(f"fastcnn: {message}", file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
