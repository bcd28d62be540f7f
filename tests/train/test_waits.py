"""No wait without a limit, or else a reason why it needs none."""

import ast
import subprocess
import time
from pathlib import Path

import fake_build
import pytest

from fastcnn.cache import locked
from fastcnn.errors import BuildError
from fastcnn.ops.native import build, compile, library  # noqa: A004 - the module
from fastcnn.study import children

ROOT = Path(__file__).parents[2]
WAITING = {"acquire", "communicate", "get", "join", "recv", "result", "shutdown", "wait"}
STARTING = {"check_call", "check_output", "run"}

DISK = "a disk takes as long as it takes; a second signal ends the process"
FILES = "threads that read files: as for a disk"
# (file, call): why it needs no limit
REASONS = {
    ("fastcnn/train/checkpoints/saver.py", "result"): DISK,
    ("fastcnn/train/checkpoints/saver.py", "shutdown"): DISK,
    ("fastcnn/train/checkpoints/saver.py", "wait"): DISK,
    ("fastcnn/train/loop.py", "wait"): "of the saver: " + DISK,
    ("fastcnn/data/examine.py", "result"): FILES,
    ("fastcnn/data/loaders/dali_sources.py", "result"): FILES,
    ("fastcnn/data/loaders/dali_sources.py", "shutdown"): FILES,
    ("fastcnn/bench/rivals/check.py", "result"): "a computation, no wait",
    ("fastcnn/bench/inference.py", "result"): "a computation, no wait",
    ("fastcnn/bench/worker.py", "communicate"): "of a process that was killed",
}


def unlimited_in(tree):
    """Calls that may wait for ever: of a method that waits, without arguments; of a function that
    takes a timeout, without one."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, keywords = node.func.attr, {keyword.arg for keyword in node.keywords}
        starts = name in STARTING and getattr(node.func.value, "id", "") == "subprocess"
        waits = name in WAITING and not node.args
        if (waits or starts or name == "urlopen") and "timeout" not in keywords:
            yield name


def unlimited():
    return {
        (str(path.relative_to(ROOT)), name)
        for path in (ROOT / "fastcnn").rglob("*.py")
        for name in unlimited_in(ast.parse(path.read_text(encoding="utf-8")))
    }


def test_a_wait_has_a_limit_or_a_reason():
    found = unlimited()
    assert found - REASONS.keys() == set()
    assert REASONS.keys() - found == set()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("queue.get()", ["get"]),
        ("queue.get(timeout=3)", []),
        ("options.get('x')", []),
        ("process.wait()", ["wait"]),
        ("subprocess.run(command)", ["run"]),
        ("subprocess.run(command, timeout=3)", []),
        ("COMMANDS[name].run(given)", []),
        ("urllib.request.urlopen(url)", ["urlopen"]),
        ("pool.shutdown(wait=True)", ["shutdown"]),
    ],
)
def test_an_unlimited_wait_is_seen(text, found):
    assert list(unlimited_in(ast.parse(text))) == found


def test_a_build_that_does_not_end_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(build.ARCHS_VARIABLE, "none")
    monkeypatch.setattr(compile, "WAIT_S", 0.3)
    source = fake_build.write_sources(tmp_path / "csrc")
    lock = f".{library.folder_name(library.key_of(source, ()))}.lock"
    with (
        locked(build.native_dir() / lock, lambda: None),
        pytest.raises(BuildError, match=r"another process has been building .* set FASTCNN_CACHE"),
    ):
        build.ensure(source=source)


def test_a_job_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(children, "SAVE_S", 0.3)
    job = children.Child.__new__(children.Child)
    words = ["sh", "-c", "trap '' TERM; echo; while true; do sleep 0.1; done"]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as job.process:
        assert job.process.stdout.read(1)
        job.process.terminate()
        begin = time.monotonic()
        job.end()
        assert job.process.returncode == -9
        assert 0.3 <= time.monotonic() - begin < 5
