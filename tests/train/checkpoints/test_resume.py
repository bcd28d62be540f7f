"""Runs stopped anywhere and taken up again: the same bits, or a refusal that says why."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from small_runs import (
    TIMED,
    assert_same,
    final_state,
    fixed_validation,
    resume,
    start,
    stop_at_check,
)

from fastcnn.config import PlaceConfig
from fastcnn.errors import CheckpointError, UsageError
from fastcnn.train import loop, run
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.interrupt import Interrupted

RESUMED = {
    "ema": 0.9,
    "mixup": 0.4,
    "cutmix": 1.0,
    "rotation": 10.0,
    "flip": "alternating",
    "optimizer": "adam",
    "lr": 1e-3,
    "val_fraction": 0.25,
    "precise_bn": "on",
}


# 48 images in batches of 24: per epoch 2 looks while training, 2 while batch norm's statistics are
# taken anew, 1 while evaluating 16 images; then 3 looks while testing 40
@pytest.mark.parametrize("look", range(1, 14))
@pytest.mark.parametrize(
    ("loader", "workers"),
    [
        ("resident", 0),
        pytest.param("torch", 0, marks=pytest.mark.full),
        pytest.param("torch", 1, marks=pytest.mark.full),
    ],
)
def test_stopped_anywhere_and_resumed_is_bit_equal(tmp_path, monkeypatch, look, loader, workers):
    if workers and look not in (1, 3, 7):
        pytest.skip("three places show that worker processes change nothing")
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


FIRST = {"whiten": True, "freeze_first": True, "test_flip": True, "ema": 0.9, "val_fraction": 0.25}


@pytest.mark.parametrize("look", [1, 4, 8])
def test_a_frozen_whitened_layer_is_resumed_bit_equal(tmp_path, monkeypatch, look):
    whole = final_state(start(tmp_path, "whole", **FIRST).folder.path)
    with monkeypatch.context() as patch:
        stop_at_check(patch, look)
        with pytest.raises(Interrupted):
            start(tmp_path, "broken", **FIRST)
    first = checkpoint.load(tmp_path / "broken" / "last.pt")["model"]
    resume(tmp_path / "broken")
    assert_same(whole, final_state(tmp_path / "broken"))
    for state in (whole["model"], whole["ema"]):
        assert torch.equal(state["conv1.conv.weight"], first["conv1.conv.weight"])
    assert not torch.equal(whole["model"]["conv1.norm.weight"], torch.ones(32))


@pytest.mark.parametrize("name", ["whiten", "freeze_first"])
def test_the_first_layers_treatment_cannot_change_in_mid_run(tmp_path, name):
    folder = start(tmp_path, epochs=1).folder.path
    with pytest.raises(UsageError, match=f"{name} cannot change in mid-run"):
        resume(folder, epochs=2, allow_changes=True, **{name: True})


def test_resume_from_a_periodic_checkpoint_is_bit_equal(tmp_path, monkeypatch):
    whole = final_state(start(tmp_path, "whole").folder.path)

    class Killed(BaseException):
        pass

    original = loop.TrainStep._work

    def dies_at_step_five(self, images, labels):
        if self.step == 4:
            raise Killed
        original(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(loop.TrainStep, "_work", dies_at_step_five)
        with pytest.raises(Killed):
            start(tmp_path, "broken", checkpoint_steps=2)
    assert checkpoint.load(tmp_path / "broken" / "last.pt")["step"] == 4
    resume(tmp_path / "broken", checkpoint_steps=0)
    assert_same(whole, final_state(tmp_path / "broken"))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, monkeypatch):
    whole = final_state(start(tmp_path, "whole").folder.path)
    folder = tmp_path / "broken"
    with monkeypatch.context() as patch:
        stop_at_check(patch, 8)
        with pytest.raises(Interrupted):
            start(tmp_path, "broken")
    cut = (folder / "last.pt").read_bytes()[:-1]
    (folder / "last.pt").write_bytes(cut)
    with pytest.raises(CheckpointError, match=r"truncated: .*last-2\.pt, of step 3, is whole"):
        resume(folder)
    (folder / "last.pt").unlink()
    with pytest.raises(
        CheckpointError, match=r"no checkpoint at .*last-2\.pt, of step 3, is whole"
    ):
        resume(folder)
    resume(folder / "last-2.pt")
    assert_same(whole, final_state(folder))


def test_going_back_keeps_the_good_checkpoint(tmp_path, monkeypatch):
    """What was damaged must not take the place of the one gone back to."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_at_check(patch, 8)
        with pytest.raises(Interrupted):
            start(tmp_path)
    (folder / "last.pt").write_bytes(b"damaged")
    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "train", lambda self: {})
        resume(folder / "last-2.pt")
    assert checkpoint.load(folder / "last.pt")["step"] == 3
    assert checkpoint.load(folder / "last-2.pt")["step"] == 3


