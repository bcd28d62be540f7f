"""Checkpoints are written whole, read safely, and fit or say why not."""

import os
import pickle

import pytest
import torch
from torch import nn

from fastcnn.errors import CheckpointError
from fastcnn.train import checkpoint


def test_round_trip_keeps_values_and_strides(tmp_path):
    weight = torch.randn(8, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    checkpoint.save({"model": {"w": weight}, "step": 3, "history": [{"a": 0.5}]}, tmp_path / "a.pt")
    state = checkpoint.load(tmp_path / "a.pt")
    assert torch.equal(state["model"]["w"], weight)
    assert state["model"]["w"].stride() == weight.stride()
    assert (state["step"], state["history"]) == (3, [{"a": 0.5}])


def test_a_failed_save_keeps_the_former_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save({"step": 1}, path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    words = r"No space left on device \([\d,]+ bytes needed, [\d,]+ free\); the former one is kept"
    with pytest.raises(CheckpointError, match=words):
        checkpoint.save({"step": 2}, path)
    assert checkpoint.load(path)["step"] == 1
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save({"model": {"w": torch.arange(500.0)}}, path)
    whole = bytearray(path.read_bytes())
    refused = 0
    for place in range(0, len(whole), 7):
        whole[place] ^= 16
        path.write_bytes(whole)
        try:
            assert torch.equal(checkpoint.load(path)["model"]["w"], torch.arange(500.0))
        except CheckpointError:
            refused += 1
        whole[place] ^= 16
    assert refused > 500 * 4 / 7


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_that_would_execute_is_refused(tmp_path):
    witness = tmp_path / "executed"
    torch.save({"format": 1, "model": Malicious(str(witness))}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(str(witness))))
    with pytest.raises(CheckpointError, match="not a checkpoint that is safe to load"):
        checkpoint.load(tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint, or cut or damaged"):
        checkpoint.load(tmp_path / "plain.pt")
    assert not witness.exists()


def test_damaged_missing_foreign_and_newer_files_are_named(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save({"model": {"w": torch.randn(1000)}}, path)
    whole = path.read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save([1, 2], tmp_path / "foreign.pt")
    torch.save({"format": 99}, tmp_path / "newer.pt")
    expected = {
        "half.pt": "cut or damaged",
        "empty.pt": "cut or damaged",
        "absent.pt": "no checkpoint at",
        "foreign.pt": "not a checkpoint of fastcnn",
        "newer.pt": "newer than this fastcnn",
    }
    for name, words in expected.items():
        with pytest.raises(CheckpointError, match=words) as caught:
            checkpoint.load(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_weights_that_do_not_fit_are_listed_and_none_is_loaded(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {name: tensor + 1 for name, tensor in before.items()}
    weights["1.weight"] = torch.zeros(5, 4)
    weights["2.bias"] = weights.pop("0.bias")
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(model, weights, tmp_path)
    text = str(caught.value)
    assert "0.bias is missing" in text
    assert "2.bias is unknown" in text
    assert "1.weight is (5, 4) instead of (2, 4)" in text
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_locate_takes_a_folder_or_a_file(tmp_path):
    checkpoint.save({}, tmp_path / "best.pt")
    assert checkpoint.locate(tmp_path, "best.pt") == checkpoint.locate(tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        checkpoint.locate(tmp_path)
