"""Sections of a page in a file, so that a later page can have them again.

A command that looks into a run writes its figures, and <key>.json beside them, into a folder of the
run; the run's page takes what it finds there.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcnn.errors import CheckpointError
from fastcnn.files import inside, load_json, replace_text
from fastcnn.insight.html.document import Figure, Section
from fastcnn.insight.html.table import Table, pairs, text, texts
from fastcnn.text import first_line

FORMAT = 1


def save_sections(folder: Path, key: str, sections: list[Section], of: Sequence[str] = ()) -> Path:
    """Write <key>.json; the sections' figures are files of `folder`. Charts, numbers and folded
    facts are not kept. of: which data they tell of.

    Raises CheckpointError where the disk refuses; what was there stays.
    """
    plain = [_plain(section) for section in sections]
    content = {"format": FORMAT, "of": [*of], "sections": plain}
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return replace_text(folder / f"{key}.json", text)


def saved_sections(folder: Path, key: str) -> list[Section]:
    """The sections that <key>.json holds, without figures whose files were taken away; none where
    there is no such file. Raises CheckpointError where it is not what `save_sections` wrote."""
    path = folder / f"{key}.json"
    if not path.is_file():
        return []
    try:
        content = load_json(inside(folder, path.name))
        if content["format"] != FORMAT:
            raise ValueError("another format")
        return [_section(plain, folder) for plain in content["sections"]]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not what fastcnn wrote ({first_line(error)}); remove it"
        ) from error


def kept_of(folder: Path, key: str) -> list[str] | None:
    """Which data <key>.json tells of; None where it does not say, or is not there."""
    try:
        return load_json(folder / f"{key}.json")["of"] or None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _plain(section: Section) -> dict[str, Any]:
    table = section.table
    return {
        "title": section.title,
        "anchor": section.anchor,
        "paragraphs": section.paragraphs,
        "table": {"header": table.header, "rows": table.rows, "numbers": sorted(table.numbers)},
        "sentences": section.sentences,
        "figures": [[figure.path.name, figure.alt, figure.caption] for figure in section.figures],
        "facts": section.facts,
    }


def _section(plain: dict[str, Any], folder: Path) -> Section:
    told = [texts(figure, 3) for figure in plain["figures"]]
    figures = [Figure(inside(folder, name), alt, caption) for name, alt, caption in told]
    return Section(
        text(plain["title"]),
        text(plain["anchor"]),
        texts(plain["paragraphs"]),
        Table.from_plain(plain["table"]),
        texts(plain["sentences"]),
        tuple(figure for figure in figures if figure.path.is_file()),
        pairs(plain["facts"]),
    )
