"""Which of a report's figures are drawn, and with which numbers."""

import pytest
from study_results import CIFAR, TRIAL, planned, reached

from fastcnn.reports import drawings
from fastcnn.reports.drawings import draw
from fastcnn.study.statistics import summarise

A = [(58.0, 94.1, 10), (59.5, 94.3, 10), (60.0, 94.6, 10)]


@pytest.fixture
def drawn(monkeypatch):
    """What was drawn, by the name of its file: title and content."""
    found = {}
    for name in ("draw_bars", "draw_losses", "draw_curves", "draw_panels"):
        monkeypatch.setattr(
            drawings, name, lambda folder, name, title, *rest: found.update({name: (title, *rest)})
        )
    return found


def test_bars_have_mean_interval_runs_and_what_was_published(drawn, tmp_path):
    one = planned("marie2019", "table1", tmp_path)
    draw(one, reached(one, {"table1-cnn-a": A, "table1-cnn-c": A[:1]}), tmp_path)
    title, [bar, single] = drawn["table1-top1"]
    assert title == "marie2019, table 1"
    expected = summarise([58.0, 59.5, 60.0], 1000, whole=100)
    assert bar.label == "CNN A"
    assert bar.ours == pytest.approx(expected.mean)
    assert bar.interval == pytest.approx(expected.interval)
    assert bar.points == pytest.approx((58.0, 59.5, 60.0))
    assert (bar.published, bar.published_range) == (59.3, (54.9, 62.6))
    assert (single.label, single.published, single.published_range) == ("CNN C", 33.3, None)


def test_a_trial_shows_no_published_bars(drawn, tmp_path):
    one = planned("marie2019", "table1", tmp_path, TRIAL)
    draw(one, reached(one, {"table1-cnn-a": A}), tmp_path)
    [bar] = drawn["table1-top1"][1]
    assert (bar.published, bar.published_range) == (None, None)
    assert drawn["table1-top1"][0] == "marie2019, table 1 (trial on digits)"


def test_every_row_that_has_runs_has_its_curves(drawn, tmp_path):
    one = planned("murgolo", "table1", tmp_path, CIFAR)
    keys = [one.rows[0].key, one.rows[2].key]
    found = draw(one, reached(one, dict.fromkeys(keys, A[:2])), tmp_path)
    labels = [one.rows[0].label, one.rows[2].label]
    for measure, title in (("loss", "Loss"), ("top1", "Top-1")):
        _, curves, shown = drawn[f"table1-panels-{measure}"]
        assert [curve.label for curve in curves] == labels
        assert [len(curve.histories) for curve in curves] == [2, 2]
        assert shown == measure
        assert title in [drawing.title for drawing in found]
    assert {drawing.name for drawing in found} == set(drawn)


def test_losses_are_those_of_all_rows(drawn, tmp_path):
    one = planned("mao2022", "structure", tmp_path)
    keys = [row.key for row in one.rows]
    draw(one, reached(one, dict.fromkeys(keys, A[:1])), tmp_path)
    _, curves = drawn["structure-losses"]
    assert [curve.label for curve in curves] == [row.label for row in one.rows]


def test_single_curves_are_of_one_row_each(drawn, tmp_path):
    one = planned("marie2019", "figure2", tmp_path)
    draw(one, reached(one, {one.rows[0].key: A[:1]}), tmp_path)
    title, [curve] = drawn[f"figure2-curves-{one.rows[0].key}"]
    assert title == f"marie2019, {one.experiment.place}: {one.rows[0].label}"
    assert curve.histories[0]["train_loss"] == [0.0]
