"""A study's record: kept and read again, as Markdown, CSV and on a page."""

import csv
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from mutations import mutated
from PIL import Image

from fastcnn.errors import CheckpointError
from fastcnn.insight.html.document import Figure, Page, Section, write_page
from fastcnn.insight.html.table import Table, as_csv, markdown, show
from fastcnn.study.pages import write_pages
from fastcnn.study.record import Drawing, Record, as_markdown, read, write

TABLE = Table(
    ("row", "top-1, %", "verdict"),
    (("a | b", "59.3", "inside"), ("<script>alert(1)</script>", "7.0", "")),
    frozenset((1,)),
)
RECORD = Record(
    "table1",
    "Study & more",
    "At scale 0.1.",
    (("command", "fastcnn reproduce x --scale 0.1"), ("machine", "cpu")),
    TABLE,
    ("A beats B: holds",),
    ("A note.",),
    (Drawing("table1-top1", 'Bars of "a" & <b>', "Top-1"),),
)


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (900, 300), "white").save(tmp_path / "table1-top1.png")
    write(RECORD, tmp_path, [{"row": "a", "mean": 59.3, "std": None}], [{"seed": 0}])
    return tmp_path


def test_a_record_is_read_as_it_was_written(folder):
    assert read(folder / "table1.json") == RECORD
    assert sorted(path.name for path in folder.iterdir()) == [
        "table1-runs.csv",
        "table1-top1.png",
        "table1.csv",
        "table1.json",
        "table1.md",
    ]


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"format": 2}', '{"format": 1, "key": 3}'])
def test_a_file_that_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=r"x.json is not a record .*; remove it"):
        read(path)


def test_a_link_is_no_record(folder):
    """A page would show what it leads to."""
    (folder / "other.json").symlink_to(folder / "table1.json")
    with pytest.raises(CheckpointError, match=r"other\.json is not a record .* no file of"):
        read(folder / "other.json")


def test_a_value_of_another_kind_is_refused_or_shown(folder):
    path = folder / "table1.json"
    refused, shown = [], 0
    for content in mutated(json.loads(path.read_text())):
        path.write_text(json.dumps(content))
        try:
            found = read(path)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            as_markdown(found)
            write_pages(folder, "title", "lead")
            shown += 1
    assert len(refused) > 200
    assert all("table1.json is not a record" in line for line in refused)
    assert 10 < shown < 100


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "link"])
def test_a_record_names_no_figure_outside_its_folder(folder, name):
    (folder.parent / "secret.png").write_bytes(b"secret")
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    path = folder / "table1.json"
    plain = json.loads(path.read_text())
    plain["drawings"][0]["name"] = name
    path.write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"table1\.json is not a record .* no file of"):
        read(path)


def test_markdown_has_a_line_a_row_and_escapes_its_own_signs():
    lines = markdown(TABLE).splitlines()
    assert lines[0] == "| row | top-1, % | verdict |"
    assert lines[1] == "| --- | ---: | --- |"
    assert lines[2] == r"| a \| b | 59.3 | inside |"
    text = as_markdown(RECORD)
    assert "## Study & more" in text
    assert "- command: `fastcnn reproduce x --scale 0.1`" in text
    assert '![Bars of "a" & <b>](table1-top1.png)' in text


def test_csv_keeps_every_value():
    text = as_csv([{"row": "a, b", "mean": 1.5, "std": None}, {"row": '"', "mean": 2, "std": 3}])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert rows == [
        {"row": "a, b", "mean": "1.5", "std": ""},
        {"row": '"', "mean": "2", "std": "3"},
    ]
    assert as_csv([]) == "\n"


def test_the_terminal_shows_cells_as_they_are(capsys):
    table = Table(("row",), (("[bold]x[/bold]",), ("y" * 300,)))
    show(table, "Title [red]")
    out = capsys.readouterr().out
    assert "Title [red]" in out
    assert "[bold]x[/bold]" in out
    assert "y" * 300 in out


def test_empty_columns_are_left_out():
    table = Table(("a", "b", "c"), (("1", "", "2"), ("", "", "3")), frozenset((1, 2)))
    assert table.without_empty() == Table(("a", "c"), (("1", "2"), ("", "3")), frozenset((1,)))


class Seen(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def test_the_page_holds_everything_and_takes_no_text_for_html(folder):
    text = write_pages(folder, "report: <title>", "lead & more").read_text()
    seen = Seen(text)
    said = "".join(seen.texts)
    texts = ("report: <title>", "lead & more", "<script>alert(1)</script>", "A beats B: holds")
    facts = ("A note.", "fastcnn reproduce x --scale 0.1", "At scale 0.1.")
    assert all(words in said for words in texts + facts)
    names = [tag for tag, _ in seen.tags]
    assert "script" not in names
    assert "link" not in names
    [image] = [attributes for tag, attributes in seen.tags if tag == "img"]
    assert image["src"].startswith("data:image/png;base64,")
    assert image["alt"] == 'Bars of "a" & <b>'
    assert "http" not in text
    cells = [attributes for tag, attributes in seen.tags if tag == "td"]
    assert cells[0].get("class") == "number"
    assert cells[1].get("class") is None


def test_several_sections_have_a_list_of_contents(tmp_path):
    sections = tuple(Section(name, name.lower(), (), Table((), ())) for name in ("One", "Two"))
    seen = Seen(write_page(tmp_path / "x.html", Page("t", "l", sections)).read_text())
    links = [attributes["href"] for tag, attributes in seen.tags if tag == "a"]
    ids = [attributes["id"] for _, attributes in seen.tags if "id" in attributes]
    assert links == ["#one", "#two"]
    assert ids == ["one", "two"]
    alone = Seen(write_page(tmp_path / "y.html", Page("t", "l", sections[:1])).read_text())
    assert "nav" not in [tag for tag, _ in alone.tags]


def test_a_figure_that_was_taken_away_is_left_out(folder):
    (folder / "table1-top1.png").unlink()
    assert "<img" not in write_pages(folder, "t", "l").read_text()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_phone_scrolls_the_page_in_one_direction(tmp_path):
    """In a browser: the page is no wider than the window, though table and figure are."""
    png = tmp_path / "wide.png"
    Image.new("RGB", (1200, 300), "white").save(png)
    table = Table(tuple(f"column {i}" for i in range(20)), (("cell",) * 20,))
    section = Section("x" * 80, "x", ("y" * 200,), table, ("z" * 300,), (Figure(png, "a", "b"),))
    path = write_page(tmp_path / "page.html", Page("t" * 120, "l", (section,)))
    text = path.read_text()
    probe = "const page = document.documentElement; document.title = [page.clientWidth, "
    probe += "page.scrollWidth, document.querySelector('table').scrollWidth]"
    path.write_text(text.replace("</body>", f"<script>{probe}</script></body>"))
    words = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=390,900", "--dump-dom"]
    shown = subprocess.run(
        ["chromium", *words, f"file://{path}"], capture_output=True, text=True, timeout=120
    )
    title = re.search("<title>(.*)</title>", shown.stdout)[1]
    window, page, wide = map(int, title.split(","))
    assert window <= 500  # which some versions take for the least
    assert page == window < wide
