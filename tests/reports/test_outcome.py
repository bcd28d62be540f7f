"""From the summaries of runs to tables, sentences and CSV: the right number in the right place."""

import pytest
from study_results import CIFAR, TRIAL, planned, reached

from fastcnn.reports.catalogue import REPORTS
from fastcnn.reports.drawings import draw
from fastcnn.reports.outcome import plain_rows, record_of
from fastcnn.reports.planning import Images, check_rows
from fastcnn.study.options import ReproduceOptions
from fastcnn.study.statistics import summarise


def cells(record, row):
    [line] = [line for line in record.table.rows if line[0] == row]
    return dict(zip(record.table.header, line, strict=True))


A = [(58.0, 94.1, 10), (59.5, 94.3, 10), (60.0, 94.6, 10), (59.0, 94.0, 10), (60.1, 94.9, 10)]
B = [(46.0, 91.0, 10), (47.0, 91.1, 10), (45.0, 91.3, 10), (45.5, 90.9, 10), (46.4, 91.2, 10)]


@pytest.fixture
def table1(tmp_path):
    one = planned("marie2019", "table1", tmp_path)
    results = reached(one, {"table1-cnn-a": A, "table1-cnn-b": B})
    return one, results, record_of(one, results, [], ["fastcnn", "reproduce"], [])


def test_each_figure_stands_in_its_place(table1):
    _, _, record = table1
    top1 = summarise([v[0] for v in A], 1000, whole=100)
    top5 = summarise([v[1] for v in A], 1000, whole=100)
    found = cells(record, "CNN A")
    assert found["n"] == "5"
    assert found["images"] == "5,000"
    assert found["epochs"] == "100"
    assert found["top-1, %"] == f"{top1.mean:.1f}"
    assert found["sd"] == f"{top1.std:.1f}"
    assert found["min to max"] == "58.0 to 60.1"
    assert found["95 %"] == "{:.1f} to {:.1f}".format(*top1.interval)
    assert found["published"] == "59.3 (54.9 to 62.6)"
    assert found["top-5, %"] == f"{top5.mean:.1f}"
    assert found["top-5, 95 %"] == "{:.1f} to {:.1f}".format(*top5.interval)
    assert found["top-5, published"] == "94.3 (93.9 to 95)"


def test_each_number_has_its_own_verdict(table1):
    _, _, record = table1
    assert (cells(record, "CNN A")["verdict"], cells(record, "CNN A")["top-5, verdict"]) == (
        "inside",
        "inside",
    )
    assert (cells(record, "CNN B")["verdict"], cells(record, "CNN B")["top-5, verdict"]) == (
        "below",
        "inside",
    )


def test_conclusions_and_what_is_missing_are_said(table1):
    _, _, record = table1
    said = "\n".join(record.sentences)
    assert "CNN A beats CNN B: holds (+" in said
    assert "CNN B beats CNN C: not run" in said
    assert "10 of 22 runs are finished; missing: table1-cnn-c seed 0, " in said
    assert said.rstrip().endswith(" more")


def test_the_csv_has_both_intervals(table1):
    one, results, _ = table1
    [row] = [row for row in plain_rows(one, results) if row["row"] == "table1-cnn-a"]
    top1 = summarise([v[0] for v in A], 1000, whole=100)
    assert (row["top1_low95"], row["top1_high95"]) == pytest.approx(top1.interval, rel=1e-5)
    assert (row["top1_low95_t"], row["top1_high95_t"]) == pytest.approx(top1.t_interval, rel=1e-5)
    assert row["top5_mean"] == pytest.approx(94.38)
    assert (row["top1_published_min"], row["top1_published_max"]) == (54.9, 62.6)
    sizes = ("scale", "images", "test_images", "epochs", "lr", "n")
    assert [row[name] for name in sizes] == [1, 5000, 1000, 100, 0.001, 5]


@pytest.mark.parametrize(
    ("images", "scale", "judged", "lead"),
    [
        (CIFAR, 1.0, True, "at the report's scale."),
        (CIFAR, 0.2, False, "at scale 0.2: about 0.2 times its images and its epochs."),
        (
            Images("part", 6000, 900, True, False),
            1.0,
            False,
            "part is a part of the report's images: 6,000 for training and 900 for the test.",
        ),
        (TRIAL, 1.0, False, "A trial on digits, which are not the report's images"),
    ],
)
def test_single_numbers_are_judged_at_the_report_s_scale_alone(
    tmp_path, images, scale, judged, lead
):
    one = planned("marie2019", "table1", tmp_path, images, scale=scale)
    record = record_of(one, reached(one, {"table1-cnn-a": A}), [], ["x"], [])
    assert lead in record.lead
    assert ("verdict" in record.table.header) == judged
    assert any(line.startswith("CNN A: top-1") for line in record.sentences) == judged


