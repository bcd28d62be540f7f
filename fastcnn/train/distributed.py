"""The processes that train one network together, as torchrun starts them.

Every process (rank) has a part of each batch, the same weights, and so takes the same decisions;
rank 0 alone writes. What they exchange beside gradients goes through here. One process alone is
rank 0 of 1: then nothing below communicates.
"""

import contextlib
import datetime
import itertools
import json
import os
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.errors import FastcnnError, UsageError
from fastcnn.signals import StopRequests
from fastcnn.text import first_line

TIMEOUT_S = 600  # for the slowest rank, while images are packed or kernels compiled
STOP_S = 25  # for rank 0 to save; torchrun kills whoever is left after 30
STOPPED = "stopped"
MEETINGS = itertools.count()
RELEASE_S = 5.0  # for a thread to let go of what was exchanged
GONE_S = 3.0  # until the system tells of a process that has just died
AGREE_STEPS = 16  # steps between two looks at each other's signals on GPUs, whose host runs ahead
# how torch reports a rank that is gone, a network that is down, and a wait that took too long
LOST = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|timed out|timeout|broken pipe|recvvalue|"
    r"socket|\bstore\b",
    re.IGNORECASE,
)


class ProcessLost(FastcnnError):
    """Another process of the run has died, or is out of reach."""


@dataclass(frozen=True)
class Distributed:
    """This process, `rank` of `world`; `local` of `local_world` on this machine.

    peers: machine and process id of each rank. store: where ranks leave each other notes.
    """

    rank: int = 0
    world: int = 1
    local: int = 0
    local_world: int = 1
    peers: list[tuple[str, int]] = field(default_factory=list)
    store: Any = None

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def all_reduce_sum(self, tensor: Tensor) -> None:
        """Replace `tensor` in place by its sum over the ranks."""
        if self.world > 1:
            with released(tensor):
                torch.distributed.all_reduce(tensor)

    def broadcast(self, *tensors: Tensor) -> None:
        """Replace the tensors in place by those of rank 0."""
        if self.world > 1:
            for tensor in tensors:
                with released(tensor):
                    torch.distributed.broadcast(tensor, 0)

    def all_reduce_max(self, *numbers: int) -> list[int]:
        """The largest value over the ranks of each number; exchanged by the hosts."""
        if self.world == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64)
        with released(values):
            torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX)
        return [int(value) for value in values]

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """That tensor of each rank, of one shape and dtype on the host, in their order."""
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        if self.world == 1:
            return [tensor]
        with released(tensor, *found):
            torch.distributed.all_gather(found, tensor)
        return found

    def all_gather_object(self, value: Any) -> list[Any]:
        """What each rank has of a value of plain types, in their order. Nothing is unpickled."""
        if self.world == 1:
            return [value]
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        longest, *_ = self.all_reduce_max(len(own))
        padded = torch.full((longest,), ord(" "), dtype=torch.uint8)
        padded[: len(own)] = own
        return [json.loads(bytes(one.tolist())) for one in self.all_gather(padded)]

    def barrier(self) -> None:
        """Return when every rank has come here."""
        self.all_reduce_max(0)

    def stopped(self) -> None:
        """Return when rank 0 has saved what an interruption leaves: were another one to end before,
        torchrun would send rank 0 a second signal."""
        if self.store is None:
            return
        if self.first:
            self.store.set(STOPPED, "")
            return
        deadline = time.monotonic() + STOP_S
        with contextlib.suppress(torch.distributed.DistError, RuntimeError):  # the store is gone
            while not self.store.check([STOPPED]) and self._may_run(0):
                if time.monotonic() > deadline:
                    return
                time.sleep(0.05)

    def _may_run(self, number: int) -> bool:
        """Whether a rank has not ended, as far as this machine can tell."""
        host, pid = self.peers[number]
        return host != socket.gethostname() or _runs(pid)

    def gone(self) -> str:
        """The ranks of this machine that have ended: "rank 1 (pid 12)"."""
        deadline = time.monotonic() + GONE_S
        while True:
            found = [
                f"rank {number} (pid {pid})"
                for number, (_, pid) in enumerate(self.peers)
                if not self._may_run(number)
            ]
            if found or time.monotonic() > deadline:
                return ", ".join(found)
            time.sleep(0.1)


