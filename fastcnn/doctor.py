"""What this machine offers to fastcnn, what is missing, and the remedy for each."""

import importlib.metadata
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from fastcnn.errors import FastcnnError
from fastcnn.text import first_line
from fastcnn.version import __version__

# package, what it is for, how to get it
PACKAGES = (
    ("torch", "everything", "pip install 'torch>=2.10'"),
    ("numpy", "everything", "pip install numpy"),
    ("torchvision", "--loader torch", "pip install torchvision (with torch's default CUDA build)"),
    ("scikit-learn", "--data digits", "pip install scikit-learn"),
    ("pillow", "image folders", "pip install pillow"),
    ("matplotlib", "curves.png, confusion_matrix.png", "pip install matplotlib"),
    ("jinja2", "index.html", "pip install jinja2"),
    ("scipy", "reproduce, sweep", "pip install scipy"),
    ("rich", "progress", "pip install rich"),
    ("jsonargparse", "everything", "pip install jsonargparse"),
    ("pybind11", "the module fastcnn._native", "pip install pybind11"),
    ("tensorboard", "--loggers tensorboard", "pip install 'fastcnn[tensorboard]'"),
    ("wandb", "--loggers wandb", "pip install 'fastcnn[wandb]'"),
)
DALI_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
DALI_REMEDY = "pip install 'fastcnn[dali]' (CUDA 12 and CPU) or 'fastcnn[dali-cu13]'"
WIDTH = 16  # of a report's first column
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
    """Look at packages, devices, the cache, compilers and the native library, which is loaded if it
    is there and never compiled; never raises for what is missing."""
    return [
        Finding("fastcnn", __version__),
        Finding("python", platform.python_version()),
        *[_package(*entry) for entry in PACKAGES],
        _dali(),
        *_devices(),
        _cache(),
        *_native(),
    ]


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


