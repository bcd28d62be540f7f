"""Whole runs on small data: the run folder, resumption at every step, selection, bad numbers."""

import csv
import json
import re

import pytest
import torch
import yaml
from image_files import write_folder

from fastcnn.config import PlaceConfig
from fastcnn.errors import CheckpointError, DataError, NumbersError, UsageError
from fastcnn.recipes import resolve
from fastcnn.train import checkpoint, loop, run
from fastcnn.train.interrupt import Interrupted, StopAtStepEdge
from fastcnn.train.rundir import COLUMNS, RunFolder

# dropout and batch norm, so that every kind of state matters
SMALL = {
    "arch": "murgolo-improved",
    "data": "digits",
    "train_subset": 64,
    "test_subset": 40,
    "batch_size": 24,
    "eval_batch_size": 16,
    "epochs": 2,
    "threads": 1,
}
TIMED = {"images_per_s", "seconds"}


def start(tmp_path, name="run", **options):
    place = PlaceConfig(output=str(tmp_path), name=name)
    return run.start(resolve(SMALL | options), place, ["test"], quiet=True)


def resume(folder, **options):
    allow = options.pop("allow_changes", False)
    place = PlaceConfig(resume=str(folder), allow_changes=allow)
    return run.resume(place, options, ["test"], quiet=True)


def final_state(folder):
    """Everything that must be the same bit for bit: no times, no paths."""
    state = checkpoint.load(folder / "last.pt")
    rows = state["progress"]["history"]
    history = [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    return {
        "model": state["model"],
        "ema": state["ema"],
        "optimizer": state["optimizer"]["state"],
        "rng": state["rng"],
        "loader": state["loader"],
        "step": state["step"],
        "history": history,
    }


def assert_same(first, second):
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_same(first[name], second[name])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def stop_at_check(monkeypatch, number):
    """Make the `number`-th look at the signals find one (a look a step and an evaluation batch)."""
    looks = iter(range(1, 10_000))

    def check(self):
        if next(looks) == number:
            raise Interrupted(15)

    monkeypatch.setattr(StopAtStepEdge, "check", check)


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
        "best.pt",
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


RESUMED = {
    "ema": 0.9,
    "mixup": 0.4,
    "cutmix": 1.0,
    "rotation": 10.0,
    "flip": "alternating",
    "optimizer": "adam",
    "lr": 1e-3,
    "val_fraction": 0.25,
}


# 48 images in batches of 24: per epoch 2 looks while training, 1 while evaluating 16 images;
# then 3 looks while testing 40
@pytest.mark.parametrize("look", range(1, 10))
@pytest.mark.parametrize(("loader", "workers"), [("resident", 0), ("torch", 0), ("torch", 1)])
def test_stopped_anywhere_and_resumed_is_bit_equal(tmp_path, monkeypatch, look, loader, workers):
    if workers and look not in (1, 5):
        pytest.skip("two places show that worker processes change nothing")
    options = RESUMED | {"loader": loader, "workers": workers}
    whole = final_state(start(tmp_path, "whole", **options).folder.path)
    with monkeypatch.context() as patch:
        stop_at_check(patch, look)
        with pytest.raises(Interrupted):
            start(tmp_path, "broken", **options)
    outcome = resume(tmp_path / "broken")
    assert_same(whole, final_state(tmp_path / "broken"))
    reference = json.loads((tmp_path / "whole" / "summary.json").read_text())
    for key in ("test_top1", "test_loss", "val_loss", "best_epoch"):
        assert outcome.summary[key] == reference[key]


def test_resume_from_a_periodic_checkpoint_is_bit_equal(tmp_path, monkeypatch):
    whole = final_state(start(tmp_path, "whole").folder.path)

    class Killed(BaseException):
        pass

    original = loop.TrainStep.__call__

    def dies_at_step_five(self, images, labels):
        if self.step == 4:
            raise Killed
        original(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainStep, "__call__", dies_at_step_five)
        with pytest.raises(Killed):
            start(tmp_path, "broken", checkpoint_steps=2)
    assert checkpoint.load(tmp_path / "broken" / "last.pt")["step"] == 4
    resume(tmp_path / "broken", checkpoint_steps=0)
    assert_same(whole, final_state(tmp_path / "broken"))


def test_resume_refuses_other_options_and_lists_them(tmp_path):
    folder = start(tmp_path, epochs=1).folder.path
    with pytest.raises(UsageError, match=r"lr: 0.002 → 0.5; seed: 0 → 3.*--allow-changes"):
        resume(folder, lr=0.5, seed=3)
    with pytest.raises(UsageError, match="seed cannot change in mid-run; start a new run"):
        resume(folder, lr=0.5, seed=3, allow_changes=True)
    outcome = resume(folder, epochs=2, allow_changes=True)
    assert outcome.summary["epochs"] == 2
    with pytest.raises(UsageError, match="the run has trained for more already"):
        resume(folder, epochs=1, allow_changes=True)


def test_a_configuration_edited_by_hand_counts_as_a_change(tmp_path):
    folder = start(tmp_path, epochs=1).folder.path
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("lr: 0.002", "lr: 0.5"))
    with pytest.raises(UsageError, match=r"lr: 0.002 → 0.5"):
        resume(folder)


