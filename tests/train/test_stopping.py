"""Ctrl-C and SIGTERM in every phase of a command, once and twice, and its death without either."""

import contextlib
import os
import signal
import time

import pytest
from commands_apart import SMALL, Apart, command, members
from image_files import write_folder

from fastcnn import cli
from fastcnn.cache import cache_dir
from fastcnn.data import examine
from fastcnn.data.loaders import torch_loader
from fastcnn.ops.native.compile import Signals
from fastcnn.signals import REPEATED_S
from fastcnn.train import loop
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.interrupt import StopAtStepEdge

STOPS = [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
HANGS = 600
AT_ONCE = 3  # seconds, on a busy machine too


def train(tmp_path, *words, before=None):
    words = [*SMALL, *words, "--name", "run", "--output", str(tmp_path)]
    return command(tmp_path / "log", *words, before=before)


def parts(folder):
    return [path.name for path in folder.rglob("*") if ".part" in path.name]


def slow_images():
    original = examine.decode

    def decode(data):
        time.sleep(0.01)
        return original(data)

    examine.decode = decode


@pytest.mark.full
@pytest.mark.parametrize(("signum", "code"), [*STOPS, (signal.SIGHUP, 129)])
def test_while_preparing_nothing_is_left(tmp_path, root, own_cache, signum, code):
    words = ["train", "--data", str(write_folder(root, count=200)), "--output", str(tmp_path)]
    with command(tmp_path / "log", *words, before=slow_images) as process:
        process.wait_for(lambda: list(cache_dir().glob(".tmp-*/*")))
        process.send(signum)
        assert process.ended() == code
    said = "interrupted" if signum == signal.SIGINT else f"stopped by {signum.name}"
    assert process.output.splitlines()[-1] == f"fastcnn: {said}"
    assert "Traceback" not in process.output
    assert list(cache_dir().iterdir()) == []
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "images", "log"}


def slow_evaluation():
    original = StopAtStepEdge.check, loop.Training._evaluate

    def evaluate(self, *arguments):
        (self.folder.path / "evaluating").touch()
        StopAtStepEdge.check = lambda stop: (time.sleep(0.05), original[0](stop))
        return original[1](self, *arguments)

    loop.Training._evaluate = evaluate


@pytest.mark.full
@pytest.mark.parametrize(("signum", "code"), STOPS)
def test_while_evaluating_the_epoch_is_saved(tmp_path, signum, code):
    words = ["--epochs", "2", "--eval-batch-size", "2"]
    with train(tmp_path, *words, before=slow_evaluation) as process:
        process.wait_for((tmp_path / "run" / "evaluating").exists)
        process.send(signum)
        assert process.ended() == code
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert (state["step"], state["progress"]["epoch"], state["progress"]["trained"]) == (6, 0, True)
    assert parts(tmp_path) == []
    assert process.output.splitlines()[-1] == f"fastcnn: stopped by {signal.Signals(signum).name}"


def slow_saves():
    original = checkpoint.save

    def save(state, path, keep=1):
        (path.parent / "saving").touch()
        time.sleep(0.3)
        original(state, path, keep)

    checkpoint.save = save


@pytest.mark.parametrize(("signum", "code"), STOPS)
def test_while_saving_the_last_step_is_saved_too(tmp_path, signum, code):
    words = ["--epochs", "50", "--checkpoint-steps", "2"]
    with train(tmp_path, *words, before=slow_saves) as process:
        process.wait_for((tmp_path / "run" / "saving").exists)
        process.send(signum)
        assert process.ended() == code
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert 2 < state["step"] < 10
    assert parts(tmp_path) == []


def second_save_hangs():
    original = checkpoint.save

    def save(state, path, keep=1):
        if path.exists():
            (path.parent / "hangs").touch()
            time.sleep(HANGS)
        original(state, path, keep)

    checkpoint.save = save