ALONE = Distributed()


def launched() -> Distributed:
    """This process as torchrun's environment describes it; ALONE without torchrun."""
    if "WORLD_SIZE" not in os.environ or "RANK" not in os.environ:
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    try:
        rank, world, local, local_world = (int(os.environ[name]) for name in names)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"RANK and WORLD_SIZE are set, but not as torchrun does ({error}); unset them, or use "
            "torchrun"
        ) from error
    return Distributed(rank, world, local, local_world) if world > 1 else ALONE


@contextlib.contextmanager
def joined() -> Iterator[Distributed]:
    """Meet the other ranks, if torchrun started any, and part from them after the block.

    Raises ProcessLost where one is gone, at whatever place of the block that was noticed.
    """
    ranks = launched()
    if ranks.world == 1:
        yield ranks
        return
    own_group = not torch.distributed.is_initialized()
    try:
        if own_group:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            limit = datetime.timedelta(seconds=TIMEOUT_S)
            meeting, *_ = next(torch.distributed.rendezvous("env://", timeout=limit))
            # a process may train several runs, one after the other, and all meet in one place
            store = torch.distributed.PrefixStore(f"fastcnn/{next(MEETINGS)}", meeting)
            place: dict[str, Any] = {"store": store, "rank": ranks.rank, "world_size": ranks.world}
            torch.distributed.init_process_group(backend, timeout=limit, **place)
            ranks = replace(ranks, store=store)
        peers = ranks.all_gather_object([socket.gethostname(), os.getpid()])
        ranks.peers.extend((str(host), int(pid)) for host, pid in peers)
        yield ranks
    except RuntimeError as error:
        # an error of this rank's own GPU may say "timed out" as well
        if isinstance(error, torch.AcceleratorError) or not LOST.search(str(error)):
            raise
        raise lost(ranks, error) from error
    if own_group:
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def released(*tensors: Tensor) -> Iterator[None]:
    """Exchange tensors in the block, and leave it when gloo's threads have let go of them.

    A thread needs Python's lock for that, a little after the exchange is done, and lets go of the
    tensor before of its object in Python. Were the process group to end meanwhile, who holds the
    lock would wait for the thread, and both for ever.
    """
    before = _holders(tensors)
    yield
    deadline = time.monotonic() + RELEASE_S
    while _holders(tensors) != before and time.monotonic() < deadline:
        time.sleep(0)


def _holders(tensors: Sequence[Any]) -> list[tuple[int, int]]:
    return [(tensor._use_count(), sys.getrefcount(tensor)) for tensor in tensors]


def lost(ranks: Distributed, error: Exception) -> ProcessLost:
    """What to say of a rank that does not answer."""
    with StopRequests():  # torchrun ends whoever is left while this one looks who is gone
        who = ranks.gone()
    told = f"{who} has ended" if who else f"another rank is out of reach ({first_line(error)})"
    return ProcessLost(
        f"{told}: start the same torchrun command again with --resume and the run's folder"
    )


def require_same(ranks: Distributed, facts: dict[str, Any]) -> None:
    """Raise UsageError where ranks differ in options, images or versions: {name: value}."""
    everyone = ranks.all_gather_object(facts)
    for number, theirs in enumerate(everyone):
        if different := [name for name in facts if theirs.get(name) != everyone[0].get(name)]:
            listed = "; ".join(
                f"{name}: {everyone[0].get(name)} on rank 0, {theirs.get(name)} on rank {number}"
                for name in different[:3]
            )
            raise UsageError(f"the ranks differ: {listed}; start all of them alike")


def parallel(network: nn.Module, ranks: Distributed, device: torch.device) -> nn.Module | None:
    """The network as one whose gradients are averaged over the ranks; None for one process."""
    if ranks.world == 1:
        return None
    return nn.parallel.DistributedDataParallel(
        network,
        device_ids=[device] if device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
    )


def _runs(pid: int) -> bool:
    """Whether a process of this machine has not ended, a zombie being one that has."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state not in "ZX"