@pytest.mark.parametrize(
    "change", [{"weight_decay": 0.5}, {"momentum": 0.1}, {"nesterov": False}, {"lr": 1.0}]
)
def test_changed_hyperparameters_take_effect(tmp_path, monkeypatch, change):
    options = {"optimizer": "sgd", "lr": 0.05}
    states = []
    for name, changes in (("plain", {}), ("changed", change)):
        with monkeypatch.context() as patch:
            stop_at_check(patch, 4)
            with pytest.raises(Interrupted):
                start(tmp_path, name, **options)
        resume(tmp_path / name, **changes, allow_changes=True)
        states.append(final_state(tmp_path / name)["model"]["conv1.conv.weight"])
    assert not torch.equal(*states)


def test_an_interrupted_final_test_keeps_the_model_that_was_trained(tmp_path, monkeypatch):
    options = {"val_fraction": 0.25, "restore_best": True, "ema": 0.5, "epochs": 3}
    with monkeypatch.context() as patch:
        fixed_validation(patch, [0.9, 0.5, 0.4])
        whole = final_state(start(tmp_path, "whole", **options).folder.path)
    with monkeypatch.context() as patch:
        fixed_validation(patch, [0.9, 0.5, 0.4])
        stop_at_check(patch, 10)  # three looks an epoch: the first batch of the test
        with pytest.raises(Interrupted):
            start(tmp_path, "broken", **options)
    resume(tmp_path / "broken")
    assert_same(whole, final_state(tmp_path / "broken"))