def assert_stopped_by_the_second(process, signum, code):
    process.send(signum)
    time.sleep(REPEATED_S + 0.1)
    assert process.alive
    begin = time.monotonic()
    process.send(signum)
    assert process.ended() == code
    assert time.monotonic() - begin < AT_ONCE


@pytest.mark.parametrize(("signum", "code"), STOPS)
def test_a_second_signal_waits_for_no_save(tmp_path, signum, code):
    words = ["--epochs", "50", "--checkpoint-steps", "1"]
    with train(tmp_path, *words, before=second_save_hangs) as process:
        process.wait_for((tmp_path / "run" / "hangs").exists)
        assert_stopped_by_the_second(process, signum, code)
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] == 1


def hanging_image():
    def decode(data):
        try:
            time.sleep(HANGS)
        finally:
            time.sleep(HANGS)

    examine.decode = decode


@pytest.mark.parametrize(("signum", "code"), STOPS)
def test_a_second_signal_waits_for_no_clearing_up(tmp_path, root, own_cache, signum, code):
    words = ["train", "--data", str(write_folder(root)), "--output", str(tmp_path)]
    with command(tmp_path / "log", *words, before=hanging_image) as process:
        process.wait_for(lambda: list(cache_dir().glob(".tmp-*")))
        time.sleep(0.2)
        assert_stopped_by_the_second(process, signum, code)


def hang_in_a_build(ready):
    with Signals():
        ready.touch()
        end = time.monotonic() + HANGS
        while time.monotonic() < end:
            time.sleep(1)


@pytest.mark.parametrize(("signum", "code"), STOPS)
def test_a_second_signal_waits_for_no_compiler(tmp_path, signum, code):
    with Apart(tmp_path / "log", hang_in_a_build, tmp_path / "ready") as process:
        process.wait_for((tmp_path / "ready").exists)
        assert_stopped_by_the_second(process, signum, code)


def slow_steps():
    original = StopAtStepEdge.check

    def check(self):
        time.sleep(0.1)
        original(self)

    StopAtStepEdge.check = check


def test_a_signal_sent_to_the_process_and_its_group_is_one(tmp_path):
    """As timeout(1) does: the checkpoint must not be lost for it."""
    with train(tmp_path, "--epochs", "50", before=slow_steps) as process:
        process.wait_for((tmp_path / "run" / "config.yaml").exists)
        time.sleep(0.3)
        process.send(signal.SIGTERM)
        time.sleep(0.02)
        process.send(signal.SIGTERM)
        assert process.ended() == 143
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] >= 1


def shared_memory(pids):
    """Names of what these processes share; torch's have the process in them."""
    return [name for name in os.listdir("/dev/shm") if any(str(pid) in name for pid in pids)]


def slow_samples():
    original = torch_loader.Samples.sample

    def sample(self, epoch, number):
        time.sleep(0.02)
        return original(self, epoch, number)

    torch_loader.Samples.sample = sample


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_after_the_main_process_is_killed_nobody_is_left(tmp_path, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    words = ["--loader", loader, "--workers", "2", "--epochs", "500", "--checkpoint-steps", "1"]
    with train(tmp_path, *words, before=slow_samples) as process:
        process.wait_for((tmp_path / "run" / "last.pt").exists)
        workers = members(process.pid)
        assert len(workers) >= (2 if loader == "torch" else 0)
        process.send(signal.SIGKILL)
        assert process.ended() == -signal.SIGKILL
        end = time.monotonic() + 15
        while members(process.pid) and time.monotonic() < end:
            time.sleep(0.05)
        assert members(process.pid) == []
    assert shared_memory([process.pid, *workers]) == []
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] >= 1


def test_a_signal_that_an_import_takes_for_its_own_error_is_not_lost(monkeypatch, capsys):
    """As compiled modules do, whose import a signal falls into."""

    def run(given, words):
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(cli.COMMANDS["archs"][0], "run", run)
    assert cli.main(["archs"]) == 143
    assert capsys.readouterr().err == "fastcnn: stopped by SIGTERM\n"
