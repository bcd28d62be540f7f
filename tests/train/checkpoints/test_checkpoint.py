"""Checkpoints are written whole, read safely, and fit or say why not."""

import os
import pickle
import shutil

import pytest
import torch
from torch import nn

from fastcnn.errors import CheckpointError
from fastcnn.train.checkpoints import checkpoint


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
    assert sorted(os.listdir(tmp_path)) == ["checkpoints.json", "last.pt"]


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


def saved(folder, *steps, keep=3):
    """last.pt after a save a step."""
    for step in steps:
        checkpoint.save({"step": step, "w": torch.full((50,), step)}, folder / "last.pt", keep)
    return folder / "last.pt"


def steps_in(folder):
    return {path.name: checkpoint.load(path)["step"] for path in sorted(folder.glob("*.pt"))}


def test_as_many_as_wanted_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4)
    assert steps_in(tmp_path) == {"last-2.pt": 3, "last-3.pt": 2, "last.pt": 4}
    saved(tmp_path, 5, keep=1)
    assert steps_in(tmp_path)["last.pt"] == 5
    assert sorted(os.listdir(tmp_path)) == ["checkpoints.json", "last-2.pt", "last-3.pt", "last.pt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_an_older_checkpoint_is_offered(tmp_path, damage):
    path = saved(tmp_path, 7, 8, 9)
    whole = path.read_bytes()
    words = {
        "cut": rf"last\.pt: truncated: 900 of {len(whole):,} bytes",
        "flipped": r"last\.pt: damaged: its part .*data/0 does not match",
        "gone": "no checkpoint at",
    }
    if damage == "cut":
        path.write_bytes(whole[:900])
    elif damage == "flipped":
        at = whole.index(torch.full((50,), 9).numpy().tobytes())
        path.write_bytes(whole[:at] + b"x" + whole[at + 1 :])
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=words[damage]) as caught:
        checkpoint.load(path)
    assert str(caught.value).endswith("last-2.pt, of step 8, is whole: give that")
    (tmp_path / "last-2.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last-3\.pt, of step 7, is whole"):
        checkpoint.load(path)


def test_a_bit_that_no_member_holds_is_seen_too(tmp_path):
    """The archive's padding has no checksum of its own."""
    path = saved(tmp_path, 1)
    whole = bytearray(path.read_bytes())
    whole[whole.index(b"ZZZZ")] ^= 1
    path.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"damaged: it is not what checkpoints\.json says"):
        checkpoint.load(path)


def test_checkpoints_may_be_renamed_and_taken_elsewhere(tmp_path):
    saved(tmp_path, 1, 2, 3)
    (tmp_path / "last-3.pt").replace(tmp_path / "last.pt")
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 1
    (tmp_path / "other").mkdir()
    (tmp_path / "last.pt").replace(tmp_path / "other" / "mine.pt")
    assert checkpoint.load(tmp_path / "other" / "mine.pt")["step"] == 1


@pytest.mark.parametrize("number", [2, 3])
def test_what_an_older_checkpoint_has_too_much_is_seen(tmp_path, number):
    """No part of the archive tells of it."""
    saved(tmp_path, 1, 2, 3)
    path = tmp_path / f"last-{number}.pt"
    whole = path.read_bytes()
    path.write_bytes(whole + bytes(700))
    with pytest.raises(CheckpointError, match=rf"last-{number}\.pt: damaged: it is not what"):
        checkpoint.load(path)
    (tmp_path / "mine-2.pt").write_bytes(whole + bytes(700))
    assert checkpoint.load(tmp_path / "mine-2.pt")["step"] == 4 - number
    (tmp_path / "checkpoints.json").unlink()
    assert checkpoint.load(path)["step"] == 4 - number


