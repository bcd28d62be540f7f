"""What a forged checkpoint says of a run is refused, in one line, before anything is trained."""

import copy

import pytest
import torch
from small_runs import resume, start

from fastcnn.errors import CheckpointError, NumbersError
from fastcnn.train.checkpoints import checkpoint


def progress(**changes):
    return lambda state: state["progress"].update(changes)


def history(**changes):
    return lambda state: state["progress"]["history"][0].update(changes)


def moment(value):
    def forge(state):
        state["optimizer"]["state"]["momentum"]["conv1.conv.weight"] = value

    return forge


def half_a_step(state):
    state["step"] = 2.5
    state["progress"] |= {"epoch": 0, "history": [], "best_epoch": 0, "best_value": None}


FORGED = {
    "infinite sums": (lambda state: state["sums"].fill_(torch.inf), "sums"),
    "negative sums": (lambda state: state["sums"].fill_(-1), "sums"),
    "one sum": (lambda state: state.update(sums=torch.ones(1)), "sums"),
    "a negative step": (lambda state: state.update(step=-5), "step -5"),
    "half a step": (half_a_step, "step 2.5"),
    "a step of another epoch": (lambda state: state.update(step=2), "step 2"),
    "a negative epoch": (progress(epoch=-3), "epoch -3"),
    "an epoch without figures": (progress(epoch=2), "epoch 2"),
    "an epoch half done and over": (progress(trained=True), "trained True"),
    "trained as text": (progress(trained="yes"), "trained yes"),
    "a time that is none": (progress(seconds=float("inf")), "seconds inf"),
    "a time before": (progress(seconds=-1.0), "seconds -1"),
    "a best epoch to come": (progress(best_epoch=99), r"best \(99"),
    "no best epoch": (progress(best_epoch=0), r"best \(0"),
    "no best figure": (progress(best_value=None), r"best \(1, None"),
    "a best figure that is none": (progress(best_value=float("nan")), r"best \(1, nan"),
    "a figure as text": (history(val_top1="0.9"), "epochs without their figures"),
    "a figure that is none": (history(val_loss=float("inf")), "epochs without their figures"),
    "a figure beyond floats": (history(seconds=10**400), "epochs without their figures"),
    "an epoch of another number": (history(epoch=7), "epochs without their figures"),
    "a moment for all weights": (moment(torch.tensor(1.0)), r"a tensor is \(\) instead of"),
    "a moment that is none": (moment(3), "not a checkpoint that this run can go on from"),
    "a count of steps for each": (
        lambda state: state["optimizer"].update(steps=torch.ones(1)),
        r"a tensor is \(1,\) instead of \(\)",
    ),
    "one count of skipped steps": (
        lambda state: state["guard"].update(counts=torch.zeros(1)),
        r"a tensor is \(1,\) instead of \(3,\)",
    ),
    "counts that are none": (lambda state: state["guard"]["counts"].fill_(torch.nan), "counts of"),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = start(tmp_path_factory.mktemp("runs"), epochs=1, optimizer="sgd").folder
    return folder, checkpoint.load(folder.last)


def forged(folder, state):
    """Put a state into the folder of a run that is not finished, with no sums beside it."""
    torch.save(state, folder.last)
    for name in ("summary.json", "checkpoints.json"):
        (folder.path / name).unlink(missing_ok=True)


@pytest.mark.full
@pytest.mark.parametrize("kind", FORGED)
def test_what_no_run_arrives_at_is_refused(trained, kind):
    folder, whole = trained
    forge, told = FORGED[kind]
    state = copy.deepcopy(whole)
    forge(state)
    forged(folder, state)
    with pytest.raises(CheckpointError, match=rf"last\.pt: .*{told}.*; give an older") as caught:
        resume(folder.path)
    assert len(str(caught.value)) < 400
    assert not (folder.path / "summary.json").exists()


def test_what_a_run_arrived_at_is_taken_up(trained):
    """The test above refuses nothing for another reason."""
    folder, whole = trained
    forged(folder, whole)
    assert resume(folder.path).summary["epochs"] == 1


def test_an_epoch_of_a_dev_run_has_one_step(tmp_path):
    folder = start(tmp_path, fast_dev_run=True).folder.path
    (folder / "summary.json").unlink()
    assert resume(folder).summary["epochs"] == 1


def test_a_test_loss_that_is_not_finite_ends_the_run(trained):
    """After figures of the validation that are."""
    folder, whole = trained
    state = copy.deepcopy(whole)
    for weight in state["model"].values():
        weight.fill_(torch.nan if weight.is_floating_point() else 0)
    forged(folder, state)
    with pytest.raises(NumbersError, match="test loss is nan in epoch 1: ") as caught:
        resume(folder.path)
    assert caught.value.exit_code == 6
    assert not (folder.path / "summary.json").exists()
