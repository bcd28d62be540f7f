"""Sweeps: values of options, their combinations, names of variants, the command."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastcnn.cli import main
from fastcnn.config import options_by_name
from fastcnn.errors import UsageError
from fastcnn.study import runner
from fastcnn.study.plan import RunResult, Variant, VariantResult
from fastcnn.study.sweep import MOST_VARIANTS, study_name, values_of, values_of_all, variants_of
from fastcnn.study.sweep_record import comparisons, plain_rows, record_of


@pytest.mark.parametrize(
    ("name", "given", "values"),
    [
        ("lr", ["0.1", "2e-3"], [0.1, 2e-3]),
        ("lr", 0.1, [0.1]),
        ("epochs", ["3"], [3]),
        ("amp", [], [True]),
        ("amp", ["true", "no"], [True, False]),
        ("amp", [False], [False]),
        ("arch", ["cnn-a", "cnn-b"], ["cnn-a", "cnn-b"]),
        ("milestones", ["30,45", "40"], [[30, 45], [40]]),
        ("milestones", [[30, 45], []], [[30, 45], []]),
        ("milestones", [30, 45], [[30, 45]]),
        ("train_subset", ["none", "100"], [None, 100]),
        ("flip", ["none", "random"], ["none", "random"]),
    ],
)
def test_values_are_read_as_the_option_says(name, given, values):
    found = values_of(options_by_name()[name], given)
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("lr", ["0.1", "fast"], "--lr: expected a number, got 'fast'"),
        ("lr", ["0.1", "0.10"], "--lr: 0.1 is given twice"),
        ("lr", [], "--lr: expected a number, got ''"),
        ("amp", ["maybe"], "--amp: expected true or false, got 'maybe'"),
        ("arch", [""], "--arch: expected a text, got none"),
        ("optimizer", ["sgd", "adma"], "--optimizer: 'adma' is not one of"),
        ("lr", ["none"], "--lr: expected a number, got 'none'"),
    ],
)
def test_wrong_values_are_one_line(name, given, words):
    with pytest.raises(UsageError) as caught:
        values_of(options_by_name()[name], given)
    assert words in str(caught.value)


def test_every_combination_once():
    values = {"arch": ["cnn-a", "cnn-b"], "lr": [0.1, 0.2], "epochs": [3], "amp": [True, False]}
    found = variants_of(values)
    assert len(found) == 8
    assert len({variant.key for variant in found}) == 8
    assert found[0].label == "cnn-a, lr 0.1, amp on"
    assert found[0].key == "cnn-a-lr-0.1-amp-on"
    assert found[0].options == {"arch": "cnn-a", "lr": 0.1, "epochs": 3, "amp": True}
    assert found[-1].label == "cnn-b, lr 0.2, amp off"
    assert study_name(values) == "arch-lr-amp"


def test_a_single_variant_is_named_after_its_network():
    [only] = variants_of({"arch": ["cnn-b"], "lr": [0.1]})
    assert (only.key, only.label) == ("cnn-b", "cnn-b")
    [default] = variants_of({})
    assert default.key == "vgg16"
    assert study_name({"arch": ["cnn-b"]}) == "single"


@given(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5, unique=True))
def test_folders_differ_whatever_the_values(texts):
    found = variants_of({"data": texts})
    keys = [variant.key for variant in found]
    assert len(set(keys)) == len(texts)
    assert all(key.replace("-", "").replace(".", "").replace("+", "").isalnum() for key in keys)
    assert all(not key.startswith((".", "-")) for key in keys)


def test_no_combination_is_left_out():
    found = variants_of({"batch_size": [*range(1, 41)], "epochs": [*range(1, 21)]})
    pairs = {(variant.options["batch_size"], variant.options["epochs"]) for variant in found}
    assert len(pairs) == len(found) == 800


def test_too_many_combinations():
    with pytest.raises(UsageError, match=f"at most {MOST_VARIANTS:,}"):
        variants_of({"batch_size": [*range(1, 50)], "epochs": [*range(1, 50)]})


def test_flags_stand_above_the_file(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("arch: [cnn-a, cnn-b]\nlr: 0.1\nseeds: 2\nmilestones: [[1, 2]]\n")
    own, values = values_of_all({"config": str(path), "lr": ["0.2", "0.3"]})
    assert own == {"seeds": 2}
    assert values == {"arch": ["cnn-a", "cnn-b"], "lr": [0.2, 0.3], "milestones": [[1, 2]]}


def test_an_unknown_name_in_the_file_is_one_line(tmp_path):
    path = tmp_path / "study.yaml"
    path.write_text("archs: [cnn-a]\n")
    with pytest.raises(UsageError, match=r"unknown option 'archs'; did you mean 'arch'\?"):
        values_of_all({"config": str(path)})


SMALL = ["sweep", "--arch", "mao-default", "--data", "digits", "--train-subset", "64"]
SMALL += ["--test-subset", "40", "--batch-size", "32", "--lr", "0.05", "0.1", "--epochs", "1"]
SMALL += ["--threads", "1", "--seeds", "2", "--backend", "torch", "--quiet"]


def test_the_command_trains_compares_and_writes(tmp_path, monkeypatch, capsys):
    words = [*SMALL, "--output", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "lr 0.05" in shown.out
    folder = tmp_path / "lr"
    record = json.loads((folder / "sweep.json").read_text())
    assert [row[0] for row in record["table"]["rows"]] == ["lr 0.05", "lr 0.1"]
    names = ("sweep.md", "sweep.csv", "sweep-runs.csv", "index.html", "sweep-top1.png")
    assert all((folder / name).stat().st_size for name in names)
    assert len((folder / "sweep-runs.csv").read_text().splitlines()) == 5

    def train(*arguments):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(runner, "train_one", train)
    assert main(words) == 0
    assert main([*words, "--seeds", "3", "--tables-only"]) == 0
    assert "4 of 6 runs are finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["--seeds", "0"], 2, "fastcnn: --seeds: must be at least 1, got 0"),
        (["--name", "a/b"], 2, "fastcnn: --name: expected the name of a folder, got 'a/b'"),
        (["--name", ".."], 2, "fastcnn: --name: expected the name of a folder, got '..'"),
        (["--seed", "3"], 2, "fastcnn: unknown option --seed; did you mean '--seeds'?"),
        (["--arch", "cnn-x"], 2, "fastcnn: unknown architecture 'cnn-x'"),
        (["--output", "/dev/null/x"], 2, "fastcnn: --output: cannot write into /dev/null/x"),
    ],
)
def test_mistakes_are_one_line(words, code, line, capsys):
    assert main([*SMALL, *words]) == code
    err = capsys.readouterr().err
    assert err.startswith(line)
    assert err.count("\n") == 1


def result(key, top1, top5=0.9):
    summary = {"images": {"test": 1000}, "images_per_s": 10.0, "epochs": 1, "train_seconds": 1.0}
    runs = tuple(
        RunResult(seed, None, summary | {"test_top1": value, "test_top5": top5})
        for seed, value in enumerate(top1)
    )
    return VariantResult(Variant(key, key, {}), runs)


def test_differences_are_those_from_the_first():
    found = [result("a", [0.5, 0.52, 0.51]), result("b", [0.6, 0.63, 0.62], 0.95)]
    [none, against] = comparisons(found)
    assert none is None
    assert against.difference == pytest.approx(100 * (0.6 + 0.63 + 0.62 - 0.5 - 0.52 - 0.51) / 3)
    record = record_of("x", found, [], [], ["x"], [])
    header, rows = record.table.header, record.table.rows
    assert rows[1][header.index("against the first")] == f"{against.difference:+.1f}"
    assert rows[1][header.index("top-5, %")] == "95.0"
    plain = plain_rows(found)
    assert plain[1]["difference"] == against.difference
    assert (plain[0]["top5_mean"], plain[1]["top5_mean"]) == pytest.approx((90.0, 95.0))


def test_holm_counts_every_variant():
    values = {"a": [0.5, 0.52, 0.51], "b": [0.53, 0.56, 0.53], "c": [0.54, 0.55, 0.56]}
    found = comparisons([result(key, top1) for key, top1 in values.items()])
    p = sorted(one.p for one in found[1:])
    assert sorted(one.p_holm for one in found[1:])[0] == pytest.approx(min(1, 2 * p[0]))
