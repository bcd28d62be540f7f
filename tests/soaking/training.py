"""A training in a process of its own: started, disturbed, and what its last words ask for."""

import contextlib
import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import NamedTuple

COMMAND = [sys.executable, "-m", "fastcnn", "train", "--quiet"]
LONGEST = 300.0  # seconds of a training; a longer one hangs
ORPHANS = 15.0  # seconds that workers have to notice that their parent is gone
PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """code: as a shell tells it, but -9; words: what it said at last."""

    code: int
    words: str
    seconds: float


class Stuck(Exception):
    """A training that hangs, or leaves processes behind."""


def run(
    words: list[str],
    disturbance: str = "none",
    moment: float = 0.0,
    awaited: Path | None = None,
    seed: str = "",
) -> Ended:
    """Run `fastcnn train` with `words`, disturbed `moment` seconds after its start, or after it has
    written the file `awaited`.

    Raises Stuck where it or one of its workers does not end.
    """
    random = Random(seed)
    limit = random.randrange(3_000_000) if disturbance == "full disk" else None
    began, before = time.monotonic(), _written(awaited)
    process = subprocess.Popen(
        [*COMMAND, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_prepare(limit),
    )
    try:
        while awaited and process.poll() is None and _written(awaited) == before:
            if time.monotonic() - began > LONGEST:
                raise Stuck(f"no {awaited.name} after {LONGEST:g} s: {words}")
            time.sleep(0.01)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        if process.poll() is None:
            DISTURBANCES[disturbance](process, random)
        try:
            _, said = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise Stuck(f"no end after {LONGEST:g} s: {words}") from None
        _wait_for_workers(process.pid)
    finally:
        _end_all(process)
    code = process.returncode
    lines = said.strip().splitlines()
    return Ended(
        128 - code if code < 0 and code != -signal.SIGKILL else code,
        lines[-1] if lines else "",
        time.monotonic() - began,
    )


def _written(path: Path | None) -> int:
    """When a file was written, in ns; 0 if it is not there."""
    try:
        return path.stat().st_mtime_ns if path else 0
    except FileNotFoundError:
        return 0


def _prepare(file_bytes: int | None) -> Callable[[], None]:
    """What the child does before it starts: it ends with its parent, and writes no longer files
    than a full disk would take."""
    libc, parent = ctypes.CDLL(None), os.getpid()

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        if file_bytes is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    return prepare


def _send(number: signal.Signals, times: int = 1) -> Callable[[subprocess.Popen, Random], None]:
    def send(process: subprocess.Popen, random: Random) -> None:
        for again in range(times):
            if again:
                time.sleep(random.uniform(0, 0.2))
            process.send_signal(number)

    return send


DISTURBANCES: dict[str, Callable[[subprocess.Popen, Random], None]] = {
    "none": lambda process, random: None,
    "full disk": lambda process, random: None,  # from the start
    "SIGKILL": _send(signal.SIGKILL),
    "SIGTERM": _send(signal.SIGTERM),
    "SIGINT": _send(signal.SIGINT),
    "SIGINT twice": _send(signal.SIGINT, 2),
}
# how a training may end that was disturbed; 0: it was faster
CODES = {
    "none": {0},
    "full disk": {0, 3, 4},  # 3: no room for what a worker hands over
    "SIGKILL": {0, -9},
    "SIGTERM": {0, 143},
    "SIGINT": {0, 130},
    "SIGINT twice": {0, 130},
}


def _session(leader: int) -> list[int]:
    """The processes of a session that are alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _wait_for_workers(leader: int) -> None:
    end = time.monotonic() + ORPHANS
    while left := _session(leader):
        if time.monotonic() > end:
            raise Stuck(f"processes left behind: {left}")
        time.sleep(0.05)


def _end_all(process: subprocess.Popen) -> None:
    for left in _session(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(left, signal.SIGKILL)
    process.wait()


OFFER = re.compile(r"(\S+-\d+\.pt), of step \d+, is whole: give that")
REMOVE = re.compile(r"(\S+\.(?:json|csv)).*; remove it")
DAMAGED = re.compile(r"(\S+\.pt): (?:truncated|damaged|not a checkpoint)")


def way_on(run_folder: Path, words: str) -> tuple[str, Path | None]:
    """What a user does after a refusal: its kind, and the checkpoint to name, if one is.

    Raises Stuck where the message shows no way.
    """
    if offer := OFFER.search(words):
        return "goes back", Path(offer[1])
    if remove := REMOVE.search(words):
        Path(remove[1]).unlink()
        return "removes a file", None
    if damaged := DAMAGED.search(words):
        Path(damaged[1]).unlink()
        return "begins anew", None
    if "it has no config.yaml" in words or "run folder exists" in words.replace(
        str(run_folder), "folder"
    ):
        shutil.rmtree(run_folder)
        return "begins anew", None
    if "cannot write" in words or "cannot keep" in words:
        return "makes room", None
    raise Stuck(f"no way on: {words}")
