"""One HTML page of a study: tables, verdicts and figures in a file without links to anything else.

Texts are texts: nothing in them is taken for HTML.
"""

import base64
from dataclasses import dataclass
from pathlib import Path

from fastcnn.study.record import replace_text
from fastcnn.study.table import Table

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
:root { color-scheme: light dark; --line: #8885; --quiet: #667; --stripe: #8881; }
@media (prefers-color-scheme: dark) { :root { --quiet: #aab; } }
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
h1, h2, p, li, figcaption { overflow-wrap: anywhere; }
.quiet, figcaption { color: var(--quiet); font-size: .875rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); }
th, td { white-space: nowrap; }
.number { text-align: right; }
tbody tr:nth-child(odd) { background: var(--stripe); }
figure { margin: 1.5rem 0; }
figure .scroll img { min-width: 36rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
ul { padding-left: 1.2rem; }
@media print {
  body { max-width: none; } .scroll { overflow: visible; } figure { break-inside: avoid; }
}
</style>
</head>
<body>
<h1>{{ page.title }}</h1>
<p>{{ page.lead }}</p>
{% if page.sections|length > 1 %}
<nav><ul>
{% for section in page.sections %}<li><a href="#{{ section.anchor }}">{{ section.title }}</a></li>
{% endfor %}</ul></nav>
{% endif %}
{% macro aligned(section, place) -%}
{% if place in section.table.numbers %} class="number"{% endif %}
{%- endmacro %}
{% for section in page.sections %}
<section id="{{ section.anchor }}">
<h2>{{ section.title }}</h2>
{% for paragraph in section.paragraphs %}<p>{{ paragraph }}</p>
{% endfor %}
{% if section.table.rows %}
<div class="scroll" role="region" aria-label="{{ section.title }}" tabindex="0"><table>
<thead><tr>{% for name in section.table.header -%}
<th scope="col"{{ aligned(section, loop.index0) }}>{{ name }}</th>
{%- endfor %}</tr></thead>
<tbody>
{% for row in section.table.rows %}<tr>{% for cell in row -%}
{% if loop.first %}<th scope="row">{{ cell }}</th>
{%- else %}<td{{ aligned(section, loop.index0) }}>{{ cell }}</td>
{%- endif %}{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
{% endif %}
{% if section.sentences %}
<ul>
{% for sentence in section.sentences %}<li>{{ sentence }}</li>
{% endfor %}</ul>
{% endif %}
{% for figure in section.figures %}
<figure><div class="scroll" role="region" aria-label="{{ figure.alt }}" tabindex="0">
<img src="data:image/png;base64,{{ figure.data }}" alt="{{ figure.alt }}"></div>
<figcaption>{{ figure.caption }}</figcaption></figure>
{% endfor %}
<p class="quiet">{% for fact in section.facts %}{{ fact }}{% if not loop.last %} · {% endif %}
{%- endfor %}</p>
</section>
{% endfor %}
</body>
</html>
"""


@dataclass(frozen=True)
class Figure:
    """A PNG file, what it shows to who cannot see it, and the line below it."""

    path: Path
    alt: str
    caption: str

    @property
    def data(self) -> str:
        return base64.b64encode(self.path.read_bytes()).decode()


@dataclass(frozen=True)
class Section:
    """A part of a page. anchor: its name within the page; facts: what small print says of it."""

    title: str
    anchor: str
    paragraphs: tuple[str, ...]
    table: Table
    sentences: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Page:
    """title and lead, then sections; with several, a list of them comes first."""

    title: str
    lead: str
    sections: tuple[Section, ...]


def write_page(path: Path, page: Page) -> Path:
    """Write the page; raises CheckpointError where the disk refuses."""
    import jinja2

    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    return replace_text(path, template.render(page=page))
