"""The record of the machine and the versions that a figure needs beside it."""

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from fastcnn.ops.native.toolchain import cpu_name

ROOT = Path(__file__).resolve().parents[2]  # of a source tree


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure needs beside it: machine, versions, commit, date."""
    found: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "gpu": None},
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
    """FASTCNN_COMMIT, else what git says of the source tree; None where there is neither."""
    if given := os.environ.get("FASTCNN_COMMIT"):
        return given
    # an installed package may lie in somebody else's repository
    in_tree = (ROOT / "csrc" / "kernels.h").exists()
    return _output("git", "describe", "--always", "--dirty") if in_tree else None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