def test_a_finished_run_goes_on_from_a_checkpoint_that_is_named(tmp_path):
    """So that one whose last checkpoint was damaged is whole again."""
    folder = start(tmp_path).folder.path
    whole = final_state(folder)
    resume(folder)
    assert checkpoint.load(folder / "last-2.pt")["step"] == 3
    (folder / "last.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last-2\.pt, of step 3, is whole: give that"):
        resume(folder)
    outcome = resume(folder / "last-2.pt")
    assert_same(whole, final_state(folder))
    assert outcome.summary == json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("best.pt", r"best\.pt: holds weights alone, .*; a run goes on from its folder, .*run$"),
        ("last-7.pt", r"no checkpoint at .*last-7\.pt; give"),
    ],
)
def test_what_no_run_goes_on_from_is_named(tmp_path, name, told):
    folder = start(tmp_path, epochs=1).folder.path
    with pytest.raises(CheckpointError, match=told):
        resume(folder / name)


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


@pytest.mark.full
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
    "another optimiser": lambda state: state["optimizer"].update(state={}),
    "no data": lambda state: state.update(data=None),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_checkpoint_with_odd_contents_is_named(tmp_path, damage):
    folder = start(tmp_path, epochs=1).folder
    state = checkpoint.load(folder.last)
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


@pytest.mark.parametrize(
    ("name", "told"),
    [("arch", "arch: vgg16 → murgolo-improved"), ("image_size", "image_size: 64 → 32")],
)
def test_resume_refuses_another_network(tmp_path, name, told):
    folder = start(tmp_path, epochs=1).folder
    state = checkpoint.load(folder.last)
    state["network"][name] = {"arch": "vgg16", "image_size": 64}[name]
    checkpoint.save(state, folder.last)
    (folder.path / "summary.json").unlink()
    with pytest.raises(CheckpointError, match=rf"the network changed since \({told}\); restore"):
        resume(folder.path)


def test_resuming_clears_what_a_kill_left(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_check(patch, 2)
        with pytest.raises(Interrupted):
            start(tmp_path)
    (tmp_path / "run" / ".last.pt.999999999.part").touch()
    resume(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".*"))


def test_resume_refuses_other_data(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_check(patch, 2)
        with pytest.raises(Interrupted):
            start(tmp_path)
    path = tmp_path / "run" / "last.pt"
    state = checkpoint.load(path)
    state["data"]["digest"] = "0" * 64
    checkpoint.save(state, path)
    with pytest.raises(
        CheckpointError, match=r"the data changed since \(digest: 0{47}… → \w{47}…\); restore it"
    ):
        resume(tmp_path / "run")


def test_a_finished_run_is_left_alone(tmp_path):
    outcome = start(tmp_path, epochs=1)
    before = {p.name: p.read_bytes() for p in outcome.folder.path.iterdir()}
    assert resume(outcome.folder.path).summary == outcome.summary
    assert {p.name: p.read_bytes() for p in outcome.folder.path.iterdir()} == before


def test_nothing_half_written_stays_in_a_finished_run(tmp_path):
    outcome = start(tmp_path, epochs=1)
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as gone:
        pass
    part = outcome.folder.path / f".metrics.csv.{gone.pid}.part"
    part.write_text("epoch")
    resume(outcome.folder.path)
    assert not part.exists()


def test_lost_sums_of_checkpoints_are_noted_again(tmp_path):
    """Also where nothing is left to train, and so no other checkpoint will be written."""
    folder = start(tmp_path, epochs=1).folder.path
    (folder / "summary.json").unlink()
    (folder / "checkpoints.json").unlink()
    resume(folder)
    with (folder / "last.pt").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(folder / "last.pt")


@pytest.mark.parametrize("name", ["metrics.csv", "confusion_matrix.csv"])
def test_a_finished_run_gets_a_lost_table_back(tmp_path, name):
    outcome = start(tmp_path, epochs=1)
    path = outcome.folder.path / name
    table = path.read_bytes()
    path.unlink()
    resume(outcome.folder.path)
    assert path.read_bytes() == table
    if name == "metrics.csv":
        path.write_bytes(b"\xf4garbage")
        resume(outcome.folder.path)
        assert path.read_bytes() == table


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    whole = final_state(start(tmp_path, "whole").folder.path)
    folder = start(tmp_path, "broken").folder
    for name in ("last.pt", "last-2.pt", "best.pt", "summary.json", "metrics.csv"):
        (folder.path / name).unlink()
    resume(folder.path)
    assert_same(whole, final_state(folder.path))


def test_no_checkpoint_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match="is not a run folder"):
        resume(tmp_path)


