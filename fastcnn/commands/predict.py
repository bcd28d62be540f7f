"""`fastcnn predict`: the classes of a user's images."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

from fastcnn.commands.parser import (
    WEIGHTS,
    Parser,
    add_debug,
    add_options,
    new_parser,
    own_option,
    read_values,
    shared_options,
)
from fastcnn.errors import DataError, UsageError
from fastcnn.files import growing
from fastcnn.text import shown

PREDICT_OWN = (
    own_option("top", int, 5, "how many classes of each image, the most probable first", low=1),
    own_option("format", Literal["table", "json", "csv"], "table", "of the result"),
    own_option("output", str | None, None, "file of the result; default: standard output"),
    own_option("batch_size", int, 256, "images the network is given at a time", low=1),
    WEIGHTS,
)

PREDICT_SHARED = ("test_flip", "device", "backend", "conv", "amp", "amp_dtype", "threads")


def parser() -> Parser:
    found = new_parser(
        "predict",
        "Tell the classes of images of any size. Unreadable ones are named on standard error, the "
        "others go on; the exit code is then 3.",
        "RUN IMAGES... ",
    )
    found.add_argument("run", type=str, help="run folder or checkpoint file")
    found.add_argument(
        "images",
        type=str,
        nargs="+",
        help="files; folders, for all image files in them; -: paths from standard input, one a "
        "line or separated by NUL",
    )
    add_options(found, PREDICT_OWN)
    add_options(found, shared_options(PREDICT_SHARED), defaults=False)
    found.add_argument("--quiet", action="store_true", help="print nothing but the result")
    add_debug(found)
    return found


def run(given: dict[str, Any], command: list[str]) -> None:
    own = {option.name: option.default for option in PREDICT_OWN} | read_values(given, PREDICT_OWN)
    options = read_values(given, shared_options(PREDICT_SHARED))

    from fastcnn.predict.classifier import open_classifier
    from fastcnn.predict.paths import image_paths
    from fastcnn.train.host import tune_process

    paths = image_paths(given["images"], sys.stdin.buffer)
    if not paths:
        raise DataError("standard input: no paths of images; give one a line")
    if own["output"] is not None:
        check_output(Path(own["output"]), given["run"], paths)
    tune_process(options.get("threads"))
    classifier = open_classifier(given["run"], own["weights"], options)
    start = time.perf_counter()
    with opened(own["output"]) as file:
        bad = write_predictions(classifier, paths, file, own)
    seconds, good = time.perf_counter() - start, len(paths) - bad
    if not given.get("quiet"):
        rate = good / max(seconds, 1e-9)
        print(
            f"{good:,} images in {seconds:,.2f} s, {rate:,.0f} images/s, decoding included",
            file=sys.stderr,
        )
    if bad:
        raise DataError(f"{bad:,} of {len(paths):,} could not be read; they are named above")


@contextlib.contextmanager
def opened(path: str | None) -> Iterator[TextIO]:
    """What to write to. A path that is not UTF-8 keeps its bytes."""
    if path is None:
        with contextlib.suppress(AttributeError):
            sys.stdout.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        yield sys.stdout
        return
    with growing(Path(path)) as file:
        yield file


def check_output(path: Path, run: str, images: list[str]) -> None:
    """Raise UsageError for a place where nothing can be written, and for one where something lies
    that is read here or that belongs to a run."""
    from fastcnn.train.rundir import check_no_file_of_a_run

    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise UsageError(f"--output {path}: is a folder; give a file name")
    check_no_file_of_a_run(path)
    if not path.is_file():
        return
    if os.path.isfile(run) and path.samefile(run):
        raise UsageError(f"--output {path}: is the checkpoint itself; give another file")
    for image in images:
        if os.path.isfile(image) and path.samefile(image):
            raise UsageError(f"--output {path}: is one of the images; give another file")


def write_predictions(classifier: Any, paths: list[str], file: TextIO, own: dict[str, Any]) -> int:
    """Write the predictions of all images that can be read; return how many cannot."""
    from fastcnn.predict.classifier import most_probable
    from fastcnn.predict.feed import batches
    from fastcnn.predict.rows import FORMATS

    classes, bad = classifier.trained.classes, 0
    top = min(own["top"], len(classes))

    def report(path: str, reason: str) -> None:
        nonlocal bad
        bad += 1
        print(f"{shown(path)}: {reason}", file=sys.stderr, flush=True)
        advance(1)

    with (
        FORMATS[own["format"]](file.write, classes, top, paths) as row,
        followed(file, len(paths)) as advance,
    ):
        for names, pixels in batches(paths, classifier.view, own["batch_size"], report):
            found = classifier(pixels)
            order = most_probable(found, top)
            for path, chosen, values in zip(names, order, found, strict=True):
                row(path or "", [(classes[c], float(values[c])) for c in chosen])
            file.flush()
            advance(len(pixels))
    return bad


def followed(file: TextIO, images: int) -> Any:
    """A bar of the images done, unless the result itself runs over the terminal."""
    from fastcnn.data.progress import progress_bar

    if file.isatty():
        return contextlib.nullcontext(lambda step: None)
    return progress_bar("predicting", images, announce=False)
