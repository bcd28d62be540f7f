"""`fastcnn ood`: its table against scikit-learn, its files, its errors."""

import csv
import json
import re
import shutil
import sys

import numpy as np
import pytest
from image_files import write_folder
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve
from small_runs import start

from fastcnn.cli import main
from fastcnn.commands.ood import OOD_OWN
from fastcnn.errors import CheckpointError
from fastcnn.insight.ood import ood_figures, ood_record
from fastcnn.insight.ood.ood_judge import QUANTILE, Detection
from fastcnn.insight.run_page import page
from fastcnn.insight.run_page.saved_sections import saved_sections

LAYERS = ["ReLU-3", "ReLU-6", "ReLU-9", "ReLU-13"]
SCORES = [*LAYERS, "max softmax", "energy"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run on digits, and a folder of noise."""
    root = tmp_path_factory.mktemp("ood-command")
    write_folder(root / "my noise", count=9, side=12)
    start(root, "run", epochs=1, lr=0.01)
    return root


@pytest.fixture(scope="module")
def found(place):
    """What a call without further options leaves: the folder."""
    assert ood(place, "--quantile", "0.1") == 0
    return place / "run" / "ood-my-noise"


def ood(place, *words, run="run"):
    command = ["ood", str(place / run), "--out", str(place / "my noise"), "--threads", "1"]
    return main([*command, *words])


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def scores_of(folder, name):
    """The scores of each set in images.csv."""
    rows = read(folder / "images.csv")
    return {
        part: np.array([float(row[name]) for row in rows if row["set"] == part])
        for part in ("threshold", "in", "out")
    }


def test_every_score_is_judged_as_scikit_learn_does(found):
    table = {row["score"]: row for row in read(found / "scores.csv")}
    assert [*table] == SCORES
    for name, row in table.items():
        sets = scores_of(found, name)
        assert [len(part) for part in sets.values()] == [20, 20, 18]
        labels = np.repeat([1, 0], [20, 18])
        both = np.concatenate([sets["in"], sets["out"]])
        assert float(row["auroc"]) == pytest.approx(roc_auc_score(labels, both), abs=1e-12)
        fpr, tpr, _ = roc_curve(labels, both, drop_intermediate=False)
        assert float(row["fpr95"]) == pytest.approx(fpr[tpr >= 0.95].min(), abs=1e-12)
        cut = np.quantile(sets["threshold"], 0.1, method="higher")
        assert float(row["threshold"]) == pytest.approx(cut, abs=1e-12)
        right = (sets["in"] >= cut).sum() + (sets["out"] < cut).sum()
        assert float(row["accuracy"]) == pytest.approx(right / 38)
        shares = np.mean(sets["in"] >= cut), np.mean(sets["out"] < cut)
        assert float(row["balanced_accuracy"]) == pytest.approx(sum(shares) / 2)
    best = max(table, key=lambda name: float(table[name]["auroc"]))
    assert {name: row["best"] for name, row in table.items()} == {
        name: str(name == best) for name in table
    }


def test_each_image_is_named(found):
    rows = read(found / "images.csv")
    own = [int(row["image"]) for row in rows if row["data"] == "digits"]
    assert sorted(own) == [*range(40)]
    others = [row for row in rows if row["set"] == "out"]
    assert [int(row["image"]) for row in others] == [*range(18)]
    assert [row["class"] for row in others] == ["ant"] * 9 + ["bee"] * 9
    assert {row["data"] for row in others} == {"my noise"}
    assert {row["split"] for row in rows} == {"test"}


def test_the_section_tells_what_the_table_holds(found):
    (section,) = saved_sections(found, "ood")
    assert (section.title, section.anchor) == ("Out of distribution: my noise", "ood-my-noise")
    rows = read(found / "scores.csv")
    assert section.table.header[:-1] == ood_record.HEADER
    for line, row in zip(section.table.rows, rows, strict=True):
        assert line[0] == ("mean activation of " * row["score"].startswith("R")) + row["score"]
        columns = ("accuracy", "balanced_accuracy", "auroc", "fpr95")
        assert line[1:5] == tuple(f"{100 * float(row[column]):.1f}" for column in columns)
        assert float(line[5]) == pytest.approx(float(row["threshold"]), rel=1e-2)
        assert line[6] == ("best AUROC" if row["best"] == "True" else "")
    assert dict(section.facts)["command"].startswith("fastcnn ood ")
    best = next(row for row in rows if row["best"] == "True")
    text = " ".join(section.sentences)
    assert not re.search(r"\d %", (found / "ood.json").read_text())
    assert "keep 90% of 20 of 40 test images of digits, not judged on" in text
    assert f"{float(best['auroc']):.1%}" in text
    backward = [row["score"] for row in rows if float(row["auroc"]) < 0.5]
    assert [name for name in SCORES if name in text.partition("below 50%")[2]] == backward
    histogram, layers = section.figures
    assert (histogram.path.name, layers.path.name) == ("histogram.png", "layers.png")
    assert f"AUROC {float(best['auroc']):.1%}" in histogram.caption
    assert f"{float(best['kept_in']):.1%} of digits" in histogram.caption
    assert f"{float(best['kept_out']):.1%} of my noise" in histogram.caption
    for figure in section.figures:
        assert figure.alt
        with Image.open(figure.path) as image:
            assert image.width > 900
        assert figure.path.with_suffix(".svg").read_text().count("<svg") == 1


def test_the_histogram_shows_the_score_that_is_asked_for(place, found, capsys):
    before = (found / "histogram.svg").read_text()
    run = shutil.copytree(place / "run", place / "chosen")
    assert ood(place, "--score", "max softmax", "--limit", "7", run="chosen") == 0
    after = (run / "ood-my-noise" / "histogram.svg").read_text()
    assert "max softmax: digits and my noise" in after
    assert "max softmax: digits and my noise" not in before
    row = read(run / "ood-my-noise" / "scores.csv")[4]
    assert f"threshold {float(row['threshold']):.4g}" in after
    sizes = [len(part) for part in scores_of(run / "ood-my-noise", "energy").values()]
    assert sizes == [7, 7, 7]
    out = capsys.readouterr().out
    assert "FPR at 95% TPR" in out
    assert "- thresholds: keep 95% of 7 of 40 test images" in out
    assert len(re.findall("best AUROC$", out, re.MULTILINE)) == 1


def svg_texts(path):
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_the_figure_of_layers_has_each_in_forward_order(tmp_path):
    aurocs = dict(zip(SCORES, (0.1234, 0.9876, 0.55, 0.6, 0.7, 0.8), strict=True))
    rows = {name: Detection(0, 0, 0, auroc, 0, 0, 0, 0) for name, auroc in aurocs.items()}
    _, svg = ood_figures.draw_layers(tmp_path, "layers", "title", rows)
    texts = svg_texts(svg)
    assert [text for text in texts if text in SCORES] == LAYERS
    assert [text for text in texts if text in ("12.3", "98.8", "55.0", "60.0")] == [
        "12.3",
        "98.8",
        "55.0",
        "60.0",
    ]
    assert {"max softmax, 70.0%", "energy, 80.0%", "chance"} <= {*texts}


def test_json_is_the_table(place, found, capsys):
    assert ood(place, "--json", "--quantile", "0.1") == 0
    told = json.loads(capsys.readouterr().out)
    rows = read(found / "scores.csv")
    assert [{k: str(v) for k, v in row.items()} for row in told["scores"]] == rows
    assert told["best"] == told["shown"] == next(r["score"] for r in rows if r["best"] == "True")
    assert told["folder"] == str(found)


def test_other_data_in_distribution_have_a_folder_of_their_own(place, capsys):
    command = ["ood", str(place / "run"), "--in", str(place / "my noise"), "--out", "digits"]
    assert main([*command, "--threads", "1"]) == 0
    rows = read(place / "run" / "ood-my-noise-digits" / "images.csv")
    assert {row["set"]: row["data"] for row in rows} == {
        "threshold": "my noise",
        "in": "my noise",
        "out": "digits",
    }
    out = capsys.readouterr().out
    assert "in distribution: 9 of 18 test images of my noise" in out
    assert (place / "run" / "index.html").is_file()


def test_names_of_folders_are_anchors():
    assert ood_record.name_of("digits", None) == "ood-digits"
    assert ood_record.name_of("some/where/tiny images/", None) == "ood-tiny-images"
    assert ood_record.name_of("a/one.tar", "digits") == "ood-digits-one.tar"


def test_the_default_is_said_once(place):
    defaults = {option.name: option.default for option in OOD_OWN}
    assert defaults["quantile"] == QUANTILE


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--out", "digits"], 2, "--out digits: the run's own images; give other data"),
        ([], 2, "ood: --out is missing"),
        (["--out", "digits", "--score", "ReLU-7"], 2, "'ReLU-7' is not one of ReLU-3, ReLU-6"),
        (["--out", "digits", "--quantile", "1"], 2, "--quantile: expected"),
        (["--out", "digits", "--limit", "0"], 2, "--limit: must be at least 1"),
        (["--out", "digits", "--in", "no/where"], 3, "--in no/where: no such file"),
        (["--out", "no/where"], 3, "--out no/where: no such file"),
        (["--out", "digits", "--weights", "first"], 2, "'first' is not one of last, best"),
    ],
)
def test_errors_are_one_line(place, capsys, words, code, says):
    assert main(["ood", str(place / "run"), *words, "--threads", "1"]) == code
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_the_result_is_told_though_the_page_fails(place, capsys, monkeypatch):
    def fail(folder):
        raise CheckpointError("no page")

    monkeypatch.setattr(page, "write_page", fail)
    assert ood(place) == 4
    captured = capsys.readouterr()
    assert "best AUROC: " in captured.out
    assert captured.err == "fastcnn: no page\n"


def test_without_matplotlib_the_tables_are_there(place, capsys, monkeypatch):
    run = shutil.copytree(place / "run", place / "plain")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert ood(place, run="plain") == 0
    assert "figures: matplotlib is missing" in capsys.readouterr().err
    (section,) = saved_sections(run / "ood-my-noise", "ood")
    assert section.figures == ()
    assert len(section.table.rows) == 6
