"""Predictions as a table for people, as JSON and as CSV, written as they come.

Each format is a context: entered with `write`, the classes' names, the number of predictions an
image and the paths; it gives a function that writes the row of one image, and on leaving, by an
error too, it writes what makes the whole valid.
"""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from fastcnn.text import shown

Write = Callable[[str], Any]
Predictions = Sequence[tuple[str, float]]  # class and probability, the most probable first
Row = Callable[[str, Predictions], None]

WIDEST_PATH = 60  # cells of the first column that other rows are aligned to


@contextmanager
def as_json(write: Write, classes: Sequence[str], top: int, paths: Sequence[str]) -> Iterator[Row]:
    """An array, a line an image: {"path", "predictions": [{"class", "probability"}, …]}."""
    before = "[\n"

    def row(path: str, predictions: Predictions) -> None:
        nonlocal before
        told = [{"class": name, "probability": rounded(value)} for name, value in predictions]
        write(before + json_text({"path": path, "predictions": told}))
        before = ",\n"

    try:
        yield row
    finally:
        write("[]\n" if before == "[\n" else "\n]\n")


@contextmanager
def as_csv(write: Write, classes: Sequence[str], top: int, paths: Sequence[str]) -> Iterator[Row]:
    """A row an image and rank: path, rank (from 1), class, probability."""
    writer = csv.writer(SimpleNamespace(write=write), lineterminator="\n")
    writer.writerow(("path", "rank", "class", "probability"))

    def row(path: str, predictions: Predictions) -> None:
        writer.writerows(
            (path, rank, name, rounded(value)) for rank, (name, value) in enumerate(predictions, 1)
        )

    yield row


@contextmanager
def as_table(write: Write, classes: Sequence[str], top: int, paths: Sequence[str]) -> Iterator[Row]:
    """A line an image: its path, then each class with its probability."""
    from rich.cells import cell_len

    def line(first: str, cells: Sequence[tuple[str, str]]) -> None:
        parts = [first + " " * (path_width - cell_len(first))]
        for name, value in cells:
            parts.append(f"{name}{' ' * (class_width - cell_len(name))} {value:>6}")
        write("  ".join(parts).rstrip() + "\n")

    path_width = min(WIDEST_PATH, max((cell_len(shown(path)) for path in paths), default=0))
    path_width = max(path_width, len("image"))
    class_width = max(len("top 1"), *(cell_len(shown(name)) for name in classes))
    line("image", [(f"top {rank}", "") for rank in range(1, top + 1)])

    def row(path: str, predictions: Predictions) -> None:
        line(shown(path), [(shown(name), f"{value:.1%}") for name, value in predictions])

    yield row


FORMATS = {"table": as_table, "json": as_json, "csv": as_csv}


def rounded(probability: float) -> float:
    """The seven digits that a fp32 number has."""
    return float(f"{probability:.7g}")


def json_text(content: Any) -> str:
    """JSON in one line; a path whose bytes are not UTF-8 can only be told in escapes."""
    text = json.dumps(content, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(content)
    return text
