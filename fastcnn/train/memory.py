"""What to do where memory runs out: which option to lower, and to what."""

import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fastcnn.errors import UsageError

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
ROUND = 8  # images: a batch to try is a multiple of so many, where it is larger


@contextmanager
def advising(
    option: str, batch_size: int, device: torch.device, kept: Callable[[], str]
) -> Iterator[None]:
    """Turn a lack of memory in the block into a UsageError: batch size, peak, a size to try.

    option: that sets the batch size. kept: returns what to say of the checkpoint.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        where = "GPU memory" if device.type == "cuda" else "memory"
        peak = peak_bytes(device)
        asked = asked_bytes(str(error))
        more = f", {asked / 2**30:.2f} more asked for" if asked else ""
        smaller = batch_to_try(batch_size, peak, asked)
        remedy = f"try {option} {smaller}" if smaller else "take smaller images or another network"
        raise UsageError(
            f"out of {where} at {option} {batch_size} (peak {peak / 2**30:.2f} GiB{more}): "
            f"{remedy}{kept()}"
        ) from error


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, that of a GPU or of the host."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    texts = ("can't allocate memory", "bad_alloc", "bad allocation")
    return isinstance(error, kinds) or any(text in str(error) for text in texts)


def peak_bytes(device: torch.device) -> int:
    """The most that was held at once: of a GPU by tensors, of the host by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def asked_bytes(message: str) -> int:
    """What an allocation that failed had asked for; 0 where torch does not tell."""
    found = re.search(r"tried to allocate ([\d.]+) (\w+)", message, re.IGNORECASE)
    return int(float(found[1]) * UNITS.get(found[2], 0)) if found else 0


def batch_to_try(batch_size: int, peak: int, asked: int) -> int:
    """At most half: a step that broke off had not come to its own peak. 0: there is none."""
    smaller = min(batch_size // 2, batch_size * peak // max(peak + asked, 1))
    return smaller // ROUND * ROUND if smaller > ROUND else smaller
