"""What a study came to, as one record: kept as JSON, shown on the terminal, as Markdown, CSV, HTML.

A record holds texts as they are read; the plain numbers are in the CSV files beside it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fastcnn.errors import CheckpointError
from fastcnn.files import inside, load_json, replace_text
from fastcnn.insight.html.table import Table, as_csv, markdown, pairs, text, texts
from fastcnn.text import first_line

FORMAT = 1


@dataclass(frozen=True)
class Drawing:
    """A figure by the name of its file, without .png or .svg, what it shows, and its title."""

    name: str
    alt: str
    title: str


@dataclass(frozen=True)
class Record:
    """One experiment or sweep. facts: name and value of command, machine, date and the like;
    sentences: what the figures say; notes: what a reader must know of them."""

    key: str
    title: str
    lead: str
    facts: tuple[tuple[str, str], ...]
    table: Table
    sentences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    drawings: tuple[Drawing, ...] = ()


def write(
    record: Record,
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
) -> list[Path]:
    """Write <key>.json, <key>.md, <key>.csv (rows) and <key>-runs.csv (each run) into `folder`.

    Raises CheckpointError where the disk refuses; what was there stays.
    """
    contents = {
        f"{record.key}.json": json.dumps(_plain(record), indent=1, ensure_ascii=False) + "\n",
        f"{record.key}.md": as_markdown(record),
        f"{record.key}.csv": as_csv(rows),
        f"{record.key}-runs.csv": as_csv(runs),
    }
    return [replace_text(folder / name, text) for name, text in contents.items()]


def read(path: Path) -> Record:
    """The record in a JSON file; raises CheckpointError if it is none."""
    try:
        found = load_json(inside(path.parent, path.name))
        if found["format"] != FORMAT:
            raise ValueError("another format")
        return Record(
            **{name: text(found[name]) for name in ("key", "title", "lead")},
            facts=pairs(found["facts"]),
            table=Table.from_plain(found["table"]),
            sentences=texts(found["sentences"]),
            notes=texts(found["notes"]),
            drawings=tuple(_drawing(path.parent, drawing) for drawing in found["drawings"]),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a record of this program ({first_line(error)}); remove it"
        ) from error


def _drawing(folder: Path, plain: dict[str, str]) -> Drawing:
    drawing = Drawing(**{name: text(told) for name, told in plain.items()})
    inside(folder, f"{drawing.name}.png")  # a page holds what the file holds
    return drawing


def _plain(record: Record) -> dict[str, Any]:
    plain = asdict(replace(record, table=Table((), ())))
    table = record.table
    plain["table"] = {
        "header": table.header,
        "rows": table.rows,
        "numbers": sorted(table.numbers),
    }
    return {"format": FORMAT, **plain}


def as_markdown(record: Record) -> str:
    """The record as a section of Markdown; figures are PNG files beside it."""
    facts = "".join(f"- {name}: {_code(name, value)}\n" for name, value in record.facts)
    parts = [f"## {record.title}\n", f"{record.lead}\n", facts, markdown(record.table)]
    for lines in (record.sentences, record.notes):
        if lines:
            parts.append("".join(f"- {line}\n" for line in lines))
    parts += [f"![{drawing.alt}]({drawing.name}.png)\n" for drawing in record.drawings]
    return "\n".join(parts)


def _code(name: str, value: str) -> str:
    return f"`{value}`" if name == "command" else value
