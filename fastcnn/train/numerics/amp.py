"""What `--amp` means where no number format is named: on a CPU bf16 or fp32, by a measurement.

A CPU may have instructions for bf16 that are no faster than its own for fp32, or fp32 kernels that
theirs are slower than. So the training step of a small network is timed in both formats, with the
layers, the backend and the convolutions of the run, and what was found is kept in the cache folder
for this CPU, its threads, this torch and this library. A run writes down what was decided, so that
whoever repeats or resumes it measures nothing.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

from fastcnn.archs.build import build
from fastcnn.archs.spec import Conv, Linear, Network, Pool
from fastcnn.cache import LeftBehind, cache_dir, locked
from fastcnn.config import Config, RunConfig
from fastcnn.errors import DataError
from fastcnn.ops import load
from fastcnn.ops.backend import choose_backend, choose_convolution
from fastcnn.ops.conv_autotune import plan_cache
from fastcnn.ops.native.toolchain import cpu_name
from fastcnn.train.distributed import Distributed
from fastcnn.train.numerics.half import half_network
from fastcnn.train.numerics.precision import NO_BF16, cpu_computes_in

log = logging.getLogger(__name__)

MARGIN = 0.03  # of fp32's time that bf16 must save, lest noise decides for the coarser format
ENTRY = "training step"  # in the file of the cache
WAIT_S = 60.0  # for another process that measures the same
BUDGET_S = 1.0  # after which no further round begins
FEWEST, MOST = 3, 9  # rounds
BATCH, SIDE, LABELS = 32, 32, 10
# vgg16's widths at their sizes, one layer each: 77 of its 313 million products an image
TYPICAL = Network(
    "typical layers",
    "",
    (SIDE,),
    LABELS,
    (
        Conv(64, norm=True, post_slope=0.0),
        *(Conv(k, norm=True, post_slope=0.0, pool=Pool()) for k in (64, 128, 256)),
        Linear(),
    ),
)


class Times(NamedTuple):
    """Seconds of a training step; `steady`: whether all rounds give the same format."""

    fp32: float
    bf16: float
    steady: bool = True

    @property
    def saves(self) -> bool:
        """Whether bf16 saves more than MARGIN."""
        return self.bf16 < (1 - MARGIN) * self.fp32


SECONDS = ("fp32", "bf16")  # what is kept of them
Timing = Callable[[str], Times]


class Decision(NamedTuple):
    """The format, and what to say of it."""

    dtype: Literal["bf16", "fp32"]
    note: str = ""


def decided(
    config: Config, device: torch.device, ranks: Distributed, timing: Timing | None = None
) -> tuple[Config, str]:
    """Return the configuration with the format of `--amp` in the place of "auto", and a note.

    On a GPU it is bf16. On a CPU rank 0 decides for all: bf16 where a training step is faster in it
    (by more than MARGIN), else fp32; fp32 with `--deterministic`, where no timing may decide, and
    with `--conv fused`, whose kernels for the CPU are fp32's.
    timing: measures a step under a backend, `step_times` by default.

    Raises BuildError where the run's backend or convolutions cannot be had.
    """
    run = config.run
    if not run.amp or run.amp_dtype != "auto":
        return config, ""
    found = Decision("bf16")
    if device.type == "cpu":
        own = _decide(run, device, timing or step_times) if ranks.first else None
        found = Decision(*ranks.all_gather_object(own)[0])
    return replace(config, run=replace(run, amp_dtype=found.dtype)), found.note


def _decide(run: RunConfig, device: torch.device, timing: Timing) -> Decision:
    if not cpu_computes_in(torch.bfloat16):
        return Decision("fp32", NO_BF16)
    if run.deterministic:
        why = "with --deterministic no timing may choose its format"
        return Decision("fp32", f"--amp: {why}; training in fp32 (or name one: --amp-dtype bf16)")
    if run.conv == "fused":
        return Decision("fp32", "--amp: --conv fused computes in fp32 on a CPU; training in fp32")
    backend, _ = choose_backend(run.backend, device, None)
    choose_convolution(run.conv, backend, device, None)
    times = known_or_measured(_key(backend, run.conv), lambda: timing(backend))
    faster: Literal["bf16", "fp32"]
    faster = "bf16" if times.saves else "fp32"
    ratio = f"bf16 is {times.fp32 / times.bf16:.2f}x as fast as fp32 on this CPU"
    if not times.steady:
        ratio += " in the worst of several timings, which other work disturbed"
    return Decision(faster, f"--amp: {ratio}; training in {faster}")


def _key(backend: str, conv: str) -> dict[str, Any]:
    """All that the times depend on, beside the network."""
    return {
        "what": "--amp",
        "device": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "conv": conv,
        # the folder of a build is named after all that it was made from; plain torch has none
        "library": load().path.parent.name if backend == "fused" else "",
    }


# the cache


def known_or_measured(key: Mapping[str, Any], measure: Callable[[], Times]) -> Times:
    """Return the times under `key`, of a run before or measured now and, if steady, kept."""
    try:
        path = plan_cache.file_of(cache_dir(), key)
    except DataError as error:
        log.warning("%s; --amp is measured in each run", error)
        return measure()
    if known := _times_in(path):
        return known
    # the runs of a study begin at the same time, and are to train alike
    with _alone(path):
        if known := _times_in(path):
            return known
        times = measure()
        if times.steady:
            plan_cache.add(path, key, {ENTRY: {name: getattr(times, name) for name in SECONDS}})
        return times


def _times_in(path: Path) -> Times | None:
    entry = plan_cache.read(path).get(ENTRY, {})
    fp32, bf16 = map(entry.get, SECONDS)
    if not isinstance(fp32, float) or not isinstance(bf16, float):
        return None
    return Times(fp32, bf16) if 0 < fp32 < math.inf and 0 < bf16 < math.inf else None


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from measuring for the same file, as far as the folder allows."""
    end = time.monotonic() + WAIT_S

    def wait() -> None:
        if time.monotonic() > end:
            raise TimeoutError

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, LeftBehind):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            stack.enter_context(locked(path.with_suffix(".measuring"), wait))
        yield