def test_training_times_are_those_of_the_runs(tmp_path):
    one = planned("mao2022", "training", tmp_path)
    figures = {"mao-batchnorm": [(74, 98, 100), (75, 98, 100)], "batch-256": [(72, 98, 80)]}
    record = record_of(one, reached(one, figures), [], ["x"], [])
    line = "training time of Batch size 256 over that of As before: 0.80, published 0.92"
    assert line in record.sentences


def test_conclusions_about_a_rate_are_not_judged_beside_raised_ones(tmp_path):
    figures = {key: [(70.0, 98, 1), (71.0, 98, 1)] for key in ("mao-batchnorm", "lr-0.1")}
    for scale, judged in ((1.0, True), (0.2, False)):
        one = planned("mao2022", "training", tmp_path, scale=scale)
        said = record_of(one, reached(one, figures), [], ["x"], []).sentences
        refused = "A rate of 0.001 beats 0.1: not judged where other rates are raised"
        assert (refused in said) != judged
        assert any("Batches of 64 beat those of 256: not run" in line for line in said)


@pytest.mark.parametrize(
    ("scale", "folder"), [(1.0, "full"), (0.6, "scale-0.6"), (0.05, "scale-0.05")]
)
def test_scales_do_not_share_a_folder(tmp_path, scale, folder):
    one = planned("murgolo", "table1", tmp_path, scale=scale)
    assert one.root == tmp_path / "murgolo" / folder
    assert all(one.root in run.folder.parents for run in one.runs)


def test_a_trial_knows_no_grey_images(tmp_path):
    genuine = Images("tiny-imagenet", 98_179, 9_832, True)
    one = planned("skagerstrom2018", "table3", tmp_path, genuine)
    assert {run.config.data.grayscale for run in one.runs} == {"drop"}
    assert one.scaled["tiny-a"].train_images == 98_179
    trial = planned("skagerstrom2018", "table3", tmp_path, TRIAL)
    assert {run.config.data.grayscale for run in trial.runs} == {"rgb"}


def test_a_trial_s_digits_are_not_mirrored(tmp_path):
    """Nor by the modern recipe, which sees images of other kinds both ways."""
    for images, flipped in ((CIFAR, True), (TRIAL, False)):
        one = planned("murgolo", "table1", tmp_path, images, modern=True)
        modern = [run.config for run in one.runs if "modern" in run.variant.key]
        assert [config.optim.test_flip for config in modern] == [flipped]
        assert [config.optim.ema for config in modern] == [0.995]
        assert [config.optim.epochs for config in modern] == [20]


def test_rows_are_what_is_trained_and_a_table_has_all(tmp_path):
    one = planned("marie2019", "table1", tmp_path, rows=["table1-cnn-b", "table1-modern-cnn-a"])
    assert {run.variant.key for run in one.wanted} == {"table1-cnn-b", "table1-modern-cnn-a"}
    assert [row.key for row in one.rows][-1] == "table1-modern-cnn-a"
    assert len(one.rows) == 7
    # rows of the modern recipe stay in the table once they were begun
    (one.root / "table1-modern-cnn-a").mkdir(parents=True)
    assert len(planned("marie2019", "table1", tmp_path).rows) == 7
    report = REPORTS["marie2019"]
    check_rows(report.experiments, ReproduceOptions(rows=["full-cnn-a", "table1-modern-resnet18"]))


@pytest.mark.parametrize(
    ("images", "scale", "words"),
    [
        (CIFAR, 1.0, ""),
        (CIFAR, 0.1, "(scale 0.1)"),
        (TRIAL, 0.1, "(scale 0.1, trial on digits)"),
        (Images("part", 200, 50, True, False), 1.0, "(200 training images in all)"),
    ],
)
def test_every_figure_says_how_much_it_is(tmp_path, images, scale, words):
    one = planned("mao2022", "structure", tmp_path, images, scale=scale)
    drawn = draw(one, reached(one, {"mao-default": [(50.0, 90.0, 1)]}), tmp_path)
    for drawing in drawn:
        text = (tmp_path / f"{drawing.name}.svg").read_text()
        assert f"mao2022, sections 2.2 and 3, figures 2 to 7 {words}".strip() in text
        assert ("scale" in text) == (scale != 1)
