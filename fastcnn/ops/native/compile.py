"""Compile: one process at a time, in a temporary folder, with ninja, ended whole by a signal.

Not `torch.utils.cpp_extension.load`: its lock outlives a killed process and hangs the next one
(torch 2.11), it needs Python's headers, and it takes a wrapper script's folder for a CUDA home.
"""

import contextlib
import itertools
import logging
import os
import re
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fastcnn.cache import LeftBehind, locked
from fastcnn.errors import BuildError
from fastcnn.ops.native import toolchain
from fastcnn.signals import StopRequests

log = logging.getLogger(__name__)

CANNOT = "the native library cannot be built"
LINE_INTERVAL_S = 10.0
WAIT_S = 3600.0  # for another process's build, which takes minutes
GRACE_S = 5.0  # for compilers to end by SIGTERM before they are killed
FIRST_ERROR = re.compile(
    r"\b(error|fatal)\b.*:|undefined reference|multiple definition|cannot find", re.IGNORECASE
)
# ninja ends its compilers when SIGTERM ends it; this asks the kernel (prctl PR_SET_PDEATHSIG) to
# send it that, should this process be killed without a chance to do so
DIE_WITH_PARENT = (
    "import ctypes, os, signal, sys; ctypes.CDLL(None).prctl(1, signal.SIGTERM); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)


class StepFailed(Exception):
    """The first error that a compiler, a linker or ninja reported."""


@dataclass(frozen=True)
class Step:
    """One command: the file that it writes, those of other steps that it needs."""

    output: str
    command: list[str]
    needs: tuple[str, ...] = ()


Make = Callable[[Path, list[Step], str], None]  # folder, steps, title


class Signals(StopRequests):
    """While entered, SIGINT, SIGTERM and SIGHUP are only noted; `check` raises BuildError then.

    On leaving they are sent again, to whoever handled them before: a process that does not
    handle SIGTERM ends by it, with nothing left behind. Outside the main thread they stay as
    they are.
    """

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        if self.requested:
            signal.raise_signal(self.requested)

    def check(self) -> None:
        if self.requested:
            name = signal.Signals(self.requested).name
            raise BuildError(f"the build of the native library was stopped by {name}")


@contextlib.contextmanager
def making(native: Path, name: str, quiet: bool) -> Iterator[Make]:
    """Hold the lock of `name` while the block runs, which gets a function to run steps with.

    Raises BuildError, also with what failed in the process that this one waited for.
    """
    waits, until = itertools.count(), time.monotonic() + WAIT_S

    def waiting() -> None:
        signals.check()
        if next(waits) == 0 and not quiet:
            log.info("waiting for another process, which builds the native library")
        if time.monotonic() > until:
            raise BuildError(
                f"another process has been building the native library for {WAIT_S / 60:.0f} "
                f"minutes: end it, or set FASTCNN_CACHE to a folder of your own (not {native})"
            )

    def make(folder: Path, steps: list[Step], title: str) -> None:
        failed_log = native / f"{name}.failed.log"
        try:
            run_steps(folder, steps, title, quiet, signals.check)
        except StepFailed as error:
            (folder / "build.log").replace(failed_log)
            raise BuildError(f"{CANNOT}: {error}; all output: {failed_log}") from error
        failed_log.unlink(missing_ok=True)

    with Signals() as signals:
        try:
            with locked(native / f".{name}.lock", waiting) as lock:
                try:
                    yield make
                except BuildError as error:
                    # who stops one process means no other
                    if not signals.requested:
                        lock.leave(str(error))
                    raise
        except LeftBehind as reason:
            raise BuildError(str(reason)) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise BuildError(f"{CANNOT}: {where}{error.strerror or error}") from error


@contextlib.contextmanager
def temporary(native: Path, name: str) -> Iterator[Path]:
    """A folder that is gone afterwards, unless renamed; to be entered under the lock of `name`.

    Folders and locks that killed processes left are removed as well, of other builds too.
    """
    _remove_temporaries(native, name)
    for path in native.glob(".*.lock"):
        # one that is held, by this process too, says so by waiting
        with contextlib.suppress(BlockingIOError, LeftBehind), locked(path, _is_held):
            _remove_temporaries(native, path.name[1 : -len(".lock")])
    folder = Path(tempfile.mkdtemp(prefix=f".tmp-{name}-", dir=native))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _is_held() -> None:
    raise BlockingIOError


def _remove_temporaries(native: Path, name: str) -> None:
    for left in native.glob(f".tmp-{name}-*"):
        shutil.rmtree(left, ignore_errors=True)


def publish(folder: Path, final: Path) -> None:
    """Rename a finished folder to its name, in place of an old one."""
    aside = folder.with_name(f"{folder.name}-old")
    if final.exists():
        final.rename(aside)
    folder.rename(final)
    shutil.rmtree(aside, ignore_errors=True)


def run_steps(
    folder: Path, steps: list[Step], title: str, quiet: bool, check: Callable[[], None]
) -> None:
    """Run the steps in `folder`, as many at once as the machine carries; all output goes to
    `folder`/build.log.

    `check` is called several times a second and ends the build by raising. Raises StepFailed if
    a command fails, BuildError without ninja.
    """
    ninja = toolchain.find_ninja()
    if ninja is None:
        raise BuildError(toolchain.NO_NINJA)
    (folder / "build.ninja").write_text(_ninja_file(steps), encoding="utf-8")
    jobs = toolchain.parallel_jobs()
    command = [ninja, "-v", "-j", str(jobs), "-C", str(folder)]
    # in English, since the first error is searched for
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] ", "LC_ALL": "C"}
    with (
        open(folder / "build.log", "wb") as file,
        _progress(title, len(steps), jobs, quiet) as show,
        _started(command, environment) as process,
    ):
        done = 0
        for text in _output(process, check):
            file.write(text)
            file.flush()
            if counts := re.findall(rb"^\[(\d+)/\d+\] ", text, re.MULTILINE):
                done = int(counts[-1])
            show(done)
    if process.returncode != 0:
        raise StepFailed(first_error((folder / "build.log").read_text("utf-8", "replace")))


