"""Which loader and store suit images and device: what `auto` comes to, and why."""

import importlib.util
import os
import shutil
import textwrap
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastcnn.cache import cache_dir
from fastcnn.config import DataConfig
from fastcnn.errors import UsageError

NO_DALI = (
    "pip install 'fastcnn[dali]' (CUDA 12 and CPU) or 'fastcnn[dali-cu13]', "
    "or take --loader resident or --loader torch"
)
OLDEST = (2, 2)  # DALI: before it, a part of a photograph is cut out before it is turned upright
REASON = 200  # characters of another package's error
PART = 2  # images may take one part in so many of the free memory
# limit and use of a container's memory: cgroup v2, v1
CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    ),
)


class NoDaliError(UsageError):
    """DALI is missing, broken or too old, as `reason` says."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"--loader dali: {reason}; {NO_DALI}")
        self.reason = reason


@dataclass(frozen=True)
class Choice:
    """loader and store as the options, but for auto; `why` says in a line what auto came to."""

    loader: Literal["resident", "dali", "torch"]
    store: Literal["packed", "files"]
    why: str


def choose(
    config: DataConfig,
    images: int,
    sides: tuple[int, int],
    folder: bool,
    device: torch.device,
) -> Choice:
    """Return what suits `images` uint8 RGB images of `sides` (height, width) on `device`.

    auto is the resident loader where the pixels take less than half of the free memory (the GPU's
    for a GPU) and, of a folder, fit on the cache's disk; else DALI's if it can be imported,
    else torch's.
    folder: whether they can be decoded from their files every epoch; an archive's are packed in any
    case. Raises UsageError for --store files of an archive and beside --loader resident, and for
    --loader dali where it is not installed.
    """
    _check(config, folder)
    loader, why = config.loader, ""
    if loader == "auto":
        loader, reason = _suited(config, images * sides[0] * sides[1] * 3, folder, device)
        why = f"--loader auto is {loader}: {reason}"
    packed = loader == "resident" or not folder
    store = config.store if config.store != "auto" else ("packed" if packed else "files")
    return Choice(loader, store, why)


def _check(config: DataConfig, folder: bool) -> None:
    if config.store == "files" and not folder:
        raise UsageError(
            f"--store files: {config.data} is no folder of images; leave it out, or unpack the "
            "archive and name its folder"
        )
    if config.store == "files" and config.loader == "resident":
        raise UsageError(
            "--store files: the resident loader holds packed images; leave it out, or take "
            "--loader dali or --loader torch"
        )
    if config.loader == "dali" and not has_dali():
        raise NoDaliError("DALI is not installed")


def _suited(
    config: DataConfig, size: int, folder: bool, device: torch.device
) -> tuple[Literal["resident", "dali", "torch"], str]:
    """Return what auto comes to for `size` bytes of pixels, and why."""
    if config.store == "files":
        why = "--store files"
    else:
        free, what = free_memory(device)
        room = free_disk() if folder else size
        why = f"{_gb(size)} of pixels, {_gb(free)} of {what} free"
        if PART * size < free and size <= room:
            return "resident", why
        if PART * size < free:
            why = f"{_gb(size)} of pixels, {_gb(room)} free on the cache's disk"
    if not has_dali():
        return "torch", f"{why}; DALI, which is faster, is not installed"
    try:
        import_dali()
    except NoDaliError as error:
        return "torch", f"{why}; {error.reason}"
    return "dali", why


def has_dali() -> bool:
    """Whether DALI is installed; it is not imported."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except (ImportError, ValueError):  # no package nvidia; a test's None in its place
        return False


def import_dali() -> tuple[Any, Any, Any]:
    """Return DALI's Pipeline, fn and types. Raises NoDaliError for a missing, broken, old one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from nvidia.dali import Pipeline, __version__, fn, types
    except Exception as error:  # a broken package raises anything
        said = textwrap.shorten(str(error), REASON, placeholder=" …") or type(error).__name__
        raise NoDaliError(f"DALI cannot be imported ({said})") from error
    if tuple(map(int, __version__.split(".")[:2])) < OLDEST:
        raise NoDaliError(f"DALI {__version__}, {'.'.join(map(str, OLDEST))} is needed")
    return Pipeline, fn, types


def free_memory(device: torch.device) -> tuple[int, str]:
    """Return the free bytes where resident images would lie, and what they are called."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0], "GPU memory"
    return min([_available(), *_left_in_cgroups()]), "memory"


def free_disk() -> int:
    """Return the bytes that are free where the cache lies."""
    return shutil.disk_usage(cache_dir()).free


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration, ValueError, IndexError):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _left_in_cgroups() -> list[int]:
    """What a container's limit leaves; files that are cached count as free."""
    left = []
    for limit, used in CGROUPS:
        try:
            stat = (Path(used).parent / "memory.stat").read_text().splitlines()
            cached = sum(int(x.split()[1]) for x in stat if x.startswith("inactive_file "))
            left.append(int(Path(limit).read_text()) - int(Path(used).read_text()) + cached)
        except (OSError, ValueError):  # another version, or no limit ("max")
            continue
    return left


def _gb(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"
