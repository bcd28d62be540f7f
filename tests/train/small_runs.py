"""Small runs for the tests: start, stop, resume and compare them bit for bit."""

import torch

from fastcnn.config import PlaceConfig
from fastcnn.recipes import resolve
from fastcnn.train import loop, run
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.interrupt import Interrupted, StopAtStepEdge

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
    "precise_bn": "off",  # its batches would be further looks of `stop_at_check`
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


def fixed_validation(monkeypatch, values):
    """Let the epochs' validation top-1 be `values`, whatever the network does."""
    rows, original = iter(values), loop.Training._record

    def record(self, trained, figures, seconds):
        original(self, trained, figures.__class__(1.0, next(rows), 1.0, figures.images), seconds)

    monkeypatch.setattr(loop.Training, "_record", record)
