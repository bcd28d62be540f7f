"""Ctrl-C and SIGTERM end a run at the edge of a step, with a checkpoint; a second one at once."""

import signal

from fastcnn.errors import FastcnnError
from fastcnn.signals import StopRequests


class Interrupted(FastcnnError):
    """The run was asked to stop; exit code 128 + signal: 130 after Ctrl-C, 143 after SIGTERM."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopAtStepEdge(StopRequests):
    """While entered, a signal sets a flag, which `check()` turns into Interrupted.

    The handler does nothing else: it may run in the middle of a save as well.
    """

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self.requested:
            raise Interrupted(self.requested)
