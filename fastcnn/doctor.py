"""What this machine offers to fastcnn, what is missing, and the remedy for each."""

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from typing import Any

import fastcnn
from fastcnn.errors import FastcnnError

# package, what it is for, how to get it
PACKAGES = (
    ("torch", "everything", "pip install 'torch>=2.10'"),
    ("numpy", "everything", "pip install numpy"),
    ("torchvision", "--loader torch", "pip install torchvision (with torch's default CUDA build)"),
    ("scikit-learn", "--data digits", "pip install scikit-learn"),
    ("pillow", "image folders", "pip install pillow"),
    ("matplotlib", "curves.png, confusion_matrix.png", "pip install matplotlib"),
    ("jinja2", "index.html", "pip install jinja2"),
    ("rich", "progress", "pip install rich"),
    ("jsonargparse", "everything", "pip install jsonargparse"),
)
MODULES = {"scikit-learn": "sklearn", "pillow": "PIL"}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `remedy` is empty where nothing is wrong."""

    subject: str
    state: str
    ok: bool = True
    needed: bool = False
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at packages, devices and the cache; never raises for what is missing."""
    return [
        Finding("fastcnn", fastcnn.__version__),
        Finding("python", platform.python_version()),
        *[_package(*entry) for entry in PACKAGES],
        *_devices(),
        _cache(),
    ]


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


def print_report(findings: list[Finding]) -> None:
    """Print one line a finding, the remedy below where something is missing."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]!![/]" if finding.needed else "[yellow]--[/]"
        console.print(f"{mark} {finding.subject:<14}", end="")
        console.print(finding.state, markup=False)
        if finding.remedy:
            console.print(f"   {'':<14}→ {finding.remedy}", markup=False)


def _package(name: str, purpose: str, remedy: str) -> Finding:
    needed = purpose == "everything"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"missing; needed for {purpose}", False, needed, remedy)
    try:
        importlib.import_module(MODULES.get(name, name))
    except Exception as error:  # a broken package raises anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(name, f"{version}, but its import fails: {reason}", False, needed, remedy)
    return Finding(name, version)


def _devices() -> list[Finding]:
    try:
        import torch

        from fastcnn.train.host import usable_cores
        from fastcnn.train.precision import cpu_computes_in
    except Exception:  # reported by the package's own line
        return []
    formats = [
        n for n, d in (("bf16", torch.bfloat16), ("fp16", torch.float16)) if cpu_computes_in(d)
    ]
    amp = " and ".join(formats) if formats else "no half precision: --amp runs in fp32"
    capability = torch.backends.cpu.get_cpu_capability()
    cpu = Finding("CPU", f"{usable_cores()} cores, {capability}, {amp}")
    if not torch.cuda.is_available():
        build = torch.version.cuda
        state = (
            f"none seen (torch built for CUDA {build})" if build else "torch is a CPU-only build"
        )
        remedy = "nothing to do without an NVIDIA GPU; with one, check `nvidia-smi` and the driver"
        return [cpu, Finding("GPU", state, False, False, remedy)]
    return [cpu, *[_gpu(torch, i) for i in range(torch.cuda.device_count())]]


def _gpu(torch: Any, index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    capability = f"sm_{properties.major}{properties.minor}"
    state = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}"
    if capability in torch.cuda.get_arch_list() or not torch.cuda.get_arch_list():
        return Finding(f"GPU {index}", state)
    built = ", ".join(torch.cuda.get_arch_list())
    remedy = (
        f"this torch is built for {built}; install one for {capability} if kernels fail to load"
    )
    return Finding(f"GPU {index}", state, False, False, remedy)


def _cache() -> Finding:
    from fastcnn.data.store import cache_dir

    try:
        return Finding("cache", str(cache_dir()))
    except FastcnnError as error:
        return Finding("cache", str(error), False, False, "set FASTCNN_CACHE to a writable folder")