# the measurement


def step_times(backend: str) -> Times:
    """Time forward and backward of TYPICAL on BATCH images in both formats, in turn, FEWEST to
    MOST rounds, and return the round that favours bf16 least: it is taken where no round is against
    it. torch's random generator stays as it is."""
    with torch.random.fork_rng(devices=[]):
        model = build(TYPICAL, SIDE, LABELS, backend)
        images = torch.randn(BATCH, 3, SIDE, SIDE).to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH) % LABELS
    fp32, bf16 = (_step(model, dtype, images, labels) for dtype in (None, torch.bfloat16))
    for step in (fp32, bf16):
        step()
    rounds: list[Times] = []
    end = time.perf_counter() + BUDGET_S
    while len(rounds) < FEWEST or (len(rounds) < MOST and time.perf_counter() < end):
        rounds.append(Times(_seconds(fp32), _seconds(bf16)))
    worst = max(rounds, key=lambda times: times.bf16 / times.fp32)
    return worst._replace(steady=len({times.saves for times in rounds}) == 1)


def _step(
    model: torch.nn.Module, dtype: torch.dtype | None, images: torch.Tensor, labels: torch.Tensor
) -> Callable[[], Any]:
    """A step as training makes it: its convolutions in `dtype`, None for fp32."""
    network, _ = half_network(model, dtype)
    given = images.to(dtype or images.dtype)
    wanted = [p for p in network.parameters() if p.requires_grad]

    def step() -> None:
        loss = F.cross_entropy(network(given).float(), labels)
        torch.autograd.grad(loss, wanted)

    return step


def _seconds(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