def print_report(findings: list[Finding]) -> None:
    """Print one line a finding, the remedy below where something is missing."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        mark = "[green]ok[/]" if finding.ok else "[red]!![/]" if finding.needed else "[yellow]--[/]"
        console.print(f"{mark} {finding.subject:<{WIDTH}}", end="")
        console.print(finding.state, markup=False)
        if finding.remedy:
            console.print(f"   {'':<{WIDTH}}→ {finding.remedy}", markup=False)


def _package(name: str, purpose: str, remedy: str) -> Finding:
    needed = purpose == "everything"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"missing; needed for {purpose}", False, needed, remedy)
    try:
        importlib.import_module(MODULES.get(name, name))
    except Exception as error:  # a broken package raises anything
        reason = first_line(error)
        return Finding(name, f"{version}, but its import fails: {reason}", False, needed, remedy)
    return Finding(name, version)


def _dali() -> Finding:
    """DALI under either of its names, one for each CUDA version."""
    found = []
    for name in DALI_PACKAGES:
        try:
            found.append(f"{importlib.metadata.version(name)} ({name})")
        except importlib.metadata.PackageNotFoundError:
            continue
    if not found:
        return Finding("DALI", "missing; needed for --loader dali", False, False, DALI_REMEDY)
    if len(found) > 1:
        remedy = f"pip uninstall {' '.join(DALI_PACKAGES)}, then {DALI_REMEDY}"
        return Finding("DALI", f"twice: {' and '.join(found)}", False, False, remedy)
    try:
        importlib.import_module("nvidia.dali")
    except Exception as error:  # a broken package raises anything
        reason = first_line(error)
        state = f"{found[0]}, but its import fails: {reason}"
        return Finding("DALI", state, False, False, DALI_REMEDY)
    return Finding("DALI", found[0])


def _devices() -> list[Finding]:
    try:
        import torch

        from fastcnn.train.host import usable_cores
        from fastcnn.train.numerics.precision import cpu_computes_in
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
    from fastcnn.cache import cache_dir

    try:
        return Finding("cache", str(cache_dir()))
    except FastcnnError as error:
        return Finding("cache", str(error), False, False, "set FASTCNN_CACHE to a writable folder")


def _native() -> list[Finding]:
    try:
        import fastcnn.ops.native.build  # noqa: F401
    except Exception:  # torch is missing or broken, which its own line reports
        return []
    return [*_compilers(), _nvcc(), *_native_library()]


def _compilers() -> list[Finding]:
    from fastcnn.ops.native import toolchain

    compiler, ninja = toolchain.find_compiler(), toolchain.find_ninja()
    found = Finding("C++ compiler", "missing", False, False, toolchain.no_compiler())
    if compiler:
        version = toolchain.first_line(*compiler, "--version")
        found = Finding("C++ compiler", f"{' '.join(compiler)}: {version}")
    ninja_found = Finding("ninja", "missing", False, False, toolchain.NO_NINJA)
    if ninja:
        ninja_found = Finding("ninja", f"{ninja}: {toolchain.first_line(ninja, '--version')}")
    return [found, ninja_found]


def _nvcc() -> Finding:
    import torch

    from fastcnn.ops.native import toolchain

    cuda = toolchain.find_cuda()
    if cuda is None:
        remedy = f"nothing to do without an NVIDIA GPU; with one, {toolchain.no_cuda()}"
        return Finding("nvcc", "missing: no CUDA kernels can be built", False, False, remedy)
    version = cuda.version()
    state = f"{cuda.nvcc}: {version or 'does not run'}"
    wanted = torch.version.cuda
    if wanted is None:
        remedy = "nothing to do without an NVIDIA GPU; with one, install torch's CUDA build"
        return Finding("nvcc", f"{state}, but torch is a CPU-only build", False, False, remedy)
    major = wanted.split(".")[0]
    if version.split(".")[0] != major:
        remedy = f"set CUDA_HOME to a CUDA {major} toolkit"
        return Finding("nvcc", f"{state}, but torch is of CUDA {wanted}", False, False, remedy)
    return Finding("nvcc", f"{state}, as torch's CUDA {wanted}")


def _native_library() -> list[Finding]:
    from fastcnn import ops
    from fastcnn.ops.native import build

    try:
        wanted = build.wanted_archs()
        folder = Finding("native cache", str(build.native_dir()))
        built = build.load_existing()
    except FastcnnError as error:
        return [Finding("native library", str(error), False, False, "see the message")]
    if built is None:
        archs = Finding("CUDA code", f"would be built for {', '.join(wanted.archs) or 'no GPU'}")
        remedy = build.available() or "`fastcnn build`, or the first training builds it"
        return [archs, folder, Finding("native library", "not built", False, False, remedy)]
    archs = Finding("CUDA code", f"built for {', '.join(built.archs) or 'no GPU'}")
    return [
        *_missing_gpu_code(built.archs, archs),
        folder,
        Finding("native library", f"built {built.date} for {built.target}: {built.path}"),
        *[_kernels(ops.OP_NAMES, key) for key in ("CPU", "CUDA")],
    ]


def _missing_gpu_code(built: tuple[str, ...], archs: Finding) -> list[Finding]:
    """The line on architectures, and one for each kind of GPU that cannot run any of them."""
    from fastcnn.ops.native.build import check_gpu_code
    from fastcnn.ops.native.gpu_archs import name_of, present_capabilities

    reasons = {name_of(c): check_gpu_code(c, built) for c in present_capabilities()}
    return [archs] + [
        Finding(f"code for {gpu}", "missing", False, False, reason)
        for gpu, reason in reasons.items()
        if reason
    ]


def _kernels(names: Iterable[str], key: str) -> Finding:
    """Which ops the loaded library has kernels for, by the dispatcher's own account."""
    import torch

    has = torch._C._dispatch_has_kernel_for_dispatch_key
    there = {name: has(f"fastcnn::{name}", key) for name in names}
    listed = [
        ", ".join(name for name in there if there[name] == wanted) for wanted in (True, False)
    ]
    state = f"{sum(there.values())} of {len(there)} ops: {listed[0]}"
    if all(there.values()):
        return Finding(f"{key} kernels", state)
    if key == "CUDA" and not any(there.values()):
        remedy = "nothing to do without an NVIDIA GPU; else `fastcnn build --cuda`"
        return Finding(f"{key} kernels", "none", False, False, remedy)
    return Finding(f"{key} kernels", f"{state}; missing: {listed[1]}", False, False, "reinstall")
