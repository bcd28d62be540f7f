"""What every benchmark shares: its options, the record of the machine, the JSON file, the table.

Options are environment variables FASTCNN_BENCH_<NAME>; each benchmark's docstring lists its own.
"""

import datetime
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent


def option(name: str, unset: str = "") -> str:
    """Return an option's text, or `unset` where it is not given."""
    return os.environ.get(f"FASTCNN_BENCH_{name}", "").strip() or unset


def switched_on(name: str, unset: bool) -> bool:
    return option(name, str(int(unset))) != "0"


class Report:
    """The content of a run: the JSON file, written anew after every addition, and the table.

    A plugin of pytest: the table comes at the end of the run, in place of pytest-benchmark's own,
    which would tell how long a round of all variants together took. `benchmark`: the name of the
    file that the report is of.
    """

    def __init__(
        self,
        benchmark: str,
        content: dict[str, Any],
        table: Callable[[dict[str, Any]], list[str]],
    ) -> None:
        self.benchmark, self.content, self.table = benchmark, content, table
        self.path = Path(option("JSON")) if option("JSON") else None
        self._start = time.monotonic()

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._start

    def add(self, key: str, *entries: Any) -> None:
        self.content[key] += entries
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1), encoding="utf-8")

    def pytest_benchmark_group_stats(self, benchmarks: list[dict[str, Any]]) -> list[Any] | None:
        ours = all(self.benchmark in str(one["fullname"]) for one in benchmarks)
        return [] if ours else None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.table(self.content):
            terminalreporter.write_line(line)


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: machine, versions, commit, date."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": {"cpu": _cpu_name(), "cores": len(os.sched_getaffinity(0)), "gpu": None},
        "os": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found["machine"]["gpu"] = properties.name
        found["machine"]["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["machine"]["driver"] = (driver or "unknown").splitlines()[0]
    return found


def commit() -> str | None:
    """FASTCNN_COMMIT, else what git says of this tree; None where there is neither."""
    return os.environ.get("FASTCNN_COMMIT") or _output("git", "describe", "--always", "--dirty")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
