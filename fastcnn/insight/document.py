"""One HTML page: tables, sentences and figures in a file without links to anything else.

Texts are texts: nothing in them is taken for HTML.
"""

import base64
from dataclasses import dataclass
from pathlib import Path

from fastcnn.insight.table import Table
from fastcnn.train.rundir import replace_text

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ page.title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1f2430; --soft: #5b6475; --rule: #d5d9e0;
  --ground: #fff; --stripe: #f5f6f8; --link: #1f5fa8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ec; --soft: #a3abb9; --rule: #3a4150;
  --ground: #14171d; --stripe: #1b1f27; --link: #7fb2ea; } img { filter: brightness(.88); } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 60rem; margin: 0 auto; padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 3rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--rule); }
p, ul { max-width: 44rem; margin: .6rem 0; } ul { padding-left: 1.2rem; } li { margin: .25rem 0; }
.lead { font-size: 1.1rem; color: var(--soft); } a { color: var(--link); }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) minmax(0, 1fr);
  gap: .2rem 1rem; margin: 1rem 0; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; white-space: pre-wrap; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem .4rem;
  border-bottom: 1px solid var(--rule); }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--rule); }
tbody th { font-weight: 400; min-width: 7rem; max-width: 20rem; overflow-wrap: break-word; }
td:not(.number) { min-width: 8rem; }
tbody tr:nth-child(even) > * { background: var(--stripe); }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1.5rem 0; } figure .scroll { margin: .5rem 0; }
figcaption { font-size: .9rem; color: var(--soft); max-width: 44rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px;
  padding: .4rem; }
@media screen and (max-width: 40rem) { figure img { width: 40rem; max-width: none; } }
@media print { :root { --ink: #000; --soft: #444; --rule: #bbb; --ground: #fff; --stripe: #fff;
  --link: #000; } body { font-size: 10.5pt; max-width: none; padding: 0; }
  .scroll { overflow: visible; } table { font-size: 8.5pt; } nav { display: none; }
  img { filter: none; padding: 0; } h2 { break-after: avoid; }
  figure, tr { break-inside: avoid; } }
</style>
</head>
<body>
<header>
<h1>{{ page.title }}</h1>
<p class="lead">{{ page.lead }}</p>
</header>
{% if page.sections|length > 1 %}
<nav aria-label="Contents"><ul>
{% for section in page.sections %}<li><a href="#{{ section.anchor }}">{{ section.title }}</a></li>
{% endfor %}</ul></nav>
{% endif %}
{% macro aligned(section, place) -%}
{% if place in section.table.numbers %} class="number"{% endif %}
{%- endmacro %}
<main>
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
<dl>
{% for name, value in section.facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl>
</section>
{% endfor %}
</main>
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
    """A part of a page. anchor: its name within the page; facts: names and values, such as the
    command, the machine, the date."""

    title: str
    anchor: str
    paragraphs: tuple[str, ...]
    table: Table
    sentences: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


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
