"""One HTML page: tables, sentences, charts and figures in a file without links to anything else.

Texts are texts: nothing in them is taken for HTML. How a page looks stands in template/.
"""

import base64
from dataclasses import dataclass
from pathlib import Path

from fastcnn.errors import CheckpointError
from fastcnn.files import inside, replace_text
from fastcnn.insight.html.chart import Chart
from fastcnn.insight.html.table import Table

TEMPLATES = Path(__file__).with_name("template")
Facts = tuple[tuple[str, str], ...]  # names and values


@dataclass(frozen=True)
class Figure:
    """A PNG file, what it shows to who cannot see it, and the line below it."""

    path: Path
    alt: str
    caption: str

    @property
    def data(self) -> str:
        whole = inside(self.path.parent, self.path.name)  # no link put in its place meanwhile
        return base64.b64encode(whole.read_bytes()).decode()


@dataclass(frozen=True)
class Section:
    """A part of a page. anchor: its name within the page; facts: such as the command, the machine,
    the date; numbers: the few that a reader looks for; folded: facts that are shown on demand,
    below a title."""

    title: str
    anchor: str
    paragraphs: tuple[str, ...]
    table: Table
    sentences: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    facts: Facts = ()
    charts: tuple[Chart, ...] = ()
    numbers: Facts = ()
    folded: tuple[tuple[str, Facts], ...] = ()


@dataclass(frozen=True)
class Page:
    """title, lead and the command that made it (or several, a line each), then sections; with
    several, a list of them comes first. wide: for a table of many columns."""

    title: str
    lead: str
    sections: tuple[Section, ...]
    command: str = ""
    wide: bool = False

    @property
    def has_charts(self) -> bool:
        return any(section.charts for section in self.sections)


def write_page(path: Path, page: Page) -> Path:
    """Write the page, whole or not at all; raises CheckpointError where the disk refuses."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    try:
        text = environment.get_template("page.html").render(page=page)
    except (OSError, ValueError) as error:  # a figure that has gone meanwhile
        raise CheckpointError(f"cannot write {path}: {error}") from error
    # a file's name in a command may be no text at all
    return replace_text(path, text.encode("utf-8", "replace").decode())
