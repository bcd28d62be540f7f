"""`fastcnn analyze`: figures and tables of what a trained network does, and of what it looks at."""

from pathlib import Path
from typing import Any

from fastcnn.commands.evaluate import EVAL_OWN, EVAL_SHARED
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
    shared_options,
)
from fastcnn.packages import require
from fastcnn.text import shown

ANALYZE_OWN = (
    *EVAL_OWN,
    own_option(
        "layer",
        str | None,
        None,
        "what Grad-CAM shows: a layer or an operation of `fastcnn archs NAME`; default: the last "
        "operation with more than one pixel",
    ),
    own_option(
        "maps",
        list[str],
        None,
        "layers or operations to draw feature maps of; default: the first two convolutions",
    ),
    own_option("samples", int, 20, "images in a grid", 1),
    own_option("seed", int, 0, "which images are drawn at random", 0),
)
# who computes a convolution changes nothing that is looked at
ANALYZE_SHARED = tuple(name for name in EVAL_SHARED if name != "conv")
CONFUSIONS_PRINTED = 5


def parser() -> Parser:
    found = new_parser(
        "analyze",
        "Look inside a finished run: confusions, F1 of the classes, calibration, right and wrong "
        "predictions, Grad-CAM, feature maps, filters. Writes RUN/analysis and the run's page.",
        "RUN ",
    )
    found.add_argument("run", type=str, help="run folder")
    add_options(found, ANALYZE_OWN)
    add_options(found, shared_options(ANALYZE_SHARED), defaults=False)
    add_json(found)
    add_open(found)
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    own = read_values(given, ANALYZE_OWN)
    shared = read_values(given, shared_options(ANALYZE_SHARED))
    require("matplotlib.figure", "jinja2")
    # after the check: the rest takes torch's seconds to import
    from fastcnn.insight.analysis.analyze import analyze

    result = analyze(
        given["run"],
        own.get("data"),
        own.get("split", "test"),
        own.get("weights"),
        layer=own.get("layer"),
        maps=own.get("maps"),
        samples=own.get("samples", 20),
        seed=own.get("seed", 0),
        overrides=shared,
        command=command,
    )
    print(as_text(result) if given.get("json") else result_text(result))
    if given.get("open"):
        open_page(Path(result["page"]))


def result_text(result: dict[str, Any]) -> str:
    """The main figures and where the files are, in lines."""
    lines = [
        f"{result['arch']} ({result['checkpoint']}) on {shown(result['data'])} {result['split']}, "
        f"{result['images']:,} images",
        f"accuracy {result['top1']:.2%}, macro F1 {result['macro_f1']:.4f}, "
        f"ECE {result['ece']:.4f} (mean confidence {result['confidence']:.2%})",
    ]
    for pair in result["confusions"][:CONFUSIONS_PRINTED]:
        lines.append(
            f"  {shown(pair['true'])} predicted as {shown(pair['predicted'])}: "
            f"{pair['images']:,} images, {pair['share']:.1%} of {shown(pair['true'])}"
        )
    lines.append(f"Grad-CAM of {result['grad_cam']}")
    lines.append(f"{len(result['files'])} figures and tables in {result['folder']}")
    lines.append(f"page {result['page']}")
    return "\n".join(lines)