DAMAGES = {
    "no optimiser": lambda state: state.pop("optimizer"),
    "no progress": lambda state: state.pop("progress"),
    "no configuration": lambda state: state.pop("config"),
    "odd configuration": lambda state: state.update(config={"lrr": 1}),
    "progress of another kind": lambda state: state.update(progress=[1, 2]),
    "another optimiser": lambda state: state["optimizer"].update(param_groups=[]),
    "no data": lambda state: state.update(data=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_with_odd_contents_is_named(tmp_path, damage):
    folder = start(tmp_path, epochs=1).folder
    state = checkpoint.load(folder.last)
    state["progress"]["epoch"] = 0
    DAMAGES[damage](state)
    checkpoint.save(state, folder.last)
    (folder.path / "summary.json").unlink()
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        resume(folder.path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_summary_is_named(tmp_path, text):
    folder = start(tmp_path, epochs=1).folder.path
    (folder / "summary.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"summary\.json"):
        resume(folder)


def test_a_resumption_is_recorded_beside_the_first_command(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_check(patch, 2)
        with pytest.raises(Interrupted):
            start(tmp_path)
    run.resume(PlaceConfig(resume=str(tmp_path / "run")), {}, ["again"], quiet=True)
    found = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (found["command"], found["resumed_by"]) == (["test"], [["again"]])


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


def test_resume_refuses_other_data(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_check(patch, 2)
        with pytest.raises(Interrupted):
            start(tmp_path)
    path = tmp_path / "run" / "last.pt"
    state = checkpoint.load(path)
    state["data"]["digest"] = "0" * 64
    checkpoint.save(state, path)
    with pytest.raises(CheckpointError, match=r"the data changed since \(digest\)"):
        resume(tmp_path / "run")


def test_a_finished_run_is_left_alone(tmp_path):
    outcome = start(tmp_path, epochs=1)
    before = {p.name: p.read_bytes() for p in outcome.folder.path.iterdir()}
    assert resume(outcome.folder.path).summary == outcome.summary
    assert {p.name: p.read_bytes() for p in outcome.folder.path.iterdir()} == before


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


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    whole = final_state(start(tmp_path, "whole").folder.path)
    folder = start(tmp_path, "broken").folder
    for name in ("last.pt", "best.pt", "summary.json", "metrics.csv"):
        (folder.path / name).unlink()
    resume(folder.path)
    assert_same(whole, final_state(folder.path))


def test_no_checkpoint_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        resume(tmp_path)


def test_selection_by_the_test_images_is_refused(tmp_path):
    for options in ({"restore_best": True}, {"early_stop": 2}):
        with pytest.raises(UsageError, match="would choose by the test images"):
            start(tmp_path, **options)


def fixed_validation(monkeypatch, values):
    """Let the epochs' validation top-1 be `values`, whatever the network does."""
    rows, original = iter(values), loop.Training._record

    def record(self, trained, evaluation):
        figures = evaluation.figures.__class__(1.0, next(rows), 1.0, evaluation.figures.images)
        original(self, trained, evaluation.__class__(figures, evaluation.confusion, 1.0))

    monkeypatch.setattr(loop.Training, "_record", record)


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
    original = loop.TrainStep.__call__

    def poisoned(self, images, labels):
        original(self, images * float("nan") if self.step >= 3 else images, labels)

    monkeypatch.setattr(loop.TrainStep, "__call__", poisoned)
    with pytest.raises(NumbersError, match=r"training loss is nan in epoch 2: .*last\.pt"):
        start(tmp_path, checkpoint_steps=checkpoint_steps)
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert state["step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state["model"].values())


def test_a_last_batch_of_one_is_dropped_only_for_batch_norm(tmp_path):
    with_norm = start(tmp_path, "norm", train_subset=49, epochs=1)
    without = start(tmp_path, "plain", train_subset=49, epochs=1, arch="murgolo-base")
    steps = [checkpoint.load(o.folder.last)["step"] for o in (with_norm, without)]
    assert steps == [2, 3]


def test_fast_dev_run_leaves_no_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = SMALL | {"fast_dev_run": True}
    outcome = run.start(resolve(options), PlaceConfig(), ["test"], quiet=True)
    assert outcome.summary["epochs"] == 1
    assert checkpoint.load(outcome.folder.last)["step"] == 1
    assert list(tmp_path.iterdir()) == []


def test_deterministic_runs_are_bit_equal(tmp_path):
    code = {"deterministic": True, "epochs": 1}
    try:
        first = start(tmp_path, "first", **code).folder.path
        second = start(tmp_path, "second", **code).folder.path
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(final_state(first), final_state(second))


@pytest.mark.parametrize("normalize", ["zscore", "unit", "centered", "mean-image"])
def test_evaluation_uses_the_normalisation_of_the_run(tmp_path, normalize):
    outcome = start(tmp_path, epochs=1, normalize=normalize)
    found = run.evaluate_run(str(outcome.folder.last), split_name="test", overrides={"threads": 1})
    assert found["loss"] == pytest.approx(outcome.summary["test_loss"], rel=1e-6)


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
