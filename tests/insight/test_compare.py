"""`fastcnn compare`: table, page, what is compared with what; `--open`."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from browser import look, needs_browser
from run_folders import make_run, rows

from fastcnn.cli import main
from fastcnn.commands.output import open_page
from fastcnn.config import options_by_name
from fastcnn.insight.html.document import Page, write_page
from fastcnn.insight.run_page import compare


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "x" / "one", epochs=4, lr=0.25)
    make_run(tmp_path / "x" / "two", epochs=7, lr=0.5, milestones=[3, 5], schedule="milestones")
    return ["x/one", "x/two"]


def run(capsys, *words):
    code = main(["compare", *map(str, words)])
    out = capsys.readouterr()
    return code, out.out, out.err


def compared(*folders):
    return compare.compare([Path(folder) for folder in folders])


def test_the_terminal_has_a_row_a_run_and_a_row_a_differing_option(runs, capsys):
    code, out, err = run(capsys, *runs)
    assert (code, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert lines[1][:3] == ["run", "test", "top-1"]
    cells = ["48.50%", "92.30%", "1.2500", "591,274"]
    rest = ["28", "min", "46", "s", "369", "cpu", "(1", "thread)", "fp32", "0"]
    assert lines[2] == ["one", *cells, "4", *rest]
    assert lines[3] == ["two", *cells, "7", *rest]
    assert ["option", "one", "two"] in lines
    options = lines[lines.index(["option", "one", "two"]) + 1 :]
    assert options[:4] == [
        ["epochs", "4", "7"],
        ["lr", "0.25", "0.5"],
        ["schedule", "one-cycle", "milestones"],
        ["milestones", "–", "3", "5"],
    ]
    assert out.endswith("page: compare.html\n")
    assert Path("compare.html").is_file()
    assert f"{len(options_by_name()) - 4} options are the same in all" in out


def test_the_runs_stand_as_given(runs):
    assert compared(*reversed(runs)).labels == ("two", "one")


def test_json_has_plain_values(runs, capsys):
    make_run(Path("x/three"), epochs=2, finished=False, summary=None, seed=3)
    code, out, _ = run(capsys, *runs, "x/three", "--json", "--output", "p.html")
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0
    assert [row["run"] for row in found["runs"]] == ["one", "two", "three"]
    assert [row["test_top1"] for row in found["runs"]] == [0.485, 0.485, None]
    assert [row["finished"] for row in found["runs"]] == [True, True, False]
    assert [row["train_seconds"] for row in found["runs"]] == [1726, 1726, 6]
    assert found["runs"][2]["images_per_s"] == pytest.approx((401 + 402) / 2)
    assert found["differing"]["lr"] == [0.25, 0.5, 0.1]
    assert found["differing"]["seed"] == [0, 0, 3]
    assert "lr" not in found["same"]
    assert found["same"]["momentum"] == 0.9
    assert found["page"] == "p.html"


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["a/x", "a/y"], ["x", "y"]),
        (["a/x", "b/x"], ["a/x", "b/x"]),
        (["a/k/x", "b/k/x", "c/y"], ["a/k/x", "b/k/x", "y"]),
        (["x", "b/x"], ["home/x", "b/x"]),
        (["a/x/", "a/y/../z"], ["x", "z"]),
    ],
)
def test_labels_are_as_long_as_they_must_be(tmp_path, monkeypatch, paths, labels):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    assert compare.labels_of([Path(path) for path in paths]) == labels


def test_an_unfinished_run_is_shown_with_what_it_has(runs):
    folder = make_run(Path("x/three"), epochs=2, finished=False)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("epochs: 2", "epochs: 60"))
    folder = make_run(Path("x/none"), epochs=2, finished=False)
    (folder / "metrics.csv").unlink()
    found = compared("x/one", "x/three", "x/none")
    assert found.results.rows[1][0] == "three (not finished)"
    assert found.results.rows[1][1:8] == ("–", "–", "–", "–", "2", "6 s", "402")
    assert found.results.rows[2][1:8] == ("–", "–", "–", "–", "0", "0 s", "–")
    assert "three is not finished: 2 of 60 epochs." in found.notes
    text = compare.write_comparison(found, Path("p.html")).read_text()
    assert "three is not finished" in text


NOT = "two and one are not comparable: "


@pytest.mark.parametrize(
    ("first", "second", "note"),
    [
        ({}, {}, ""),
        ({"summary": {"data": "a"}}, {"summary": {"data": "b"}}, "on other images, b and a."),
        ({}, {"summary": {"images": {"test": 99}}}, "were tested on 99 and 360 images."),
        ({"test_subset": 50}, {"test_subset": 50}, ""),
        ({"test_subset": 50}, {"test_subset": 50, "seed": 1}, "other subsets of the data"),
        ({"seed": 2}, {"seed": 1}, ""),
        ({"data": "/a/digits"}, {"data": "/b/digits", "finished": False}, ""),
        ({"data": "/a/x"}, {"data": "/a/y", "finished": False}, "on other images, y and x."),
    ],
)
def test_runs_on_other_images_are_not_comparable(tmp_path, first, second, note):
    found = compared(make_run(tmp_path / "one", **first), make_run(tmp_path / "two", **second))
    notes = [text for text in found.notes if "comparable" in text]
    assert len(notes) == bool(note)
    assert all(text.startswith(NOT) and note in text for text in notes)


def test_runs_with_the_same_options_say_so(tmp_path):
    found = compared(make_run(tmp_path / "one"), make_run(tmp_path / "two"))
    assert found.differing.rows == ()
    path = compare.write_comparison(found, tmp_path / "p.html")
    assert "The runs have the same options." in path.read_text()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["x/one"], 2, "give two or more run folders"),
        (["x/one", "x/../x/one"], 2, "x/one and x/../x/one are the same run"),
        (["x/one", "x/two", "x/one/"], 2, "are the same run"),
        (["x/one", "x"], 4, "x is not a run folder"),
        (["x/one", "x/two", "--output", "no/p.html"], 2, "--output: there is no folder no"),
        (["x/one", "x/two", "--output", "x"], 2, "--output: x is a folder"),
        (["x/one", "x/two", "--output", "x/one/config.yaml"], 2, "/x/one; give another"),
        (["x/one", "x/two", "--output", "x/one/index.html"], 2, "is a file of the run"),
        (["x/one", "x/two", "--output", "mine.html"], 2, "exists and is no earlier comparison"),
        (["x/one", "x/two", "--opne"], 2, "did you mean '--open'?"),
    ],
)
def test_mistakes_are_one_line(runs, capsys, words, code, message):
    before = Path("x/one/config.yaml").read_text()
    write_page(Path("mine.html"), Page("Sweep", "A page of fastcnn too.", ()))
    shutil.copy("mine.html", "x/one/index.html")
    found, out, err = run(capsys, *words)
    assert (found, out) == (code, "")
    assert message in err
    assert err.count("\n") == 1
    assert Path("x/one/config.yaml").read_text() == before
    assert Path("x/one/index.html").read_text() == Path("mine.html").read_text()
    assert "<title>Sweep<" in Path("mine.html").read_text()
    assert not Path("compare.html").exists()


def test_an_earlier_page_is_written_anew(runs, capsys):
    run(capsys, *runs)
    before = Path("compare.html").read_text()
    code, _, _ = run(capsys, *reversed(runs))
    assert code == 0
    assert Path("compare.html").read_text() != before


def test_open_hands_the_page_to_the_browser(runs, capsys, monkeypatch):
    script = Path("browser.py").resolve()
    script.write_text("import sys; open('opened', 'w').write(sys.argv[1])")
    monkeypatch.setenv("BROWSER", f"{sys.executable} {script} %s")
    code, _, err = run(capsys, *runs, "--open")
    assert (code, err) == (0, "")
    assert Path("opened").read_text() == Path("compare.html").resolve().as_uri()


@pytest.mark.parametrize("failing", ["no display", "no browser", "error"])
def test_without_a_browser_a_note_is_all(tmp_path, capsys, monkeypatch, failing):
    def refuse(address):
        assert failing != "no display"  # a browser in the terminal would wait for its user
        if failing == "error":
            raise OSError("no such program")
        return False

    monkeypatch.setattr("webbrowser.open", refuse)
    for name in ("BROWSER", "WAYLAND_DISPLAY", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    if failing != "no display":
        monkeypatch.setenv("DISPLAY", ":9")
    open_page(tmp_path / "a b.html")
    assert capsys.readouterr().err == (
        f"note: --open: no browser here; the page is {tmp_path}/a b.html\n"
    )


PROBE = """
const figure = document.querySelector("figure.chart"), plot = figure.querySelector(".plot");
const box = plot.getBoundingClientRect();
plot.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right, pointerType: "mouse"}));
return {titles: [...document.querySelectorAll(".chart b")].map((node) => node.textContent),
  at: figure.querySelector(".at").textContent,
  legend: [...figure.querySelectorAll("li")].map((node) => node.textContent.trim()),
  colours: new Set([...plot.querySelectorAll(".line")].map(
    (node) => getComputedStyle(node).stroke)).size,
  heads: [...document.querySelectorAll("h2")].map((node) => node.textContent),
  open: document.querySelector("details").open,
  wide: document.querySelector("table").scrollWidth};
"""


@needs_browser
def test_in_a_browser_the_curves_lie_over_each_other(runs, capsys):
    run(capsys, *runs)
    seen = look(Path("compare.html").resolve(), [(390, "light"), (1280, "dark")], PROBE)
    assert seen.console == []
    for found in seen.found:
        assert found["titles"] == [
            "Validation top-1, %",
            "Validation loss",
            "Training top-1, %",
            "Training loss",
        ]
        assert found["at"] == "epoch 7"
        assert found["legend"] == ["one –", f"two {100 * rows(7)[-1]['val_top1']:.2f}%"]
        assert found["colours"] == 2
        assert found["heads"] == ["Results", "Curves", "Options in which they differ"]
        assert found["open"] is False
        assert found["page"] == found["window"]
        assert all(found["names"])
        assert found["outside"] == []
    assert seen.found[0]["wide"] > 390  # which scrolls by itself
