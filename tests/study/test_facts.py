"""What stands beside a study's figures: machine, versions, images, what is missing."""

from study_results import planned, reached

from fastcnn.study.facts import facts_of, missing_runs, plain_runs
from fastcnn.study.plan import RunResult


def run(**summary):
    return RunResult(0, None, summary)


def test_what_differs_between_runs_stands_there_once_each():
    own = {"device": "cpu", "precision": "fp32", "backend": "fused", "data": "digits"}
    runs = [
        run(**own, versions={"torch": "2.11"}),
        run(**own, versions={"torch": "2.11"}),
        run(**own | {"device": "gpu", "precision": "bf16"}, versions={"torch": "2.12"}),
    ]
    found = dict(facts_of(runs, ["fastcnn", "sweep", "a b", "--tables-only"]))
    assert found["command"] == "fastcnn sweep 'a b'"
    assert found["machine"] == "cpu, gpu"
    assert found["precision"] == "fp32, bf16"
    assert found["backend"] == "fused"
    assert found["torch"] == "2.11, 2.12"
    assert found["images"] == "digits"


def test_without_a_run_there_are_no_facts_of_runs():
    assert set(dict(facts_of([], ["fastcnn"]))) == {"command", "date", "commit"}


def test_missing_runs_are_named_by_row_and_seed(tmp_path):
    one = planned("marie2019", "table1", tmp_path)
    five = [(50, 90, 1)] * 5
    slipped = {f"table1-cnn-{x}-slip": five for x in "ab"}
    results = reached(one, {"table1-cnn-a": five, "table1-cnn-b": five[1:]} | slipped)
    assert missing_runs(one.runs, [*results.values()]) == (
        "19 of 22 runs are finished; "
        "missing: table1-cnn-c seed 0, table1-cnn-c-slip seed 0, table1-cnn-b seed 4"
    )
    results = reached(one, {})
    assert missing_runs(one.runs, [*results.values()]).endswith(" and 17 more")
    assert missing_runs(one.runs[:0], []) == ""


def test_each_run_has_a_line_of_its_own(tmp_path):
    one = planned("marie2019", "table1", tmp_path)
    results = reached(one, {"table1-cnn-a": [(50, 90, 1), (60, 91, 2)]})
    lines = plain_runs([*results.values()])
    assert [(line["variant"], line["seed"], line["test_top1"]) for line in lines] == [
        ("table1-cnn-a", 0, 0.5),
        ("table1-cnn-a", 1, 0.6),
    ]
    assert lines[1]["train_seconds"] == 2
