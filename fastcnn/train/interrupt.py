"""Ctrl-C and SIGTERM end a run at the edge of a step, with a checkpoint; a second one at once."""

import os
import signal
import threading
from types import FrameType, TracebackType

from fastcnn.errors import FastcnnError


class Interrupted(FastcnnError):
    """The run was asked to stop; exit code 128 + signal: 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopAtStepEdge:
    """While entered, SIGINT, SIGTERM and SIGHUP set a flag, which `check()` turns into Interrupted.

    A signal that was ignored before (a job in the background, nohup) stays ignored. Handlers do
    nothing else: a handler may run in the middle of any line, of a save as well. In a thread that
    is not the main one no signal is heard.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.requested = 0
        self._process = os.getpid()

    def __enter__(self) -> "StopAtStepEdge":
        # outside of the main thread nobody may listen: whoever started the thread stops it
        here = threading.current_thread() is threading.main_thread()
        signals = self.SIGNALS if here else ()
        heard = [s for s in signals if signal.getsignal(s) is not signal.SIG_IGN]
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

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # forked loader workers inherit the handler; the parent ends them, a signal does not
        if os.getpid() != self._process:
            return
        if self.requested:
            os._exit(128 + signum)
        self.requested = signum

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self.requested:
            raise Interrupted(self.requested)
