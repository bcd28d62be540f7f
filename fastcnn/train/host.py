"""Settings of the process that a command makes before the first tensor, never at import.

glibc gives every large tensor back to the kernel and faults it in again at the next allocation;
with its thresholds raised it keeps them. Denormal numbers, which fill gradients once the loss nears
zero, take the slow path of the processor; flushed, they are zeros. torch is imported inside the
functions, since one setting must come before it.
"""

import ctypes
import os

# <malloc.h>: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD
MALLOC_OPTIONS = {-1: 2**31 - 1, -2: 256 * 2**20, -3: 2**30}

SPIN_TURNS = "10000"  # of a thread that waits


def share_the_cores() -> None:
    """Let threads that wait for others sleep soon; to be called before torch is imported.

    GNU OpenMP's threads spin 300,000 turns at every barrier, which starves the very thread that
    they wait for when another program wants a core. With 10,000 turns cnn-a trained 1.4 to 1.9
    times as fast beside one busy process, and as fast as before on idle cores (batch 128, 2 cores,
    n = 3 each, interleaved, 2026-11-21). A user's own setting stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_TURNS)


def keep_freed_memory() -> bool:
    """Keep glibc from returning freed tensors to the system; False where there is no glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return all(mallopt(option, value) == 1 for option, value in MALLOC_OPTIONS.items())


def tune_process(threads: int | None = None, processes: int = 1) -> None:
    """Set threads (default: the cores this process may use), denormals and allocator.

    processes: that do the same work on this machine, and share its cores.

    To be called before the first parallel region: the worker threads inherit the flush mode.
    """
    import torch

    torch.set_flush_denormal(True)
    torch.set_num_threads(threads or max(usable_cores() // processes, 1))
    keep_freed_memory()


def usable_cores() -> int:
    """Cores that the scheduler lets this process use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_deterministic() -> None:
    """Ask torch for algorithms that give the same bits twice (same machine, build and batch)."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # a fill of every new buffer, which costs a write of each; none is read before it is written
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
