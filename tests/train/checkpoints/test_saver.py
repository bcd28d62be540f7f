"""Checkpoints written in a thread: those of the moment, in order, whole, and their faults told."""

import threading

import pytest
import torch

from fastcnn.errors import DiskError
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.checkpoints.saver import Saver, snapshot


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path, monkeypatch):
    """Bit-equal to the synchronous save, whatever the steps do meanwhile."""
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    state = {"model": {"w": weight}, "step": 1, "history": [{"a": 0.5}], "pair": (weight[0], 2)}
    checkpoint.save(snapshot(state), tmp_path / "now.pt")
    go, real = threading.Event(), checkpoint.save

    def late(*arguments):
        assert go.wait(60)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save", late)
    with Saver() as writer:
        writer.save(state, tmp_path / "beside.pt")
        weight.zero_()
        state["history"][0]["a"] = 0.0
        go.set()
    assert (tmp_path / "beside.pt").read_bytes() == (tmp_path / "now.pt").read_bytes()
    assert checkpoint.load(tmp_path / "beside.pt")["model"]["w"].stride() == weight.stride()


def test_the_step_waits_for_no_more_than_the_save_before_the_last(tmp_path, monkeypatch):
    go, written = threading.Event(), []

    def slow(state, path, keep):
        assert go.wait(60)
        written.append(state["step"])

    monkeypatch.setattr(checkpoint, "save", slow)
    with Saver() as writer:
        writer.save({"step": 1}, tmp_path / "a")
        writer.save({"step": 2}, tmp_path / "a")
        assert written == []
        go.set()
        writer.save({"step": 3}, tmp_path / "a")
        assert written[:1] == [1]
        writer.wait()
        assert written == [1, 2, 3]


def ended(work):
    with Saver() as writer:
        writer.save({"step": 1}, "a")
        work(writer)


def test_a_disk_that_refuses_is_told(monkeypatch, caplog):
    def full(*_):
        raise DiskError("no space")

    monkeypatch.setattr(checkpoint, "save", full)
    for work in (lambda writer: None, Saver.wait):
        with pytest.raises(DiskError, match="no space"):
            ended(work)
    # nor does it hide what else ended the run
    with pytest.raises(KeyError):
        ended(lambda writer: {}["gone"])
    assert "note: no space" in caplog.text
