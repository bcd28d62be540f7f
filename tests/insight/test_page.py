"""The page of a run: what it says, what it takes in, what it refuses; in a browser."""

import json
import re
from html.parser import HTMLParser

import pytest
from browser import look, needs_browser
from mutations import mutated
from PIL import Image
from run_folders import SUMMARY, make_run, rows

from fastcnn.errors import CheckpointError
from fastcnn.insight.drawing import figures
from fastcnn.insight.html import document
from fastcnn.insight.html.document import Figure, Section
from fastcnn.insight.html.table import Table
from fastcnn.insight.run_page import page
from fastcnn.insight.run_page.run_files import read_run
from fastcnn.insight.run_page.saved_sections import save_sections
from fastcnn.train.rundir import RunFolder

INVITATION = "adds grids of images, Grad-CAM and calibration"


class Said(HTMLParser):
    """The texts of a page by the tag around them, and the attributes of every tag."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.tags, self.open = {}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data.strip())


def said(folder):
    return Said(page.write_page(folder).read_text())


def pairs(found):
    """Names and values; of a name that is given twice, the first value."""
    return dict(reversed([*zip(found.texts["dt"], found.texts["dd"], strict=True)]))


def test_a_finished_run_says_what_it_reached_and_how(tmp_path):
    found = said(make_run(tmp_path / "run", lr=0.25))
    assert found.texts["h1"] == ["run: cnn-a on digits"]
    assert found.texts["h2"] == ["Summary", "Curves", "Configuration", "Environment"]
    assert found.texts["span"][:5] == ["fastcnn", "train", "--name", "'a", "b'"]
    facts = pairs(found)
    wanted = {
        "test top-1": "48.50%",
        "test top-5": "92.30%",
        "test loss": "1.2500",
        "parameters": "591,274",
        "epochs": "5",
        "time": "28 min 46 s",
        "images/s": "369",
        "data": "digits, 1,437 train, 360 test",
        "device": "cpu (1 thread)",
        "precision": "fp32",
        "backend": "fused",
        "best validation": "52.00% top-1, best.pt: epoch 1",
        "lr": "0.25",
        "versions.torch": "2.11.0",
        "gpus": "–",
        "nesterov": "yes",
        "milestones": "–",
    }
    assert {name: facts[name] for name in wanted} == wanted
    lead = "Test top-1 48.50%, top-5 92.30% after 5 epochs and 1,726 s (369 images/s) on cpu (1 t"
    assert found.texts["p"][0].startswith(lead)
    # each option once, the first of them in sight
    options = RunFolder(tmp_path / "run").read_config().flat()
    assert all(found.texts["dt"].count(name) >= 1 for name in options)
    assert found.texts["summary"] == [f"the other {len(options) - 8} options"]


def test_the_curves_are_those_of_metrics_csv(tmp_path):
    text = page.write_page(make_run(tmp_path / "run")).read_text()
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', text)
    values = [[line["text"] for line in json.loads(block)["series"]] for block in blocks]

    def column(name, form, factor=1):
        return [form.format(factor * row[name]) for row in rows(5)]

    percent = [column(name, "{:.2f}%", 100) for name in ("train_top1", "val_top1", "val_top5")]
    assert values == [
        [column("train_loss", "{:#.4g}"), column("val_loss", "{:#.4g}")],
        percent,
        [column("lr", "{:.4g}")],
        [column("images_per_s", "{:.0f}")],
    ]


def test_texts_are_no_tags_and_nothing_is_loaded(tmp_path):
    hostile = "<script>alert(1)</script>"
    folder = make_run(tmp_path / "run", summary={"data": hostile, "device": "<b>x</b>"})
    figures.draw_confusion(folder)
    found = said(folder)
    assert "run: cnn-a on <script>alert(1)</script>" in found.texts["h1"]
    assert [tag for tag, _ in found.tags].count("b") == 4  # titles of the charts
    assert all("src" not in attributes for tag, attributes in found.tags if tag == "script")
    for _, attributes in found.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:"))
    assert "http" not in (folder / "index.html").read_text()


def test_the_confusion_matrix_tells_its_largest_errors(tmp_path):
    folder = make_run(tmp_path / "run")
    figures.draw_confusion(folder)
    [caption] = [t for t in said(folder).texts["figcaption"] if "Test images" in t]
    assert caption == (
        "Test images: rows true, columns predicted classes, numbers counts. Most often taken: "
        "d<o>g for cat (4 of 10), cat for d<o>g (1 of 4)."
    )
    (folder / "confusion_matrix.csv").write_text("x,a,b\na,3,0\nb,0,6\n")
    assert "None is predicted as another class." in page.write_page(folder).read_text()


def keep(folder, key, *titles):
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    figure = Figure(folder / "one.png", "what it shows", "below")
    table = Table(("a",), (("cell",),))
    sections = [
        Section(title, title.lower(), (f"in {folder.name}",), table, figures=(figure,))
        for title in titles
    ]
    save_sections(folder, key, sections)


def test_what_was_found_out_later_is_taken_in(tmp_path):
    folder = make_run(tmp_path / "run")
    assert any(INVITATION in text for text in said(folder).texts["p"])
    keep(folder / "ood-far", "ood", "Far")
    keep(folder / "analysis-b", "analysis", "Grids", "Curves")
    keep(folder / "analysis", "analysis", "Grids", "Filters")
    (folder / "analysis-empty").mkdir()
    found = said(folder)
    assert found.texts["h2"] == [
        "Summary",
        "Curves",
        "Grids",
        "Filters",
        "Grids (analysis-b)",
        "Curves (analysis-b)",
        "Far",
        "Configuration",
        "Environment",
    ]
    ids = [a["id"] for tag, a in found.tags if tag == "section"]
    assert len(set(ids)) == len(ids) == 9
    assert [a["href"] for tag, a in found.tags if tag == "a"] == [f"#{name}" for name in ids]
    assert not any(INVITATION in text for text in found.texts["p"])
    assert sum(tag == "img" for tag, _ in found.tags) == 5


def test_what_lies_outside_the_run_is_not_taken_in(tmp_path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    keep(other / "analysis", "analysis", "Of another run")
    for name in ("analysis", "analysis-x"):
        (one / name).symlink_to(other / "analysis")
    (one / "ood-1").mkdir()
    page.write_page(one)
    assert "Of another run" not in (one / "index.html").read_text()
    (one / "ood-1" / "ood.json").symlink_to(other / "analysis" / "analysis.json")
    with pytest.raises(CheckpointError, match=r"ood\.json is not what fastcnn wrote"):
        page.write_page(one)


SHOWN = ["config.yaml", "environment.json", "metrics.csv", "summary.json", "confusion_matrix.csv"]


@pytest.mark.parametrize("name", [*SHOWN, "confusion_matrix.png"])
def test_no_link_in_a_run_brings_another_file_onto_its_page(tmp_path, name):
    """A run that came from elsewhere would show what its reader alone can read."""
    folder, secret = make_run(tmp_path / "run"), tmp_path / "secret"
    figures.draw_confusion(folder)
    page.write_page(folder)
    before = (folder / "index.html").read_bytes()
    (folder / name).rename(secret)
    (folder / name).symlink_to(secret)
    for write in (page.write_page, lambda run: page.check_page(run, run / "ood")):
        with pytest.raises(CheckpointError, match=rf"{name} is a link, which may lead out of the"):
            write(folder)
    assert (folder / "index.html").read_bytes() == before


def test_a_figure_that_became_a_link_meanwhile_is_not_shown(tmp_path):
    (tmp_path / "secret").write_text("of its reader")
    (tmp_path / "drawn.png").symlink_to(tmp_path / "secret")
    figure = Figure(tmp_path / "drawn.png", "alt", "caption")
    section = Section("Drawn", "drawn", (), Table((), ()), figures=(figure,))
    with pytest.raises(CheckpointError, match=r"cannot write .*: 'drawn\.png' is no file of"):
        document.write_page(tmp_path / "index.html", document.Page("run", "lead", (section,)))
    assert not (tmp_path / "index.html").exists()


def test_checkpoints_and_the_run_itself_may_be_links(tmp_path):
    folder = make_run(tmp_path / "run")
    (tmp_path / "here").symlink_to(folder)
    (folder / "last.pt").symlink_to(tmp_path / "disk" / "last.pt")
    assert page.write_page(tmp_path / "here").is_file()


def test_an_analysis_of_the_test_images_has_the_confusion_matrix_already(tmp_path):
    folder = make_run(tmp_path / "run")
    figures.draw_confusion(folder)
    keep(folder / "analysis-other", "analysis", "Confusions")
    assert "Confusion matrix" in said(folder).texts["h2"]
    keep(folder / "analysis", "analysis", "Confusions")
    assert "Confusion matrix" not in said(folder).texts["h2"]


def test_a_run_that_is_not_finished_says_so(tmp_path):
    folder = make_run(tmp_path / "run", epochs=3, finished=False)
    (folder / "config.yaml").write_text(
        (folder / "config.yaml").read_text().replace("epochs: 3", "epochs: 20")
    )
    found = said(folder)
    top1 = rows(3)[-1]["val_top1"]
    lead = f"Not finished: 3 of 20 epochs, validation top-1 {top1:.2%}, at best {top1:.2%}."
    assert found.texts["p"][0] == lead
    assert "Curves" in found.texts["h2"]
    assert "test top-1" not in found.texts["dt"]
    (folder / "metrics.csv").unlink()
    found = said(folder)
    assert found.texts["p"][0] == "Not finished: no epoch of 20 epochs has ended yet."
    assert "Curves" not in found.texts["h2"]


def test_a_run_of_one_epoch_and_one_with_broken_numbers_have_a_page(tmp_path):
    assert "1 epoch and" in page.write_page(make_run(tmp_path / "one", epochs=1)).read_text()
    folder = make_run(tmp_path / "run")
    text = (folder / "metrics.csv").read_text()
    (folder / "metrics.csv").write_text(text.replace("1,2.0,", "1,nan,").replace("2.1,", "inf,"))
    figures_of_loss = said(folder).texts["desc"][0]
    assert figures_of_loss.startswith("Training loss 0.4000 and validation loss")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.yaml", None, r"is not a run folder: it has no config.yaml"),
        ("config.yaml", "lr: [", r"config.yaml cannot be read"),
        ("config.yaml", "learn: 3\n", r"config.yaml: unknown option 'learn'"),
        ("environment.json", None, r"environment.json is missing; resume the run"),
        ("environment.json", "{", r"environment.json cannot be read"),
        ("environment.json", "[]", r"environment.json is not what this program wrote"),
        ("environment.json", '{"command": 3}', r"environment.json holds no command"),
        ("metrics.csv", None, r"metrics.csv cannot be read"),
        ("metrics.csv", "epoch,lr\n1,2\n", r"metrics.csv has no column train_loss"),
        ("metrics.csv", "epoch,lr\n1,x\n", r"metrics.csv cannot be read"),
        ("metrics.csv", "epoch,lr\n1\n", r"metrics.csv cannot be read"),
        ("metrics.csv", "epoch,lr\n1,2,3\n", r"metrics.csv cannot be read"),
        ("metrics.csv", "epoch\n", r"metrics.csv holds no epoch"),
        ("summary.json", "{", r"summary.json cannot be read"),
        ("summary.json", '{"arch": "cnn-a"}', r"summary.json holds no data"),
        ("summary.json", json.dumps(SUMMARY | {"epochs": "5"}), r"summary.json: epochs is '5'"),
        ("summary.json", json.dumps(SUMMARY | {"epochs": 5, "images": 3}), r"json: images is 3"),
        ("confusion_matrix.csv", "x,a\na,b\n", r"confusion_matrix.csv cannot be read"),
        ("confusion_matrix.csv", None, r"confusion_matrix.csv cannot be read"),
        ("analysis/analysis.json", "[]", r"analysis.json is not what fastcnn wrote"),
    ],
)
def test_a_damaged_file_is_named_and_the_page_stays(tmp_path, name, text, message):
    folder = make_run(tmp_path / "run")
    (folder / "analysis").mkdir()
    (folder / "confusion_matrix.png").write_bytes(b"")
    (folder / "index.html").write_text("before")
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        page.write_page(folder)
    assert "\n" not in str(caught.value)
    assert (folder / "index.html").read_text() == "before"


def test_a_summary_with_a_value_of_another_kind_is_refused_or_shown(tmp_path):
    folder = make_run(tmp_path / "run")
    path = folder / "summary.json"
    refused, shown = [], 0
    for content in mutated(json.loads(path.read_text())):
        path.write_text(json.dumps(content))
        try:
            run = read_run(folder)
        except CheckpointError as error:
            refused.append(str(error))
        else:
            page.lead(run.summary)
            page._summary(run, False)
            shown += 1
    assert len(refused) > 200
    assert all(str(path) in line for line in refused)
    assert 10 < shown < 100


def test_a_command_that_is_no_text_does_not_stop_the_page(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "environment.json").write_text(json.dumps({"command": ["train", "\udcff"]}))
    assert "train" in page.write_page(folder).read_text(encoding="utf-8")


@needs_browser
def test_in_a_browser_the_page_fits_a_phone(tmp_path):
    folder = make_run(tmp_path / ("long-" * 20), epochs=40, data="x" * 200)
    figures.draw_confusion(folder)
    keep(folder / "analysis", "analysis", "Grids")
    path = page.write_page(folder)
    probe = "document.querySelectorAll('details').forEach((one) => { one.open = true; });"
    probe += "return {page: root.scrollWidth, charts: document.querySelectorAll('.plot').length};"
    seen = look(path, [(390, "light"), (1280, "light"), (390, "dark")], probe)
    assert seen.console == []
    for found in seen.found:
        assert found["page"] == found["window"]
        assert found["charts"] == 4
        assert len(found["names"]) == 6
        assert all(found["names"])
        assert (found["unnamed"], found["broken"], found["outside"]) == (0, 0, [])
        assert len(set(found["ids"])) == len(found["ids"])
    assert [found["window"] for found in seen.found] == [390, 1280, 390]
    light, _, dark = (sum(map(int, re.findall(r"\d+", f["ground"]))) for f in seen.found)
    assert dark < 200 < 600 < light
