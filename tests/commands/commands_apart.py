"""Commands in processes of their own, to be killed: each is forked from one that has imported torch
already, and leads a session, by which whatever it leaves behind is found."""

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

SECONDS = 60  # far more than anything here takes

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["fastcnn.api", "fastcnn.cli", "sklearn.datasets", "matplotlib.figure", "jinja2", "pytest"]
)

SMALL = [
    *("train", "--arch", "murgolo-improved", "--data", "digits"),
    *("--train-subset", "96", "--test-subset", "32", "--batch-size", "16"),
    *("--threads", "1", "--backend", "torch"),
]


class Apart:
    """A process, its output in the file `log`."""

    def __init__(self, log, work, *arguments):
        self.log = log
        environment = {name: os.environ[name] for name in ("FASTCNN_CACHE", "PATH")}
        self.process = SERVER.Process(target=_apart, args=(str(log), environment, work, arguments))
        self.process.start()
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [*members(self.pid), *([self.pid] if self.alive else [])]:
            os.kill(pid, signal.SIGKILL)
        self.process.join(SECONDS)

    @property
    def alive(self):
        return self.process.is_alive()

    def wait_for(self, condition):
        """Wait until it holds, which must be before the process ends."""
        end = time.monotonic() + SECONDS
        while not condition():
            assert self.alive, self.output
            assert time.monotonic() < end, self.output
            time.sleep(0.005)

    def send(self, signum):
        os.kill(self.pid, signum)

    def ended(self, seconds=SECONDS):
        """The exit code."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.output
        return self.process.exitcode

    @property
    def output(self):
        return Path(self.log).read_text()


def command(log, *words, before=None):
    """`fastcnn words`; `before` is called first, to arrange the fault."""
    return Apart(log, _command, words, before)


def members(session):
    """The processes of a session that have not ended, but for its leader."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state = (path / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        except OSError:  # gone meanwhile
            continue
        if int(state[3]) == session and int(path.name) != session and state[0] != "Z":
            found.append(int(path.name))
    return found


def _apart(log, environment, work, arguments):
    os.setsid()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(work(*arguments))


def _command(words, before):
    from fastcnn import cli

    if before is not None:
        before()
    return cli.main(list(words))
