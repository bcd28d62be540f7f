"""Whole runs on small data: the run folder, selection, bad numbers, evaluation."""

import csv
import json
import re

import pytest
import torch
import yaml
from image_files import write_folder
from small_runs import (
    SMALL,
    assert_same,
    final_state,
    fixed_validation,
    start,
)

from fastcnn.config import PlaceConfig
from fastcnn.errors import CheckpointError, DataError, DiskError, NumbersError, UsageError
from fastcnn.recipes import resolve
from fastcnn.train import loop, run
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.rundir import COLUMNS, RunFolder
from fastcnn.train.setup import prepare


def test_run_folder_holds_what_the_readme_says(tmp_path):
    outcome = start(tmp_path, val_fraction=0.25)
    folder = outcome.folder.path
    files = {path.name for path in folder.iterdir()}
    assert files == {
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "summary.json",
        "last.pt",
        "last-2.pt",
        "best.pt",
        "checkpoints.json",
        "confusion_matrix.csv",
    }
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["epoch"] for row in rows] == ["1", "2"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary == outcome.summary
    assert summary["images"] == {"train": 48, "val": 16, "test": 40}
    assert 0 <= summary["test_top1"] <= summary["test_top5"] <= 1
    with (folder / "confusion_matrix.csv").open() as file:
        counts = [list(map(int, row[1:])) for row in list(csv.reader(file))[1:]]
    assert sum(map(sum, counts)) == 40
    assert sum(counts[i][i] for i in range(10)) == round(40 * summary["test_top1"])
    options = yaml.safe_load((folder / "config.yaml").read_text())
    assert options["seed"] == 0
    assert json.loads((folder / "environment.json").read_text())["command"] == ["test"]


SUMMARY_KEYS = [
    "arch",
    "parameters",
    "data",
    "epochs",
    "best_epoch",
    "val_top1",
    "val_top5",
    "test_top1",
    "test_top5",
    "test_loss",
    "train_seconds",
    "images_per_s",
    "backend",
    "loader",
    "device",
    "amp",
    "seed",
    "versions",
]


def test_summary_has_the_promised_keys_and_agrees_with_eval(tmp_path):
    outcome = start(tmp_path)
    assert set(SUMMARY_KEYS) <= outcome.summary.keys()
    assert outcome.summary["parameters"] == 116_938
    assert outcome.summary["validation_images"] == "test"
    found = run.evaluate_run(str(outcome.folder.path), overrides={"threads": 1})
    assert found["top1"] == outcome.summary["test_top1"]
    assert found["loss"] == pytest.approx(outcome.summary["test_loss"], rel=1e-6)
    assert found["images"] == 40


def test_saved_configuration_reproduces_the_run(tmp_path):
    first = start(tmp_path, "first", ema=0.9).folder.path
    options = yaml.safe_load((first / "config.yaml").read_text())
    place = PlaceConfig(output=str(tmp_path), name="second")
    second = run.start(resolve(options), place, ["test"], quiet=True).folder.path
    assert_same(final_state(first), final_state(second))


@pytest.mark.parametrize("seed", [1, 2])
def test_seed_changes_the_run(tmp_path, seed):
    first = final_state(start(tmp_path, "first").folder.path)
    other = final_state(start(tmp_path, "other", seed=seed).folder.path)
    assert not torch.equal(first["model"]["conv1.conv.weight"], other["model"]["conv1.conv.weight"])
    assert first["history"] != other["history"]


def test_evaluation_says_when_the_data_has_changed(tmp_path, caplog):
    images = write_folder(tmp_path / "images", splits=("",), count=10, side=32)
    options = {"data": str(images), "train_subset": None, "test_subset": None, "epochs": 1}
    folder = start(tmp_path, **options).folder.path
    run.evaluate_run(str(folder), overrides={"threads": 1})
    assert caplog.text == ""
    (images / "ant" / "0.png").unlink()
    run.evaluate_run(str(folder), overrides={"threads": 1})
    assert "has changed since training" in caplog.text
    with pytest.raises(UsageError, match="--test-fraction"):
        run.evaluate_run(str(folder), overrides={"test_fraction": 0.5})


def test_weights_that_are_not_finite_are_not_evaluated(tmp_path):
    folder = start(tmp_path, epochs=1).folder
    state = checkpoint.load(folder.last)
    state["model"]["fc2.linear.bias"].fill_(float("nan"))
    checkpoint.save(state, folder.last)
    with pytest.raises(NumbersError, match="broken weights"):
        run.evaluate_run(str(folder.path), overrides={"threads": 1})


def test_an_existing_folder_is_refused_and_untouched(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"run folder .*run exists; continue it with --resume"):
        start(tmp_path)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_unnamed_runs_are_numbered(tmp_path):
    names = [
        run.start(resolve(SMALL | {"epochs": 1}), PlaceConfig(str(tmp_path)), [], True).folder.path
        for _ in range(2)
    ]
    assert [path.name for path in names] == ["murgolo-improved-1", "murgolo-improved-2"]


def test_selection_by_the_test_images_is_refused(tmp_path):
    for options in ({"restore_best": True}, {"early_stop": 2}):
        with pytest.raises(UsageError, match="would choose by the test images"):
            start(tmp_path, **options)


def test_early_stopping_waits_for_its_patience(tmp_path, monkeypatch):
    fixed_validation(monkeypatch, [0.2, 0.5, 0.4, 0.5, 0.9])
    outcome = start(tmp_path, epochs=5, early_stop=2, val_fraction=0.25)
    assert (outcome.summary["epochs"], outcome.summary["best_epoch"]) == (4, 2)


def test_the_best_validation_model_is_tested(tmp_path, monkeypatch):
    fixed_validation(monkeypatch, [0.2, 0.9, 0.4])
    outcome = start(tmp_path, epochs=3, restore_best=True, val_fraction=0.25)
    assert (outcome.summary["tested_model"], outcome.summary["val_top1"]) == ("best", 0.9)
    best = checkpoint.load(outcome.folder.best)
    assert best["epoch"] == 2
    found = run.evaluate_run(str(outcome.folder.path), overrides={"threads": 1})
    assert found["loss"] == pytest.approx(outcome.summary["test_loss"], rel=1e-6)


@pytest.mark.parametrize("checkpoint_steps", [0, 1])
def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(
    tmp_path, monkeypatch, checkpoint_steps
):
    original = loop.TrainStep._work

    def poisoned(self, images, labels):
        original(self, images * float("nan") if self.step >= 3 else images, labels)

    monkeypatch.setattr(loop.TrainStep, "_work", poisoned)
    with pytest.raises(NumbersError, match=r"step 4 \(epoch 2\): the loss or a .*last\.pt"):
        start(tmp_path, checkpoint_steps=checkpoint_steps)
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert state["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


def test_a_last_batch_of_one_is_dropped_only_for_batch_norm(tmp_path):
    with_norm = start(tmp_path, "norm", train_subset=49, epochs=1)
    without = start(tmp_path, "plain", train_subset=49, epochs=1, arch="murgolo-base")
    steps = [checkpoint.load(o.folder.last)["step"] for o in (with_norm, without)]
    assert steps == [2, 3]


@pytest.mark.parametrize(("batch_size", "eval_batch_size"), [(25, 7), (100, 1000), (64, 40)])
def test_every_test_image_is_counted_once_whatever_the_batch(tmp_path, batch_size, eval_batch_size):
    sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
    outcome = start(tmp_path, epochs=1, **sizes)
    with (outcome.folder.path / "confusion_matrix.csv").open() as file:
        _, *rows = csv.reader(file)
    labels = prepare(resolve(SMALL | sizes)).dataset.test.labels
    counted = [sum(map(int, row[1:])) for row in rows]
    assert counted == torch.bincount(torch.from_numpy(labels), minlength=10).tolist()
    right = sum(int(row[1 + number]) for number, row in enumerate(rows))
    assert outcome.summary["test_top1"] == pytest.approx(right / 40)


def test_fast_dev_run_leaves_no_run_folder(tmp_path, monkeypatch):
    here, elsewhere = tmp_path / "here", tmp_path / "tmp"
    here.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(elsewhere))
    options = SMALL | {"fast_dev_run": True}
    outcome = run.start(resolve(options), PlaceConfig(), ["test"], quiet=True)
    assert outcome.summary["epochs"] == 1
    assert checkpoint.load(outcome.folder.last)["step"] == 1
    assert list(here.iterdir()) == []
    assert outcome.folder.path.parent.parent == elsewhere


def test_a_fast_dev_run_that_never_began_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = SMALL | {"fast_dev_run": True}
    for fault in ({"data": str(tmp_path / "missing")}, {"loggers": ["tensorbord"]}):
        with pytest.raises((DataError, UsageError)):
            run.start(resolve(options | fault), PlaceConfig(), ["test"], quiet=True)
    monkeypatch.setattr(run, "check_space", refuse_space)
    with pytest.raises(DiskError, match=str(tmp_path)):
        run.start(resolve(options), PlaceConfig(), ["test"], quiet=True)
    assert list(tmp_path.iterdir()) == []


def refuse_space(path, _):
    raise DiskError(f"{path}: too little space")


def test_deterministic_runs_are_bit_equal(tmp_path):
    code = {"deterministic": True, "epochs": 1}
    first = start(tmp_path, "first", **code).folder.path
    second = start(tmp_path, "second", **code).folder.path
    assert_same(final_state(first), final_state(second))


@pytest.mark.parametrize("normalize", ["zscore", "unit", "centered", "mean-image"])
def test_evaluation_uses_the_normalisation_of_the_run(tmp_path, normalize):
    outcome = start(tmp_path, epochs=1, normalize=normalize)
    found = run.evaluate_run(str(outcome.folder.last), split_name="test", overrides={"threads": 1})
    assert found["loss"] == pytest.approx(outcome.summary["test_loss"], rel=1e-6)


def test_evaluation_sees_images_both_ways_as_the_run_did(tmp_path):
    figures = {}
    for flip in (False, True):
        outcome = start(tmp_path, f"{flip}", test_flip=flip, epochs=1)
        summary = outcome.summary
        assert summary["test_flip"] is flip
        for given in ({}, {"test_flip": False}, {"test_flip": True}):
            found = run.evaluate_run(str(outcome.folder.path), overrides={"threads": 1} | given)
            expected = given.get("test_flip", flip)
            assert found["test_flip"] is expected
            assert found["loss"] == pytest.approx(figures.setdefault(expected, found["loss"]))
            if expected is flip:
                assert found["loss"] == pytest.approx(summary["test_loss"], rel=1e-6)
                assert found["top1"] == summary["test_top1"]
    assert figures[True] != pytest.approx(figures[False], rel=1e-3)


def test_a_frozen_first_layer_is_one_of_the_networks_parameters(tmp_path):
    options = {"arch": "mao-default", "whiten": True, "freeze_first": True}
    outcome = start(tmp_path, **options)
    assert outcome.summary["parameters"] == 256_058
    state = checkpoint.load(outcome.folder.last)
    first = prepare(resolve(SMALL | options)).model.state_dict()
    same = {name for name, value in first.items() if torch.equal(value, state["model"][name])}
    assert same == {"conv1.conv.weight", "conv1.conv.bias"}


def test_evaluation_on_other_data_needs_the_same_classes(tmp_path):
    image_folder = write_folder(tmp_path / "images")
    outcome = start(tmp_path, epochs=1)
    with pytest.raises(DataError, match="has 2 classes"):
        run.evaluate_run(str(outcome.folder.path), data=str(image_folder), overrides={"threads": 1})
    with pytest.raises(UsageError, match="--split val: digits has only train, test"):
        run.evaluate_run(str(outcome.folder.path), split_name="val", overrides={"threads": 1})


def test_run_folder_errors_name_the_file(tmp_path):
    folder = start(tmp_path, epochs=1).folder.path
    (folder / "config.yaml").write_text("lr: [1, 2")
    with pytest.raises(CheckpointError, match=re.escape("config.yaml")):
        RunFolder.open(folder).read_config()
