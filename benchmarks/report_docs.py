"""Bring what `fastcnn reproduce` wrote into docs/reports: sections between markers, and figures.

    python benchmarks/report_docs.py reproductions

docs/reports/<report>.md marks where an experiment's section goes, and of which scale:

    <!-- table1 full -->
    <!-- end of table1 full -->

Whatever stands between is replaced by <output>/<report>/<scale>/<experiment>.md, its figures are
copied to docs/reports/figures. What stands outside is written by hand. A marker without its section
in the output is left as it is.
"""

import re
import shutil
import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent / "docs" / "reports"
MARKER = re.compile(
    r"<!-- (?P<key>[\w-]+) (?P<scale>[\w.-]+) -->\n.*?<!-- end of (?P=key) (?P=scale) -->",
    re.DOTALL,
)
IMAGE = re.compile(r"\]\((?P<name>[^)/]+\.png)\)")


def main(words: list[str]) -> int:
    if len(words) != 1 or not Path(words[0]).is_dir():
        print("report_docs: give the folder that fastcnn reproduce --output wrote", file=sys.stderr)
        return 2
    for document in sorted(DOCS.glob("*.md")):
        written = update(document, Path(words[0]))
        print(f"{document.name}: {', '.join(written) or 'nothing new'}")
    return 0


def update(document: Path, output: Path) -> list[str]:
    """Replace the document's sections; return those that there were, as in their markers."""
    written: list[str] = []

    def section(found: re.Match) -> str:
        key, scale = found["key"], found["scale"]
        source = output / document.stem / scale / f"{key}.md"
        if not source.is_file():
            return found[0]
        written.append(f"{key} {scale}")
        text = with_figures(source, f"{document.stem}-{scale}-", document.parent / "figures")
        return f"<!-- {key} {scale} -->\n{text}<!-- end of {key} {scale} -->"

    document.write_text(MARKER.sub(section, document.read_text(encoding="utf-8")), encoding="utf-8")
    return written


def with_figures(source: Path, prefix: str, figures: Path) -> str:
    """The text of a section, and its figures copied under names of their own."""
    figures.mkdir(exist_ok=True)

    def link(found: re.Match) -> str:
        name = prefix + found["name"]
        shutil.copyfile(source.parent / found["name"], figures / name)
        return f"](figures/{name})"

    return IMAGE.sub(link, source.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
