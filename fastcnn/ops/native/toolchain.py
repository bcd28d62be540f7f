"""What this machine is and compiles with: CPU, C++ compiler, ninja, CUDA toolkit, Python headers.

Everything is found by rule at the time of asking. Programs are run only to ask for a version; what
decides whether a library is still right is a program's path, size and time, which costs no process.
"""

import contextlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

JOB_BYTES = 3 * 2**29  # of memory for one compiler: 1.5 GiB
NO_NINJA = "ninja is missing: pip install ninja"


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit."""

    home: Path

    @property
    def nvcc(self) -> Path:
        return self.home / "bin" / "nvcc"

    @property
    def include(self) -> Path:
        return self.home / "include"

    def version(self) -> str:
        """Return the version of nvcc, "13.0", or "" if it does not run."""
        found = re.search(r"release (\d+\.\d+)", output_of(str(self.nvcc), "--version"))
        return found[1] if found else ""

    def runtime(self, major: int) -> Path | None:
        """Return the shared CUDA runtime of this major version; torch's own copy comes first."""
        folders = [folder / f"cu{major}" / "lib" for folder in pip_cuda_folders()]
        folders += [self.home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib")]
        files = (folder / f"libcudart.so.{major}" for folder in folders)
        return next((file for file in files if file.exists()), None)


def no_compiler() -> str:
    """Why there is no C++ compiler, and the remedy."""
    if named := os.environ.get("CXX"):
        return f"CXX is {named!r}, which is no program here: set it to a C++ compiler, or unset it"
    return "no C++ compiler: install g++ (apt-get install g++), or set CXX to one"


def find_compiler() -> list[str]:
    """Return the command of the C++ compiler: CXX, else c++, g++ or clang++; [] without one."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        try:
            words = shlex.split(candidate)
        except ValueError:  # CXX with a quotation that does not end
            continue
        if words and (path := shutil.which(words[0])):
            return [path, *words[1:]]
    return []


def find_ninja() -> str | None:
    """Return ninja: that of the Python package, which a venv need not be activated for, or
    the one on PATH."""
    with contextlib.suppress(Exception):  # a broken package raises anything
        from ninja import BIN_DIR

        if path := shutil.which("ninja", path=BIN_DIR):
            return path
    return shutil.which("ninja")


def find_cuda() -> Cuda | None:
    """Return the CUDA toolkit: CUDA_HOME, else the one that holds the nvcc on PATH, else pip's."""
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    if nvcc := shutil.which("nvcc"):
        homes.append(Path(nvcc).resolve().parent.parent)
    for home in homes:
        if _is_toolkit(home):
            return Cuda(home)
    # a wrapper script: nvcc says itself where it lies
    if nvcc and (asked := _home_by_asking(nvcc)) and _is_toolkit(asked):
        return Cuda(asked)
    for folder in pip_cuda_folders():
        for home in sorted(folder.glob("cu[0-9]*"), reverse=True):
            if _is_toolkit(home):
                return Cuda(home)
    return None


def no_cuda() -> str:
    """Return why there is no CUDA toolkit, with the remedy; for when `find_cuda` finds none."""
    named = os.environ.get("CUDA_HOME")
    reason = f"CUDA_HOME={named} holds no" if named else "no"
    return (
        f"{reason} CUDA toolkit (bin/nvcc and include/cuda_runtime.h): install the one of torch's "
        "CUDA version and put nvcc on PATH or set CUDA_HOME"
    )


def _is_toolkit(home: Path) -> bool:
    cuda = Cuda(home)
    return os.access(cuda.nvcc, os.X_OK) and (cuda.include / "cuda_runtime.h").exists()


def _home_by_asking(nvcc: str) -> Path | None:
    found = re.search(r"^#\$ TOP=(.+)$", output_of(nvcc, "--dryrun", "x.cu"), re.MULTILINE)
    return Path(found[1].strip()).resolve() if found else None


def pip_cuda_folders() -> list[Path]:
    """Return the `nvidia` folders of site-packages, where pip puts CUDA's parts."""
    spec = importlib.util.find_spec("nvidia")
    return [Path(place) for place in spec.submodule_search_locations or ()] if spec else []


def python_headers() -> list[Path]:
    """Return the include folders of Python and pybind11; raises ImportError with what to install
    if one is missing."""
    include = Path(sysconfig.get_paths()["include"])
    if not (include / "Python.h").exists():
        raise ImportError(f"{include} holds no Python.h: apt-get install python3-dev")
    try:
        import pybind11
    except ImportError as error:
        raise ImportError("pybind11 is missing: pip install pybind11") from error
    return [include, Path(pybind11.get_include())]


def identity(program: str | Path) -> str:
    """Return what changes when the program at this path is replaced by another."""
    path = Path(program).resolve()
    stat = path.stat()
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


def output_of(*command: str) -> str:
    """Return what a program prints, errors included; "" if it cannot be run."""
    try:
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""


def first_line(*command: str) -> str:
    return (output_of(*command).splitlines() or [""])[0].strip()


def cpu_features() -> str:
    """Return the instruction sets of this CPU, as far as the kernel names them."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:  # the first core's is read alone: there may be hundreds
            if line.startswith(("flags", "Features")):
                return " ".join(sorted(line.split(":", 1)[1].split()))
    return ""


def parallel_jobs() -> int:
    """Return how many compilers the cores and the free memory carry at once."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, min(cores, free_memory() // JOB_BYTES))


def free_memory() -> int:
    """Return the bytes that this machine, or the container's limit, leaves."""
    free = 2**62
    with contextlib.suppress(OSError, AttributeError):
        found = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = int(found[1]) * 1024 if found else free
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no limit
            folder = Path("/sys/fs/cgroup")
            free = min(free, int((folder / limit).read_text()) - int((folder / used).read_text()))
    return free


def cpu_name() -> str:
    """The model of the CPU, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