def test_an_older_checkpoint_is_known_however_long_it_stays(tmp_path):
    """Also one that was kept before fewer were wanted, and one that a user copied."""
    saved(tmp_path, 1, 2, 3)
    shutil.copy(tmp_path / "last.pt", tmp_path / "last-100.pt")
    saved(tmp_path, *range(4, 24), keep=1)
    assert steps_in(tmp_path) == {"last-100.pt": 3, "last-2.pt": 2, "last-3.pt": 1, "last.pt": 23}
    saved(tmp_path, 24)
    assert steps_in(tmp_path) == {"last-100.pt": 3, "last-2.pt": 23, "last-3.pt": 2, "last.pt": 24}
    (tmp_path / "last-3.pt").write_bytes((tmp_path / "last-3.pt").read_bytes() + b"x")
    with pytest.raises(CheckpointError, match=r"last-3\.pt: damaged"):
        checkpoint.load(tmp_path / "last-3.pt")


@pytest.mark.parametrize("text", ["", "[1]", '{"last.pt": 3}', '{"last.pt": [{"bytes": 1}]}'])
def test_damaged_sums_are_named_and_no_end_of_a_training(tmp_path, text):
    path = saved(tmp_path, 1)
    (tmp_path / "checkpoints.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"checkpoints\.json cannot be read .*; remove it"):
        checkpoint.load(path)
    saved(tmp_path, 2)
    assert steps_in(tmp_path) == {"last.pt": 2, "last-2.pt": 1}


@pytest.mark.parametrize("ends_at", ["replace", "link"])
def test_wherever_a_save_ends_a_whole_checkpoint_has_the_name(tmp_path, monkeypatch, ends_at):
    """As if the process were killed before each of its renames in turn."""

    class Killed(BaseException):
        pass

    for number in range(1, 9):
        path = saved(tmp_path, 1, 2, 3)
        calls, real = [], getattr(os, ends_at)

        def until(*arguments, calls=calls, real=real, number=number):
            calls.append(1)
            if len(calls) == number:
                raise Killed
            return real(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, ends_at, until)
            try:
                saved(tmp_path, 4)
            except Killed:
                assert steps_in(tmp_path)["last.pt"] == 3  # and all of them can be read
            else:
                break
        for left in tmp_path.iterdir():
            left.unlink()
    assert number > 1
    assert checkpoint.load(path)["step"] == 4


def test_a_disk_without_links_has_copies(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    saved(tmp_path, 1, 2, 3)
    assert steps_in(tmp_path) == {"last-2.pt": 2, "last-3.pt": 1, "last.pt": 3}
    monkeypatch.setattr(shutil, "copyfile", refuse)
    with pytest.raises(CheckpointError, match=r"cannot keep .*last-2\.pt: .*--keep-checkpoints 1"):
        saved(tmp_path, 4)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 3
    assert not list(tmp_path.glob(".*"))
    saved(tmp_path, 4, keep=1)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == 4


def test_the_newest_of_many_is_offered(tmp_path):
    path = saved(tmp_path, *range(1, 13), keep=12)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last-2\.pt, of step 11, is whole"):
        checkpoint.load(path)


def test_a_gap_hides_no_older_checkpoint(tmp_path):
    """A process may end between two of the renames."""
    path = saved(tmp_path, 1, 2, 3, keep=12)
    (tmp_path / "last-3.pt").rename(tmp_path / "last-12.pt")
    (tmp_path / "last-2.pt").unlink()
    (tmp_path / "last-x.pt").write_bytes(b"")
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"last-12\.pt, of step 1, is whole"):
        checkpoint.load(path)


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
    torch.save({"format": checkpoint.FORMAT + 1}, tmp_path / "newer.pt")
    torch.save({"format": 99}, tmp_path / "newest.pt")
    torch.save({"format": 0}, tmp_path / "none.pt")
    torch.save({"format": 2, "optimizer": {}, "progress": []}, tmp_path / "part.pt")
    expected = {
        "half.pt": "cut or damaged",
        "empty.pt": "cut or damaged",
        "absent.pt": "no checkpoint at",
        "foreign.pt": "not a checkpoint of fastcnn",
        "newer.pt": "newer than this fastcnn",
        "newest.pt": "newer than this fastcnn",
        "none.pt": "not a checkpoint of fastcnn",
        "part.pt": "not a checkpoint of format 2",
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