@pytest.mark.parametrize("damage", [b"\xf4garbage", None])
def test_resuming_writes_the_epochs_that_are_done_anew(tmp_path, monkeypatch, damage):
    """Of a run that was stopped in its final test nothing else would."""
    start(tmp_path, "whole")
    with monkeypatch.context() as patch:
        stop_at_check(patch, 7)
        with pytest.raises(Interrupted):
            start(tmp_path, "broken")
    metrics = tmp_path / "broken" / "metrics.csv"
    if damage:
        metrics.write_bytes(damage)
    else:
        metrics.unlink()
    resume(tmp_path / "broken")
    untimed = []
    for name in ("whole", "broken"):
        with (tmp_path / name / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        untimed.append([{k: v for k, v in row.items() if k not in TIMED} for row in rows])
    assert untimed[0] == untimed[1]


def test_epochs_without_figures_are_refused(tmp_path):
    folder = start(tmp_path, epochs=1).folder
    state = checkpoint.load(folder.last)
    for history in ([{}], 3):
        state["progress"] |= {"history": history}
        checkpoint.save(state, folder.last)
        (folder.path / "summary.json").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=r"last\.pt: holds epochs without their figures"):
            resume(folder.path)


def test_a_checkpoint_of_other_images_is_named(tmp_path):
    folder = start(tmp_path, epochs=1).folder
    state = checkpoint.load(folder.last)
    (folder.path / "summary.json").unlink()
    checkpoint.save(state | {"loader": {"epoch": 0, "position": 10**6}}, folder.last)
    with pytest.raises(CheckpointError, match=r"last\.pt: position 1000000 of epoch"):
        resume(folder.path)
    checkpoint.save(state | {"step": 10**400}, folder.last)
    with pytest.raises(CheckpointError, match=r"last\.pt: .*too (big|large)"):
        resume(folder.path)


def in_format_2(folder):
    """Write last.pt as it was written before skipped steps and ranks were known."""
    state = checkpoint.load(folder / "last.pt")
    for name in ("guard", "rng_of_ranks", "steps_per_epoch"):
        del state[name]
    state["sums"] = state["sums"][:4].clone()
    for row in state["progress"]["history"]:
        del row["skipped_steps"]
    torch.save(state | {"format": 2}, folder / "last.pt")
    (folder / "checkpoints.json").unlink()
    return state


@pytest.mark.parametrize("look", [2, 5, 8])
def test_a_checkpoint_of_the_format_before_goes_on_bit_equal(tmp_path, monkeypatch, look):
    whole = start(tmp_path, "whole")
    with monkeypatch.context() as patch:
        stop_at_check(patch, look)
        with pytest.raises(Interrupted):
            start(tmp_path)
    in_format_2(tmp_path / "run")
    resume(tmp_path / "run")
    assert_same(final_state(tmp_path / "run"), final_state(whole.folder.path))


def test_of_the_first_format_the_weights_are_left(tmp_path):
    start(tmp_path)
    state = in_format_2(tmp_path / "run")
    torch.save(state | {"format": 1}, tmp_path / "run" / "last.pt")
    assert run.evaluate_run(str(tmp_path / "run"), weights="last")["images"] == 40
    with pytest.raises(CheckpointError, match="holds weights alone"):
        resume(tmp_path / "run" / "last.pt")


@pytest.mark.parametrize("change", [{"epoch": "1"}, {"seconds": "1"}, {"best_value": "1"}])
def test_progress_that_is_no_number_is_refused(tmp_path, change):
    folder = start(tmp_path, epochs=1).folder
    (folder.path / "summary.json").unlink()
    state = checkpoint.load(folder.last)
    state["progress"] |= change
    checkpoint.save(state, folder.last)
    with pytest.raises(
        CheckpointError, match=r"last\.pt: not a checkpoint that this run can go on"
    ):
        resume(folder.path)
