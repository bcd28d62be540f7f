"""index.html of a run: what it reached and how, in one file without links to anything else."""

import base64
import json
import shlex
from pathlib import Path
from typing import Any

import yaml

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem 1rem .2rem 0; border-bottom: 1px solid #8884; }
th { font-weight: 600; } code { overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ lead }}</p>
<p><code>{{ command }}</code></p>
{% for figure in figures %}
<h2>{{ figure.title }}</h2>
<img src="data:image/png;base64,{{ figure.data }}" alt="{{ figure.alt }}">
{% endfor %}
{% for table in tables %}
<h2>{{ table.title }}</h2>
<div class="scroll"><table>
{% for name, value in table.rows %}<tr><th scope="row">{{ name }}</th><td>{{ value }}</td></tr>
{% endfor %}</table></div>
{% endfor %}
</body>
</html>
"""


def write_page(folder: Path) -> Path:
    """Write index.html from summary.json, config.yaml, environment.json and the PNG figures."""
    import jinja2

    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    template = jinja2.Environment(autoescape=True).from_string(TEMPLATE)
    text = template.render(
        title=f"{folder.name}: {summary['arch']} on {summary['data']}",
        lead=lead(summary),
        command=shlex.join(environment["command"]),
        figures=_figures(folder),
        tables=[
            {"title": "Summary", "rows": _flat(summary)},
            {"title": "Configuration", "rows": _flat(options)},
            {"title": "Environment", "rows": _flat(environment)},
        ],
    )
    path = folder / "index.html"
    path.write_text(text, encoding="utf-8")
    return path


def lead(summary: dict[str, Any]) -> str:
    """One sentence: accuracy, effort, device."""
    flipped = ", each image seen both ways," if summary.get("test_flip") else ""
    epochs = "1 epoch" if summary["epochs"] == 1 else f"{summary['epochs']} epochs"
    return (
        f"Test top-1 {summary['test_top1']:.2%}, top-5 {summary['test_top5']:.2%}{flipped} after "
        f"{epochs} and {summary['train_seconds']:,.0f} s "
        f"({summary['images_per_s']:,.0f} images/s) on {summary['device']}."
    )


def _figures(folder: Path) -> list[dict[str, str]]:
    wanted = (
        ("curves.png", "Curves", "Loss, accuracy and learning rate over the epochs"),
        ("confusion_matrix.png", "Confusion matrix", "Share of each true class by predicted class"),
    )
    return [
        {"title": title, "alt": alt, "data": base64.b64encode(path.read_bytes()).decode()}
        for path, title, alt in ((folder / name, title, alt) for name, title, alt in wanted)
        if path.is_file()
    ]


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mappings as dotted names, lists as words."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name}.")
        else:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            rows.append((prefix + name, "" if shown is None else shown))
    return rows
