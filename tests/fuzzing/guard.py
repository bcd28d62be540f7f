"""A process that reads one input after the other, and what it is kept from: writing elsewhere,
starting programs, memory and time without end."""

import gc
import multiprocessing
import os
import resource
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple

from fastcnn.errors import FastcnnError

MEMORY = 1 << 30  # bytes that reading an input may touch
SLOW = 6.0  # seconds of the processor that reading an input, a small file, may take
HEADROOM = 3 << 30  # bytes of address space beyond which an allocation fails
INPUTS = 500  # that a process reads before a fresh one takes over
STARTS = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.bind",
    "webbrowser.open",
}
CHANGES = {
    "os.chmod",
    "os.chown",
    "os.link",
    "os.mkdir",
    "os.mkfifo",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
    "os.utime",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Read = Callable[[], object]
Prepare = Callable[[Random, Path], Read]  # writes an input into a folder; what then reads it


class Verdict(NamedTuple):
    """kind: of a fault its place in the code or its nature, alike for alike faults."""

    outcome: Literal["read", "refused", "fault"]
    kind: str = ""
    detail: str = ""


@dataclass
class Watch:
    """What the audit hook sees; folder: the one that may be written to, None: it sees nothing."""

    folder: str | None = None
    seen: str = ""


WATCH = Watch()


class Forbidden(Exception):
    """Keeps what an input asks for from being done."""


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCH.folder is None:
        return
    if event in STARTS:
        _forbid(f"{event} {arguments!r:.200}")
    if event == "open":
        path, _, flags = arguments
        if isinstance(flags, int) and flags & WRITING and not isinstance(path, int):
            _stay_inside(event, path)
    elif event in CHANGES:
        for path in arguments[:2]:
            if isinstance(path, str | bytes | os.PathLike):
                _stay_inside(event, path)


def _stay_inside(event: str, path: Any) -> None:
    place = os.path.realpath(os.fsdecode(path))
    if place != os.devnull and not f"{place}/".startswith(f"{WATCH.folder}/"):
        _forbid(f"{event} {place}")


def _forbid(what: str) -> None:
    WATCH.seen = WATCH.seen or what
    raise Forbidden(what)


def judge(prepare: Prepare, seed: str, folder: Path) -> Verdict:
    """Write the input of `seed` below `folder` and read it: "read", "refused" with a line that
    names it, or a fault."""
    given = folder / "input"
    for path in (given, folder / "cache"):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
    read = prepare(Random(seed), given)
    before, began = _peak_bytes(reset=True), time.process_time()
    WATCH.folder, WATCH.seen = os.path.realpath(folder), ""
    try:
        verdict = _outcome(read, given)
    finally:
        WATCH.folder = None
    if WATCH.seen:
        return Verdict("fault", f"does {WATCH.seen.split(' ')[0]}", WATCH.seen)
    if (grown := _peak_bytes() - before) > MEMORY:
        return Verdict("fault", "memory", f"{grown:,} bytes, and then: {verdict}")
    if (taken := time.process_time() - began) > SLOW:
        return Verdict("fault", "slow", f"{taken:.0f} s, and then: {verdict}")
    return verdict


def _outcome(read: Read, given: Path) -> Verdict:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except FastcnnError as error:
        text = str(error)
        if len(text.splitlines()) != 1 or not text.isprintable():
            return Verdict("fault", f"lines {_place(error)}", f"not one line: {text!r}")
        if str(given) not in text:
            return Verdict("fault", f"name {_place(error)}", f"names no file: {text}")
        return Verdict("refused", detail=text)
    except BaseException as error:
        kind = f"{type(error).__name__} {_place(error)}"
        return Verdict("fault", kind, "".join(traceback.format_exception(error)))
    finally:
        gc.collect(0)
    return Verdict("read")


def _place(error: BaseException) -> str:
    """The last line of the product that an error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/fastcnn/" in frame.filename]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.name}"


def _peak_bytes(reset: bool = False) -> int:
    """The most memory this process has touched, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def _serve(connection: Any, targets: Mapping[str, Prepare], folder: Path) -> None:
    sys.addaudithook(_audit)
    sys.dont_write_bytecode = True
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    space = pages * resource.getpagesize() + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    os.environ["FASTCNN_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    os.fsync = lambda file: None  # nothing here need outlast a power cut
    while (task := connection.recv()) is not None:
        name, number = task
        connection.send(judge(targets[name], f"{name} {number}", folder))


class Reader:
    """The process, started anew where an input has ended it. Used with `with`."""

    def __init__(self, targets: Mapping[str, Prepare], folder: Path, seconds: float):
        self.targets, self.folder, self.seconds = targets, folder, seconds
        self._process: Any = None
        self._left = 0

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def __call__(self, name: str, number: int) -> Verdict:
        """Judge one input; the files of it are in `folder`/input until the next one."""
        if not self._left:
            self._start()
        self._left -= 1
        self._connection.send((name, number))
        if not self._connection.poll(self.seconds):
            self._end()
            return Verdict("fault", "hangs", f"not read within {self.seconds:g} s")
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            self._end()
            return Verdict("fault", f"ends with {code}", f"the process ended with code {code}")

    def _start(self) -> None:
        self._end()
        context = multiprocessing.get_context("fork")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self.targets, self.folder))
        self._process.start()
        other.close()
        self._left = INPUTS

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
        self._process, self._left = None, 0
