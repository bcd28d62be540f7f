"""Files written whole or not at all."""

import errno
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from fastcnn import files
from fastcnn.errors import DiskError
from fastcnn.train.checkpoints import checkpoint


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_name_at_the_end(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with files.replacing(path, b"new") as written:
        assert (written.read_bytes(), path.read_text()) == (b"new", "old")
        assert written.parent == tmp_path
    assert (path.read_text(), names(tmp_path)) == ("new", ["a"])


def test_what_the_block_refuses_is_not_kept(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(ValueError, match="wrong"), files.replacing(path, b"new"):
        raise ValueError("wrong")
    assert (path.read_text(), names(tmp_path)) == ("old", ["a"])


def test_it_is_on_the_disk_before_it_has_the_name(tmp_path, monkeypatch):
    order = []
    sync, replace = files.os.fsync, files.os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (order.append("sync"), sync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda *p: (order.append("name"), replace(*p)))
    files.replace_text(tmp_path / "a", "é")
    assert order == ["sync", "name"]
    assert (tmp_path / "a").read_bytes() == "é".encode()


def test_a_refusal_is_one_line_and_keeps_the_former_file(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(DiskError, match=r"cannot write .*folder: .* \(3 bytes needed, "):
        files.replace_bytes(tmp_path / "folder", b"new")
    with pytest.raises(DiskError, match=r"cannot write .*: No such file or directory$"):
        files.replace_bytes(tmp_path / "none" / "a", b"new")
    assert names(tmp_path) == ["folder"]


def test_a_full_disk_keeps_the_former_file(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    wanted = r"cannot write .*a: No space .*free\); the former one is kept"
    with pytest.raises(DiskError, match=wanted):
        files.replace_text(tmp_path / "a", "new")
    assert ((tmp_path / "a").read_text(), names(tmp_path)) == ("old", ["a"])


def read_only(*_, **__):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_read_only_disk_is_named_though_nothing_can_be_removed_there(tmp_path, monkeypatch):
    """Linux refuses to unlink there before it looks whether there is such a file."""
    monkeypatch.setattr(Path, "unlink", read_only)
    monkeypatch.setattr(Path, "open", read_only)
    with pytest.raises(DiskError, match=r"cannot write .*/a: Read-only file system \(3 bytes"):
        files.replace_text(tmp_path / "a", "new")


def test_a_former_checkpoint_that_cannot_be_kept_there_is_named_too(tmp_path, monkeypatch):
    checkpoint.save({"step": 1}, tmp_path / "last.pt", keep=2)
    for module, name in ((Path, "unlink"), (os, "link"), (shutil, "copyfile")):
        monkeypatch.setattr(module, name, read_only)
    with pytest.raises(DiskError, match=r"cannot keep .*last-2\.pt: Read-only file system"):
        checkpoint.save({"step": 2}, tmp_path / "last.pt", keep=2)


def test_what_a_killed_process_left_is_removed(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    ours, theirs = f".last.pt.{os.getpid()}.part", f".last.pt.{gone.pid}.part"
    for name in (ours, theirs, f".last.pt.{gone.pid}.former.part", "last.pt", ".mine.part"):
        (tmp_path / name).touch()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([ours, "last.pt", ".mine.part"])
