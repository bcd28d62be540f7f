"""murgolo's out-of-distribution table from single runs' figures."""

from pathlib import Path

import numpy as np
import pytest
from study_results import TRIAL, planned, reached

from fastcnn.errors import DataError
from fastcnn.insight.ood.ood import Detection, Result
from fastcnn.insight.ood.ood_scores import Scores
from fastcnn.reports import murgolo_ood
from fastcnn.study.runner import Failure

NAMES = ("ReLU-2", "ReLU-9", "max softmax", "energy")


def found(shift):
    """A detection whose figures are all different: tenths by score, thousandths by run."""
    rows = {}
    for number, name in enumerate(NAMES):
        shares = [0.1 * number + 0.01 * place + 0.001 * shift for place in range(8)]
        rows[name] = Detection(*shares)
    scores = Scores({"ReLU-2": np.zeros(2), "ReLU-9": np.ones(3)}, np.zeros(3), np.zeros(3))
    return Result(rows, scores, scores, scores, (), "energy", ("said of the run",))


@pytest.fixture
def asked(monkeypatch):
    calls, drawn = [], []

    def detect(folder, out_data, **rest):
        calls.append((folder, out_data, rest))
        return found(2 * len(calls) - 1)  # 1, 3

    monkeypatch.setattr(murgolo_ood, "detect", detect)
    monkeypatch.setattr(murgolo_ood, "draw_histogram", lambda *given: drawn.append(given))
    return calls, drawn


@pytest.fixture
def one(tmp_path):
    return planned("murgolo", "ood", tmp_path)


def record(one, runs=2, failures=(), ood_data="path/to/others", machine=None):
    [row] = one.rows
    results = reached(one, {row.key: [(60.0, 95.0, 1)] * runs})
    return murgolo_ood.record_of(one, results, list(failures), ood_data, machine or {}, ["fastcnn"])


def test_each_figure_is_the_mean_of_the_runs_in_its_place(one, asked):
    said, rows, by_run = record(one)
    assert [line[0] for line in said.table.rows] == [
        "mean activation of ReLU-2",
        "mean activation of ReLU-9",
        "max softmax",
        "energy",
    ]
    # the mean shift is 2: threshold 0.102, accuracy 0.112, balanced 0.122, AUROC 0.132, FPR 0.142
    assert said.table.rows[1][1:] == ("11.2", "12.2", "13.2", "14.2", "0.102")
    assert rows[1]["n"] == 2
    assert rows[1]["accuracy"] == pytest.approx(0.112)
    assert [line["seed"] for line in by_run] == [0] * 4 + [1] * 4
    assert by_run[5]["auroc"] == pytest.approx(0.133)
    assert "tells cifar10 from others; means of 2 runs." in said.lead


def test_each_run_is_asked_for_as_many_images_as_it_was_tested_on(one, asked):
    record(one, machine={"threads": 1, "output": "x", "bad_limit": 0.5})
    [(folder, data, rest), _] = asked[0]
    assert folder.endswith("seed-0")
    assert data == "path/to/others"
    assert rest == {"limit": 1000, "overrides": {"threads": 1, "bad_limit": 0.5}}


def test_the_figure_is_of_the_last_activation_of_the_first_run(one, asked):
    said, _, _ = record(one)
    [(folder, name, title, groups, threshold)] = asked[1]
    assert (folder, name) == (one.root, "ood-histogram")
    assert title == "murgolo, figure 8: mean activation of ReLU-9"
    assert groups == {"in distribution": [1, 1, 1], "out of distribution": [1, 1, 1]}
    assert threshold == pytest.approx(0.101)
    assert said.drawings[0].name == "ood-histogram"


def test_what_failed_or_is_missing_is_said(one, asked):
    said, rows, _ = record(one, runs=0, failures=[Failure(one.runs[0], "the loss is nan")])
    assert said.table.rows == ()
    assert rows == []
    assert said.sentences[0] == "no run is finished"
    assert f"{one.runs[0].name} failed: the loss is nan" in said.sentences
    assert any(line.startswith("0 of ") for line in said.sentences)
    assert asked[1] == []


def test_foreign_images_are_read_before_anything_is_trained(tmp_path):
    with pytest.raises(DataError):
        murgolo_ood.check(TRIAL, str(tmp_path), {})
    murgolo_ood.check(TRIAL, "digits", {})  # told in the table: a trial has no foreign images


def test_own_images_are_not_foreign(tmp_path, asked):
    one = planned("murgolo", "ood", Path(tmp_path), TRIAL)
    said, _, _ = record(one, ood_data="digits")
    assert said.sentences[0] == "digits are no foreign images here: give --ood-data"
    assert asked[0] == []
