"""`fastcnn ood`: tell images of other data from those that a run was trained for."""

from pathlib import Path
from typing import Any

from fastcnn.commands.output import as_text, open_page, report_missing
from fastcnn.commands.parser import (
    WEIGHTS,
    Parser,
    add_debug,
    add_json,
    add_open,
    add_options,
    new_parser,
    own_option,
    read_values,
    shared_options,
)
from fastcnn.errors import UsageError
from fastcnn.packages import PackageError, require

OOD_OWN = (
    own_option("out", str | None, None, "images out of distribution, as --data of fastcnn train"),
    own_option(
        "in", str | None, None, "images in distribution, likewise; default: the run's own test data"
    ),
    own_option(
        "score",
        str | None,
        None,
        "what the histogram shows: a layer's activation by its name (ReLU-9, see fastcnn archs), "
        "'max softmax' or 'energy'; default: the best AUROC",
    ),
    own_option(
        "quantile", float, 0.05, "part of the held-out images in distribution a threshold may lose"
    ),
    own_option("limit", int | None, None, "at most this many images of each set", 1),
    WEIGHTS,
)


OOD_SHARED = (
    "data_dir",
    "resize",
    "grayscale",
    "on_bad_image",
    "bad_limit",
    "loader",
    "store",
    "workers",
    "eval_batch_size",
    "test_fraction",
    "device",
    "threads",
)


def parser() -> Parser:
    found = new_parser(
        "ood",
        "Tell images of other data from those that a run was trained for: by the mean activation "
        "of every layer, by the largest softmax probability, by energy. Writes <run>/ood-<out>/ "
        "and the run's page.",
        "RUN --out DATA ",
    )
    found.add_argument("run", type=str, help="folder of a finished run")
    add_options(found, OOD_OWN)
    add_options(found, shared_options(OOD_SHARED), defaults=False)
    add_json(found)
    add_open(found)
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    own = read_values(given, OOD_OWN)
    overrides = read_values(given, shared_options(OOD_SHARED))
    if own.get("out") is None:
        raise UsageError("ood: --out is missing: images out of distribution, e.g. --out digits")
    # after the check: the rest takes torch's seconds to import
    from fastcnn.insight.analysis.analysis_dir import claimed, origin_of
    from fastcnn.insight.html.table import show
    from fastcnn.insight.ood import ood_record
    from fastcnn.insight.ood.ood import detect
    from fastcnn.insight.run_page.page import check_page
    from fastcnn.train.rundir import RunFolder

    options = {name: own[name] for name in ("score", "quantile", "limit", "weights") if name in own}
    run, in_data = RunFolder.finished(given["run"]).path, own.get("in")
    name, of = ood_record.name_of(own["out"], in_data), [origin_of(in_data), origin_of(own["out"])]
    with claimed(run, name, ood_record.KEY, of) as folder:
        # before the images, which may take long
        check_page(run, folder)
        result = detect(str(run), own["out"], in_data=in_data, overrides=overrides, **options)
        ood_record.write_tables(folder, result)
        ood_record.keep(folder, result, draw(folder, result), command, of)
        if given.get("json"):
            print(as_text(as_json(result, folder)))
        else:
            show(ood_record.table_of(result), "")
            for sentence in ood_record.sentences(result):
                print(f"- {sentence}")
            print(f"written to {folder}")
        page = write_page(run)
    if given.get("open") and page is not None:
        open_page(page)


def draw(folder: Path, result: Any) -> tuple[Any, ...]:
    from fastcnn.insight.ood import ood_record

    try:
        require("matplotlib.figure")
        return ood_record.draw(folder, result)
    except PackageError as error:
        report_missing("figures", error)
        return ()


def write_page(folder: Path) -> Path | None:
    from fastcnn.insight.run_page import page

    try:
        require("jinja2")
        return page.write_page(folder)
    except PackageError as error:
        report_missing("index.html", error)
        return None


def as_json(result: Any, folder: Path) -> dict[str, Any]:
    from fastcnn.insight.ood.ood_record import plain_rows

    return {
        "best": result.best,
        "shown": result.shown,
        "scores": plain_rows(result),
        "words": result.words,
        "folder": str(folder),
    }
