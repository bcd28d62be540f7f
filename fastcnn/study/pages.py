"""One HTML page of all records in a folder."""

from collections.abc import Sequence
from pathlib import Path

from fastcnn.insight.html.document import Figure, Page, Section, write_page
from fastcnn.study.record import Record, read


def write_pages(folder: Path, title: str, lead: str, order: Sequence[str] = ()) -> Path:
    """Write index.html: a section for each record (<key>.json) in `folder`, those of `order` first.

    Raises CheckpointError for a file that is no record.
    """
    places = {key: place for place, key in enumerate(order)}
    paths = sorted(folder.glob("*.json"), key=lambda p: (places.get(p.stem, len(places)), p.stem))
    records = [read(path) for path in paths]
    sections = tuple(_section(record, folder) for record in records)
    return write_page(folder / "index.html", Page(title, lead, sections))


def _section(record: Record, folder: Path) -> Section:
    figures = [
        Figure(folder / f"{drawing.name}.png", drawing.alt, drawing.title)
        for drawing in record.drawings
    ]
    return Section(
        record.title,
        record.key,
        (record.lead, *record.notes),
        record.table,
        record.sentences,
        # a figure whose file was taken away is left out
        tuple(figure for figure in figures if figure.path.is_file()),
        record.facts,
    )
