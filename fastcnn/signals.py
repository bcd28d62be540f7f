"""Signals that ask a process to stop: the first is for whoever listens, a second one ends it."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import TypeVar

# timeout(1) sends a signal to the process and then to its group; both are one request
REPEATED_S = 0.5

Own = TypeVar("Own", bound="StopRequests")


class StopRequests:
    """While entered, the first of SIGINT, SIGTERM and SIGHUP is noted in `requested`, and `heard`
    is called; a later one ends the process at once, with exit code 128 + signal.

    A signal that was ignored before (a job in the background, nohup) stays ignored. In a thread
    that is not the main one nobody listens: whoever started the thread stops it.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = 0
        self._since = 0.0
        self._process = os.getpid()

    def heard(self, signum: int) -> None:
        """Called in the handler, which may run in the middle of any line."""

    def __enter__(self: Own) -> Own:
        here = threading.current_thread() is threading.main_thread()
        signals = self.SIGNALS if here else ()
        # None: a handler that was not set from Python, which could not be put back
        heard = [s for s in signals if signal.getsignal(s) not in (signal.SIG_IGN, None)]
        self._before = {s: signal.signal(s, self._handle) for s in heard}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def note(self, signum: int) -> None:
        """Take up a request that came by another way, such as another rank's; what comes here soon
        after is the same one."""
        if not self.requested:
            self.requested, self._since = signum, time.monotonic()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # forked loader workers inherit the handler; the parent ends them, a signal does not
        if os.getpid() != self._process:
            return
        if not self.requested:
            self.note(signum)
            self.heard(signum)
        elif time.monotonic() > self._since + REPEATED_S:
            os._exit(128 + signum)


class Stopped(KeyboardInterrupt):
    """A command was asked to stop, by the signal `signum`."""

    def __init__(self, signum: int):
        by = signal.Signals(signum)
        super().__init__("interrupted" if by == signal.SIGINT else f"stopped by {by.name}")
        self.signum = signum


class StopAnywhere(StopRequests):
    """While entered, a signal raises Stopped wherever the main thread is, as Ctrl-C does in Python,
    so that what is half written is removed."""

    def heard(self, signum: int) -> None:
        raise Stopped(signum)

    def check(self) -> None:
        """Raise Stopped anew where it was lost on its way: the import of a compiled module turns it
        into an error of its own."""
        if self.requested:
            raise Stopped(self.requested)