def first_error(text: str) -> str:
    """Return the first line in which a compiler, a linker or ninja speaks of an error."""
    lines = [line.strip() for line in text.splitlines()]
    # before it stand the steps that went well, behind it the command of the one that did not
    failed = next((i + 2 for i, line in enumerate(lines) if line.startswith("FAILED: ")), 0)
    found = (line for line in lines[failed:] if FIRST_ERROR.search(line))
    return next(found, lines[-1] if lines else "ninja ended without a message")[:400]


def _ninja_file(steps: list[Step]) -> str:
    rules = ["rule run\n  command = $line"]
    for step in steps:
        command = shlex.join(step.command).replace("$", "$$")
        rules.append(f"build {step.output}: run {' '.join(step.needs)}\n  line = {command}")
    return "\n".join([*rules, ""])


@contextlib.contextmanager
def _started(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Run ninja while the block does; it and its compilers are gone afterwards."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # a terminal's Ctrl-C reaches this process alone, which ends it
    )
    try:
        yield process
        # its output has ended, and so it has, or it is ended below
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
    finally:
        if process.returncode != 0:
            _end(process)
        if process.stdout:
            process.stdout.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End ninja, which passes the signal on but does not wait for its compilers, and see to it
    that they are gone: each is a process group of its own, in ninja's session."""
    process.terminate()
    if not _gone(process.pid):
        for member in _session(process.pid):
            with contextlib.suppress(OSError):
                os.kill(member, signal.SIGKILL)
        _gone(process.pid)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that not even SIGKILL ends
        process.wait(GRACE_S)


def _gone(session: int) -> bool:
    """Wait for a session to end; False if it takes too long."""
    end = time.monotonic() + GRACE_S
    while _session(session):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def _session(session: int) -> list[int]:
    """Processes of a session that have not ended."""
    members = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getsid(int(path.name)) == session and not _is_zombie(path):
                members.append(int(path.name))
    return members


def _is_zombie(path: Path) -> bool:
    # "pid (name) state …", and a name may hold anything
    return (path / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] == "Z"


def _output(process: subprocess.Popen[bytes], check: Callable[[], None]) -> Iterator[bytes]:
    """Yield what the process prints, whole lines or b"" several times a second."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        rest = b""
        while True:
            check()
            if not selector.select(timeout=0.1):
                yield b""
                continue
            read = os.read(descriptor, 65536)
            lines, newline, rest = (rest + read).rpartition(b"\n")
            yield lines + newline + (b"" if read else rest)
            if not read:
                return


@contextlib.contextmanager
def _progress(title: str, total: int, jobs: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show the steps done and the time: a bar on a terminal, else a line every ten seconds."""
    if quiet or not log.isEnabledFor(logging.INFO):
        yield lambda done: None
        return
    if sys.stderr is not None and sys.stderr.isatty():
        with _bar(title, total) as show:
            yield show
        return
    log.info("%s: %d steps, %d at a time", title, total, jobs)
    start = last = time.perf_counter()

    def show_line(done: int) -> None:
        nonlocal last
        if time.perf_counter() >= last + LINE_INTERVAL_S:
            last = time.perf_counter()
            log.info("%s: %d/%d, %.0f s", title, done, total, last - start)

    yield show_line


@contextlib.contextmanager
def _bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
