"""A run's folder has one process at a time that writes it, and holds no file of another place."""

import json
import signal

import pytest
from commands_apart import SMALL, command
from small_runs import resume, start

from fastcnn.errors import CheckpointError, DiskError, UsageError
from fastcnn.train import loop, rundir
from fastcnn.train.rundir import RunFolder

IN_USE = "run is in use: another process trains this run; wait for it, or stop it"


def hidden(folder):
    return [path.name for path in folder.glob(".*")]


def test_a_run_that_trains_is_not_resumed_beside_it(tmp_path, monkeypatch):
    """Neither one that has begun nor one that was taken up."""
    folder, tried, train = tmp_path / "run", [], loop.Training.train

    def resumed_meanwhile(self):
        with pytest.raises(UsageError, match=IN_USE) as caught:
            resume(folder)
        tried.append(caught.value.exit_code)
        return train(self)

    monkeypatch.setattr(loop.Training, "train", resumed_meanwhile)
    start(tmp_path, epochs=1)
    assert hidden(folder) == []
    resume(folder, epochs=2, allow_changes=True)
    assert tried == [2, 2]
    assert hidden(folder) == []


@pytest.mark.full
def test_a_run_whose_process_was_killed_is_free_at_once(tmp_path, monkeypatch):
    """Its loader's worker lives on for a while, and has what was open when it was forked."""
    folder = tmp_path / "run"
    words = [*SMALL, "--loader", "torch", "--workers", "1", "--epochs", "500"]
    words += ["--checkpoint-steps", "1", "--name", "run", "--output", str(tmp_path)]
    monkeypatch.setattr(loop.Training, "train", lambda self: {"taken up at": self.step.step})
    with command(tmp_path / "log", *words) as process:
        process.wait_for((folder / "last.pt").exists)
        with pytest.raises(UsageError, match=IN_USE):
            resume(folder)
        process.send(signal.SIGKILL)
        assert process.ended() == -signal.SIGKILL
        assert ".lock" in hidden(folder)
        assert resume(folder).summary["taken up at"] >= 1
    assert hidden(folder) == []


def test_a_folder_that_cannot_be_written_needs_no_lock(tmp_path, monkeypatch):
    outcome = start(tmp_path, epochs=1)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(rundir, "locked", refuse)
    with pytest.raises(DiskError, match=r"cannot write .*run/\.lock: Read-only file system"):
        resume(outcome.folder.path)
    monkeypatch.setattr(rundir.os, "access", lambda *_: False)
    assert resume(outcome.folder.path).summary == outcome.summary


def test_ranks_that_write_nothing_need_no_lock(tmp_path):
    with RunFolder(tmp_path).claimed(), RunFolder(tmp_path, writes=False).claimed():
        pass


@pytest.mark.parametrize("name", ["environment.json", "summary.json"])
def test_resuming_takes_nothing_over_from_behind_a_link(tmp_path, name):
    """What is written anew would hold it for good."""
    folder, secret = start(tmp_path, epochs=1).folder.path, tmp_path / "secret.json"
    secret.write_text(json.dumps({"token": "of the reader"}))
    (folder / name).unlink()
    (folder / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=rf"{name} is a link, which may lead out of the run"):
        resume(folder, epochs=2, allow_changes=True)
    assert json.loads(secret.read_text()) == {"token": "of the reader"}
