"""What the native library is made of: its sources, the compilers' commands, and the key of both.

torch's stable C++ ABI needs neither Python's headers nor the rest of torch's, and the .cu files
see no torch header at all, which is most of what a build of a torch extension waits for. The
Python module `_native`, which is optional, is a second file that is linked to the library.
"""

import functools
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastcnn.errors import BuildError
from fastcnn.ops.native import toolchain
from fastcnn.ops.native.compile import Step
from fastcnn.ops.native.gpu_archs import gencode_flags

FORMAT = 1  # of a key and a stamp
LIBRARY = "libfastcnn_ops.so"
# -march=native makes the CPU's features a part of the key; a square root that sets errno is not
# vectorised; the target version is that of the oldest torch allowed
FLAGS = ["-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno"]
FLAGS += ["-fPIC", "-Wno-psabi"]
TORCH_DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
NVCC_FLAGS = [
    *["--std=c++17", "-O3", "--expt-relaxed-constexpr", "-lineinfo"],
    *["-Xptxas=-v", "-Xcompiler=-fPIC"],
]
MODULE_FLAGS = ["-fvisibility=hidden", "-Wl,-rpath,$ORIGIN"]
CUDA_DEFINES = ["-DFASTCNN_CUDA", "-DUSE_CUDA"]
PACKAGE = Path(__file__).parents[2]


def source_dir() -> Path:
    """Return the folder of the sources: the copy in an installed package, else the repository's.

    Raises BuildError if there is neither.
    """
    for folder in (PACKAGE / "_csrc", PACKAGE.parent / "csrc"):
        if (folder / "bindings.cpp").exists():
            return folder
    raise BuildError(
        f"{PACKAGE}: the sources of the native library are missing; install fastcnn again"
    )


@torch.compiler.assume_constant_result
def pending_channels() -> int:
    """Return the most channels of an input that a convolution's kernel activates while loading it:
    kPendingChannels of kernels.h. Raises BuildError without sources."""
    return _pending_channels(source_dir())


@functools.cache
def _pending_channels(source: Path) -> int:
    found = re.search(r"kPendingChannels = (\d+);", (source / "kernels.h").read_text("utf-8"))
    assert found, f"{source}/kernels.h: no kPendingChannels"
    return int(found[1])


