"""Checkpoints written beside the training: the step goes on while a file is hashed and written."""

import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fastcnn.train.checkpoints import checkpoint

log = logging.getLogger(__name__)


class Saver:
    """Writes snapshots in a thread of its own, one after the other, in the order they came.

    A disk that refuses is told by the next call: `save`, `wait`, or leaving the `with`. writes:
    whether this process is the one that does; another one leaves it at that.
    """

    def __init__(self, writes: bool = True) -> None:
        self.writes = writes
        self._thread = ThreadPoolExecutor(1, "fastcnn-saver")
        self._open: deque[Future[None]] = deque()

    def save(self, state: dict[str, Any], path: Path, keep: int = 1) -> None:
        """Write `state` as it is now to `path`, as `checkpoint.save` does; what was asked for
        before the last call is on the disk when this returns."""
        if not self.writes:
            return
        while len(self._open) > 1:
            self._open.popleft().result()
        self._open.append(self._thread.submit(checkpoint.save, snapshot(state), path, keep))

    def wait(self) -> None:
        """Return when everything is on the disk. Raises DiskError where it refuses."""
        while self._open:
            self._open.popleft().result()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown(wait=True)
        if error is None:
            self.wait()
        for fault in [one.exception() for one in self._open]:
            if fault is not None:
                log.warning("note: %s", fault)


def snapshot(value: Any) -> Any:
    """A copy in the memory of the host, tensors with their strides, that no later step changes.

    The copies of a device's tensors are made here, not in the thread: another thread's calls would
    break the capture of a CUDA graph.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: snapshot(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(snapshot, value))
    return value
