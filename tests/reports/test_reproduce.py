"""`fastcnn reproduce`: every experiment from its command to its table, at a small scale."""

import csv
import json
from html.parser import HTMLParser

import pytest
from image_files import write_folder
from small_runs import stop_at_check

from fastcnn.cli import main
from fastcnn.data.sources.cifar import CLASSES
from fastcnn.reports import planning
from fastcnn.reports.catalogue import REPORTS
from fastcnn.study import record as records
from fastcnn.study import runner

EXPERIMENTS = [(report, one) for report in REPORTS.values() for one in report.experiments]
SMALL = ["--scale", "0.01", "--seeds", "1", "--threads", "1", "--quiet", "--backend", "torch"]
TRIAL = ["--data", "digits", *SMALL]


def reproduce(words, tmp_path, *more, expected=0):
    code = main(["reproduce", *words, *TRIAL, "--output", str(tmp_path), *more])
    assert code == expected
    return tmp_path / words[0] / "scale-0.01"


def table_of(folder, key):
    return records.read(folder / f"{key}.json").table


def column(table, name):
    return [row[table.header.index(name)] for row in table.rows]


# foreign images are not among them: that needs the digits as its own
@pytest.mark.full
@pytest.mark.parametrize(
    ("report", "one"),
    [pair for pair in EXPERIMENTS if pair[1].key != "ood"],
    ids=lambda one: one.key,
)
def test_every_experiment_ends_in_its_table(report, one, tmp_path, capsys):
    folder = reproduce([report.key, one.key], tmp_path)
    table = table_of(folder, one.key)
    assert column(table, "row") == [row.label for row in one.rows]
    assert column(table, "n") == ["1"] * len(one.rows)
    shown = capsys.readouterr()
    assert shown.err == ""
    assert all(row.label in shown.out for row in one.rows)
    assert "A trial on digits" in shown.out
    assert "at scale 0.01" in shown.out
    record = records.read(folder / f"{one.key}.json")
    for drawing in record.drawings:
        for suffix in (".png", ".svg"):
            assert (folder / (drawing.name + suffix)).stat().st_size > 1000
    with (folder / f"{one.key}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [row.key for row in one.rows]
    by_key = {row.key: row for row in one.rows}
    for row in rows:
        published = by_key[row["row"]].published.top1
        assert row["top1_published"] == ("" if published is None else str(float(published)))
        summary = json.loads((folder / row["row"] / "seed-0" / "summary.json").read_text())
        assert float(row["top1_mean"]) == pytest.approx(100 * summary["test_top1"], rel=1e-5)
    page = (folder / "index.html").read_text()
    HTMLParser().feed(page)
    assert page.count("<img ") == len(record.drawings)
    markdown = (folder / f"{one.key}.md").read_text()
    assert "fastcnn reproduce" in markdown
    assert str(tmp_path) not in markdown.replace(f"--output {tmp_path}", "")


def test_foreign_images_are_told_apart(tmp_path, capsys):
    foreign = write_folder(tmp_path / "foreign", count=8)
    words = ["--ood-data", str(foreign), "--seeds", "2"]
    folder = reproduce(["murgolo", "ood"], tmp_path, *words)
    table = table_of(folder, "ood")
    assert column(table, "score")[-2:] == ["max softmax", "energy"]
    assert column(table, "score")[0].startswith("mean activation of ReLU")
    with (folder / "ood.csv").open() as file:
        rows = list(csv.DictReader(file))
    with (folder / "ood-runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert len(rows) == len(table.rows)
    assert len(runs) == 2 * len(rows)
    for row in rows:
        own = [float(run["auroc"]) for run in runs if run["score"] == row["score"]]
        assert float(row["auroc"]) == pytest.approx(sum(own) / 2)
    out = capsys.readouterr().out
    assert "tells digits from foreign; means of 2 runs" in out
    assert (folder / "ood-histogram.png").exists()


def test_a_trial_s_own_images_are_not_foreign(tmp_path, capsys):
    folder = reproduce(["murgolo", "ood"], tmp_path)
    assert table_of(folder, "ood").rows == ()
    assert "digits are no foreign images here: give --ood-data" in capsys.readouterr().out


def test_modern_rows_train_on_the_same_images(tmp_path):
    folder = reproduce(["murgolo", "table1"], tmp_path, "--modern", "--rows", "murgolo-improved",
                       "table1-modern-murgolo-improved")  # fmt: skip
    table = table_of(folder, "table1")
    assert column(table, "row") == ["Improved", "murgolo-improved (modern recipe)"]
    assert len(set(column(table, "images"))) == 1
    assert len(set(column(table, "epochs"))) == 1
    path = folder / "table1-modern-murgolo-improved" / "seed-0" / "config.yaml"
    config = path.read_text()
    for line in ("recipe: modern", "ema: 0.995", "test_flip: false", "schedule: one-cycle"):
        assert line in config
    assert (folder / "murgolo-base").exists() is False


def test_finished_runs_are_kept_and_experiments_share_them(tmp_path, monkeypatch):
    reproduce(["marie2019", "full"], tmp_path)

    def train(*arguments):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(runner, "train_one", train)
    folder = reproduce(["marie2019", "full", "figure2"], tmp_path)
    assert (folder / "figure2-curves-full-cnn-a.png").exists()
    page = (folder / "index.html").read_text()
    assert page.index('id="full"') < page.index('id="figure2"')


@pytest.mark.full
def test_an_interrupted_reproduction_goes_on(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at_check(patch, 3)
        reproduce(["mao2022", "training"], tmp_path, expected=143)
    assert capsys.readouterr().err == "fastcnn: stopped by SIGTERM\n"
    folder = reproduce(["mao2022", "training"], tmp_path, "--tables-only")
    before = len(table_of(folder, "training").rows)
    assert before < 4
    assert "of 4 runs are finished" in capsys.readouterr().out
    reproduce(["mao2022", "training"], tmp_path)
    assert len(table_of(folder, "training").rows) == 4


def test_tables_of_nothing_are_empty(tmp_path, capsys):
    folder = reproduce(["mao2022"], tmp_path, "--tables-only")
    assert table_of(folder, "structure").rows == ()
    assert "0 of 7 runs are finished" in capsys.readouterr().out


def test_training_times_are_compared_where_the_report_has_them(tmp_path):
    folder = reproduce(["mao2022", "training"], tmp_path)
    said = records.read(folder / "training.json").sentences
    assert any(
        line.startswith("training time of Batch size 256 over that of As before: ")
        and line.endswith("published 0.92")
        for line in said
    )


@pytest.mark.full
def test_verdicts_are_given_on_all_of_the_report_s_images_alone(tmp_path, monkeypatch, capsys):
    """Of a folder that has CIFAR-10's classes, and few images."""
    data = write_folder(tmp_path / "data", classes=CLASSES, count=4, side=32)
    monkeypatch.setitem(planning.WHOLE, "cifar10", 80)
    words = ["reproduce", "murgolo", "table1", "--data", str(data), "--output", str(tmp_path)]
    words += ["--rows", "murgolo-base", "murgolo-no-dropout", "--threads", "1", "--quiet"]
    assert main([*words, "--seeds", "2"]) == 0
    table = table_of(tmp_path / "murgolo" / "full", "table1")
    assert column(table, "verdict") == ["below", "below"]
    assert column(table, "published") == ["60.92", "62.48"]
    out = capsys.readouterr().out
    assert "at the report's scale" in out
    assert "by mean top-1, best first: " in out
    monkeypatch.setitem(planning.WHOLE, "cifar10", 81)
    assert main([*words, "--seeds", "2"]) == 0
    assert "verdict" not in table_of(tmp_path / "murgolo" / "full", "table1").header
    assert "a part of the report's images: 40 for training and 40 for" in capsys.readouterr().out
    assert main([*words, "--scale", "0.5"]) == 0
    table = table_of(tmp_path / "murgolo" / "scale-0.5", "table1")
    assert "verdict" not in table.header
    assert "no verdict on single numbers" in capsys.readouterr().out


def test_images_that_were_left_out_count_as_there(tmp_path, monkeypatch):
    data = write_folder(tmp_path / "data", classes=CLASSES, count=4, side=32)
    sorted((data / "train").rglob("*.png"))[0].write_bytes(b"none")
    given = {"data": str(data), "on_bad_image": "skip", "bad_limit": 0.5}
    for count, whole in ((80, True), (81, False)):
        monkeypatch.setitem(planning.WHOLE, "cifar10", count)
        found = planning.images_of(REPORTS["murgolo"], given)
        assert (found.train, found.test, found.whole) == (39, 40, whole)


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["marie"], 2, "reproduce: no report 'marie'; did you mean 'marie2019'?"),
        (["murgolo", "tabel1"], 2, "reproduce murgolo: no experiment 'tabel1'"),
        (["murgolo", "--scale", "0"], 2, "--scale: must be more than 0"),
        (
            ["murgolo", "table1", "--rows", "base"],
            2,
            "--rows: no row 'base'; did you mean 'murgolo-base'?",
        ),
        (["mao2022", "training", "--modern"], 2, "--modern: training has no rows of this"),
        (["murgolo", "--lr", "1"], 2, "unknown option --lr"),
        (["murgolo", "--data", "nowhere"], 2, "--data nowhere: neither cifar10"),
        (["murgolo", "ood", "--ood-data", "nowhere"], 2, "--ood-data nowhere: neither cifar10"),
        (["murgolo", "--output", "/dev/null/x"], 2, "--output: cannot write into /dev/null/x"),
    ],
)
def test_mistakes_are_one_line(words, code, line, capsys):
    rest = [] if "--data" in words else ["--data", "digits"]
    assert main(["reproduce", *words, *rest]) == code
    err = capsys.readouterr().err
    assert err.startswith("fastcnn: ")
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("report", ["marie2019", "skagerstrom2018"])
def test_other_images_than_the_report_s_are_refused(report, tmp_path, capsys):
    data = write_folder(tmp_path / "data", side=32)
    words = ["reproduce", report, "--data", str(data), "--output", str(tmp_path / "out")]
    assert main(words) == 3
    err = capsys.readouterr().err
    assert f"fastcnn: {report} is about " in err
    assert "data has 2 classes (ant, bee, …)" in err
    assert not (tmp_path / "out").exists()


def test_a_damaged_record_is_named(tmp_path, capsys):
    folder = reproduce(["marie2019", "full"], tmp_path)
    (folder / "table1.json").write_text("[1]")
    reproduce(["marie2019", "full"], tmp_path, expected=4)
    assert "table1.json is not a record of this program" in capsys.readouterr().err
