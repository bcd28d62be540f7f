"""Architectures that CUDA code is compiled for, and the GPUs that it then runs on.

An architecture is a compute capability, "8.0"; with "+PTX", "9.0+PTX", the library also holds an
intermediate form that the driver compiles for GPUs newer than any named one.
"""

import re
from collections.abc import Iterable

from fastcnn.errors import UsageError

ALL = ("8.0", "9.0+PTX")  # what `--cuda` compiles for: Ampere, Ada, Hopper and what comes after
Capability = tuple[int, int]


def parse_archs(text: str, source: str) -> tuple[str, ...]:
    """Return the architectures in "8.0;9.0+PTX" (also with commas or spaces), oldest first.

    "none" is none. `source` is where the text stands, for the message. Raises UsageError for a
    word that is no architecture.
    """
    words = re.split(r"[;,\s]+", text.strip())
    if words == ["none"]:
        return ()
    for word in words:
        if not re.fullmatch(r"\d+\.\d(\+PTX)?", word):
            raise UsageError(f"{source}: '{word}' is no architecture; write 8.0;9.0+PTX, or none")
    # 9.0+PTX includes 9.0
    with_ptx = {word.removesuffix("+PTX") for word in words if word.endswith("+PTX")}
    return tuple(sorted(set(words) - with_ptx, key=capability_of))


def capability_of(arch: str) -> Capability:
    """Return the compute capability that an architecture names: (9, 0) for "9.0+PTX"."""
    major, minor = arch.removesuffix("+PTX").split(".")
    return int(major), int(minor)


def name_of(capability: Capability) -> str:
    return f"{capability[0]}.{capability[1]}"


def present_capabilities() -> list[Capability]:
    """Compute capabilities of the GPUs that torch can use, each once."""
    import torch

    # asked first, since it does not start CUDA; a build for ROCm has no CUDA version
    if torch.version.cuda is None or torch.cuda.device_count() == 0:
        return []
    devices = range(torch.cuda.device_count())
    return sorted({torch.cuda.get_device_capability(i) for i in devices})


def includes(built: Iterable[str], named: Iterable[str]) -> bool:
    """Whether a library for `built` holds all code that `named` asks for; PTX adds to an
    architecture, so that 9.0+PTX includes 9.0."""
    return set(named) <= {name for arch in built for name in (arch, arch.removesuffix("+PTX"))}


def runs_on(capability: Capability, archs: Iterable[str]) -> bool:
    """Whether code for `archs` runs on a GPU of this capability.

    Compiled code runs on later GPUs of the same major number, PTX on every later GPU (CUDA C++
    Programming Guide, "Binary Compatibility" and "PTX Compatibility").
    """
    for arch in archs:
        version = capability_of(arch)
        if version[0] == capability[0] and version[1] <= capability[1]:
            return True
        if arch.endswith("+PTX") and version <= capability:
            return True
    return False


def archs_of_torch(listed: Iterable[str]) -> tuple[str, ...]:
    """Return the architectures in torch's own list of what it is built for: sm_90, compute_120, …

    Code for one GPU alone (sm_90a) counts as any.
    """
    found = []
    for word in listed:
        if match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", word):
            found.append(f"{match[2]}.{match[3]}" + ("+PTX" if match[1] == "compute" else ""))
    return tuple(found)


def check_gpu_code(capability: Capability, archs: Iterable[str]) -> str:
    """Return "" if a library built for `archs` runs on a GPU of this capability, else the reason
    and the remedy in one line."""
    built = tuple(archs)
    if runs_on(capability, built):
        return ""
    what = f"holds CUDA code for {', '.join(built)}" if built else "was built for the CPU alone"
    wanted = name_of(capability)
    return (
        f"the native library {what}, which this GPU (compute capability {wanted}) cannot run; "
        f"`fastcnn build --archs {wanted}` builds for it"
    )


def gencode_flags(archs: Iterable[str]) -> list[str]:
    """Return nvcc's flags: code for every architecture, and PTX where it is named."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        kinds = ("sm", "compute") if arch.endswith("+PTX") else ("sm",)
        flags += [f"-gencode=arch=compute_{number},code={kind}_{number}" for kind in kinds]
    return flags
