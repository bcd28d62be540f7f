"""The cache folder, and the lock between processes."""

import logging
import os
import tempfile

import fake_build
import pytest
from commands_apart import SMALL, command

from fastcnn.cache import LeftBehind, cache_dir, locked
from fastcnn.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "cache"))


def test_unwritable_cache_falls_back_with_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        folder = cache_dir()
        assert cache_dir() == cache_dir() == folder
    assert folder.parent == tmp_path
    assert caplog.text.count("file/cache") == 1
    assert folder.is_dir()


def test_no_cache_at_all_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / f"fastcnn-{os.getuid()}").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(DataError, match="set FASTCNN_CACHE"):
        cache_dir()


def test_no_place_for_temporary_files_is_an_error_too(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr("tempfile._candidate_tempdir_list", lambda: [str(tmp_path / "file")])
    with pytest.raises(DataError, match=r"TMPDIR: .*No usable temporary.*set FASTCNN_CACHE"):
        cache_dir()


class ReadOnlyHome:
    """The environment of a user whose home nobody can write to, not even root."""

    def __init__(self, temporary):
        self.temporary = str(temporary)

    def __call__(self):
        for name in ("FASTCNN_CACHE", "XDG_CACHE_HOME"):
            os.environ.pop(name, None)
        os.environ.update(HOME="/proc", TMPDIR=self.temporary)
        tempfile.tempdir = None


def test_a_home_that_is_read_only_stops_no_training(tmp_path):
    (tmp_path / "tmp").mkdir()
    words = [*SMALL, "--epochs", "1", "--output", str(tmp_path), "--name", "run"]
    with command(tmp_path / "log", *words, before=ReadOnlyHome(tmp_path / "tmp")) as process:
        assert process.ended() == 0, process.output
    other = tmp_path / "tmp" / f"fastcnn-{os.getuid()}"
    told = [line for line in process.output.splitlines() if line.startswith("cache folder /proc/")]
    assert len(told) == 1
    assert told[0].endswith(f"; using {other}")
    assert (tmp_path / "run" / "summary.json").is_file()
    assert any(other.iterdir())


def test_cache_folder_by_environment(tmp_path, monkeypatch):
    assert cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("FASTCNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "fastcnn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "fastcnn"


def never():
    raise AssertionError("nobody holds the lock")


class Held(Exception):
    """Raised instead of waiting."""


def held():
    raise Held


def test_a_lock_keeps_others_out_and_leaves_no_file(tmp_path):
    with locked(tmp_path / "lock", never):
        assert (tmp_path / "lock").exists()
        with pytest.raises(Held), locked(tmp_path / "lock", held):
            pass
    assert not (tmp_path / "lock").exists()
    with pytest.raises(KeyError), locked(tmp_path / "lock", never):
        raise KeyError
    with locked(tmp_path / "lock", never):
        pass


def test_a_link_is_no_lock(tmp_path):
    (tmp_path / "mine").write_text("what a lock would empty")
    (tmp_path / "lock").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "lock", never):
        pass
    assert (tmp_path / "mine").read_text() == "what a lock would empty"


def test_the_lock_of_a_dead_process_is_free(tmp_path):
    (tmp_path / "lock").write_text("what it left, half written")
    with locked(tmp_path / "lock", never):
        assert (tmp_path / "lock").read_text() == ""


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path):
    """Who waited for a lock file that its holder removed must lock the file that is there now."""
    waits = []

    def holder_leaves():
        waits.append(1)
        if len(waits) == 1:
            first.__exit__(None, None, None)
            second.__enter__()
        elif len(waits) == 2:
            raise Held

    first, second = (locked(tmp_path / "lock", never) for _ in range(2))
    first.__enter__()
    with pytest.raises(Held), locked(tmp_path / "lock", holder_leaves):
        pass
    second.__exit__(None, None, None)
    assert len(waits) == 2


def wait_for_lock(path, queue):
    def waiting():
        queue.put("waits")

    try:
        with locked(path, waiting):
            queue.put("got it")
    except LeftBehind as reason:
        queue.put(str(reason))


@pytest.mark.parametrize("left", ["", "a planted reason"])
def test_those_who_wait_hear_why_the_holder_gave_up(tmp_path, left):
    queues = [fake_build.FORK.Queue() for _ in range(2)]
    with locked(tmp_path / "lock", never) as lock:
        processes = [
            fake_build.FORK.Process(
                target=wait_for_lock, args=(tmp_path / "lock", queue), daemon=True
            )
            for queue in queues
        ]
        for process, queue in zip(processes, queues, strict=True):
            process.start()
            assert queue.get(timeout=fake_build.SECONDS) == "waits"
        lock.leave(left)
    for process, queue in zip(processes, queues, strict=True):
        heard = "waits"
        while heard == "waits":
            heard = queue.get(timeout=fake_build.SECONDS)
        assert heard == (left or "got it")
        process.join(fake_build.SECONDS)
    assert os.listdir(tmp_path) == []