def sources_hash(source: Path, cuda: bool) -> str:
    """Return the sha256 of the CUDA half's files, or of all others but the Python module's."""
    digest = hashlib.sha256()
    for path in sorted(source.rglob("*")):
        if path.suffix not in (".h", ".cpp", ".cuh", ".cu") or path == source / "native.cpp":
            continue
        # kernels.h declares the CUDA half
        if (path.parent == source / "cuda" or path == source / "kernels.h") == cuda:
            content = path.read_bytes()
            digest.update(f"{path.relative_to(source)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def key_of(source: Path, archs: Iterable[str]) -> dict[str, Any]:
    """Return everything that a library for `archs` depends on; None for a tool that is missing."""
    compiler = toolchain.find_compiler()
    key = {
        "format": FORMAT,
        "torch": torch.__version__,
        "libtorch": libtorch(),
        "cpu": toolchain.cpu_features(),
        "compiler": [toolchain.identity(compiler[0]), *compiler[1:]] if compiler else None,
        "flags": [*FLAGS, *TORCH_DEFINES],
        "sources": sources_hash(source, cuda=False),
        "archs": list(archs),
    }
    if key["archs"]:
        cuda = toolchain.find_cuda()
        key["cuda_sources"] = sources_hash(source, cuda=True)
        key["cuda_flags"] = [*CUDA_DEFINES, *NVCC_FLAGS]
        key["nvcc"] = toolchain.identity(cuda.nvcc) if cuda else None
    return key


def libtorch() -> str:
    """Return what tells builds of torch apart that have one version: the commit, CUDA's version and
    the length of the library. Neither its place nor its date: it may be copied."""
    file = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    length = file.stat().st_size if file.exists() else 0
    return f"{torch.version.git_version}, CUDA {torch.version.cuda}, {length} bytes"


def fits(stamped: Any, key: dict[str, Any]) -> bool:
    """Whether a library stamped so is what `key` asks for.

    Only the tools that are here need be those it was compiled with: a library outlives them.
    """
    if not isinstance(stamped, dict) or stamped.keys() != key.keys():
        return False
    missing = {name for name in ("compiler", "nvcc") if key.get(name) is None}
    return all(stamped[name] == value for name, value in key.items() if name not in missing)


def folder_name(key: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"torch{key['torch']}-{'-'.join(key['archs']) or 'cpu'}-{digest[:16]}"


def library_steps(source: Path, archs: tuple[str, ...]) -> list[Step]:
    """Return the commands that make the library; the tools that they need must be there."""
    compiler = toolchain.find_compiler()
    # the longest first
    steps = _nvcc_steps(source, archs, compiler[0]) if archs else []
    torch_include = str(Path(torch.__file__).parent / "include")
    flags = [*FLAGS, *TORCH_DEFINES, *_flags(source, archs), "-isystem", torch_include]
    for path in [*sorted(source.glob("bindings*.cpp")), *sorted((source / "cpu").glob("*.cpp"))]:
        output = _object(source, path)
        steps.append(Step(output, [*compiler, *flags, "-c", str(path), "-o", output]))
    objects = tuple(step.output for step in steps)
    # -z defs: a name that no library defines is an error here instead of at the first load
    link = ["-shared", f"-Wl,-soname,{LIBRARY}", "-Wl,-z,defs", "-o", LIBRARY, *objects]
    return [*steps, Step(LIBRARY, [*compiler, *link, *_torch_libraries(archs)], objects)]


def _nvcc_steps(source: Path, archs: tuple[str, ...], host_compiler: str) -> list[Step]:
    cuda = toolchain.find_cuda()
    if cuda is None:
        raise BuildError(toolchain.no_cuda())
    command = [str(cuda.nvcc), "-ccbin", host_compiler, *NVCC_FLAGS, *gencode_flags(archs)]
    steps = []
    for path in sorted((source / "cuda").glob("*.cu")):
        output = _object(source, path)
        line = [*command, f"-I{source}", "-c", str(path), "-o", output]
        steps.append(Step(output, line))
    return steps


def _object(source: Path, path: Path) -> str:
    return f"{path.relative_to(source)}.o".replace("/", "_")


def _flags(source: Path, archs: tuple[str, ...]) -> list[str]:
    cuda = toolchain.find_cuda() if archs else None
    return [f"-I{source}", *([*CUDA_DEFINES, "-isystem", str(cuda.include)] if cuda else [])]


def _torch_libraries(archs: tuple[str, ...]) -> list[str]:
    names = ["libtorch.so", "libtorch_cpu.so", "libc10.so"]
    libraries: list[Path] = []
    if archs:
        names += ["libtorch_cuda.so", "libc10_cuda.so"]
        libraries.append(_cuda_runtime())
    folder = Path(torch.__file__).parent / "lib"
    return [str(path) for path in [*(folder / name for name in names), *libraries]]


def _cuda_runtime() -> Path:
    cuda, major = toolchain.find_cuda(), int(str(torch.version.cuda).split(".")[0])
    if cuda is None:
        raise BuildError(toolchain.no_cuda())
    if (runtime := cuda.runtime(major)) is None:
        raise BuildError(f"{cuda.home}: libcudart.so.{major} is missing; install the toolkit again")
    return runtime


def module_name(source: Path) -> str:
    """Return the file name of the Python module, which tells builds for other Pythons apart.

    Raises ImportError with what to install if headers are missing.
    """
    words = [*map(str, toolchain.python_headers()), *FLAGS, *MODULE_FLAGS]
    content = json.dumps(words).encode() + (source / "native.cpp").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return f"_native-{digest[:12]}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _archs_define(archs: tuple[str, ...]) -> str:
    return f'-DFASTCNN_ARCHS="{";".join(archs)}"'


def module_steps(source: Path, archs: tuple[str, ...], library: Path, output: str) -> list[Step]:
    """Return the command that makes the Python module, linked to the library beside it."""
    # torch's include folder holds a pybind11 of its own, which it keeps from stable code
    includes = [word for path in toolchain.python_headers() for word in ("-isystem", str(path))]
    command = [
        *[*toolchain.find_compiler(), *FLAGS, *MODULE_FLAGS, *_flags(source, archs)],
        *[*includes, "-shared", "-o", output, str(source / "native.cpp"), str(library)],
        *([str(_cuda_runtime()), _archs_define(archs)] if archs else []),
    ]
    return [Step(output, command)]
