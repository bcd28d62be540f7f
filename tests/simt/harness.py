"""Compile csrc/cuda for the CPU with g++ and the header simt.h, as a Python module."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from fastcnn.ops.native import toolchain

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SANITIZE = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1"]
# alias: a test reads and writes activations as bytes, halves and vectors alike;
# fortify: its longjmp refuses to leave a fiber
FLAGS = ["-std=c++17", "-fPIC", "-w", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]


def requirements() -> tuple[list[str], list[Path]]:
    """Return the C++ compiler and the include folders; skips the test that lacks one."""
    compiler = toolchain.find_compiler()
    if not compiler:
        pytest.skip(toolchain.no_compiler())
    try:
        python = toolchain.python_headers()
    except ImportError as error:
        pytest.skip(str(error))
    cuda = toolchain.find_cuda()
    folders = [cuda.include] if cuda else []
    folders += [i for f in toolchain.pip_cuda_folders() for i in sorted(f.glob("cu*/include"))]
    for folder in folders:
        if all((folder / name).exists() for name in ("cuda_bf16.h", "crt/host_config.h")):
            return compiler, [folder, *python]
    pytest.skip("no CUDA headers: no toolkit, and pip's nvidia/cu* are absent or incomplete")


def compile_module(folder: Path, flags: list[str], plant: "Plant | None" = None) -> Path:
    """Return simt_kernels, compiled into `folder` from csrc/cuda, or with an error planted."""
    compiler, include = requirements()
    command = [*compiler, *FLAGS, *flags, "-include", str(HERE / "simt.h")]
    for path in include:
        command += ["-isystem", str(path)]
    cuda = (plant.tree(folder) if plant else CSRC) / "cuda"
    sources = [*cuda.glob("*.cu"), *HERE.glob("*.cu"), *HERE.glob("*.cpp")]

    def compile_one(source: Path) -> str:
        if plant and source.name != plant.source:
            return str(plant.base / f"{source.stem}.o")
        target = str(folder / f"{source.stem}.o")
        _run([*command, "-x", "c++", "-c", str(source), "-o", target])
        return target

    # longest first
    sources.sort(key=lambda source: -source.stat().st_size)
    with ThreadPoolExecutor(toolchain.parallel_jobs()) as pool:
        objects = list(pool.map(compile_one, sources))
    # the linker keeps the first of several copies of an inline function: that with the error
    objects.sort(key=lambda target: Path(target).parent != folder)
    path = folder / f"simt_kernels{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([*compiler, *flags, "-shared", *objects, "-o", str(path)])
    return path


@dataclass(frozen=True)
class Plant:
    """An error to plant: `new` for every `old` of a file, seen by one source that is compiled anew;
    the other objects are those of the folder `base`."""

    base: Path
    source: str
    file: str
    old: str
    new: str

    def tree(self, folder: Path) -> Path:
        """Return a copy of csrc with the error."""
        copy = folder / "csrc"
        shutil.copytree(CSRC, copy)
        text = (copy / "cuda" / self.file).read_text("utf-8")
        assert self.old in text
        (copy / "cuda" / self.file).write_text(text.replace(self.old, self.new), "utf-8")
        return copy


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("simt_kernels", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_apart(path: Path, program: str) -> str:
    """Return what a program prints that finds the module at `path` as `kernels`, beside `chain`:
    a process has one module of a name."""
    load = f"kernels = harness.load_module(harness.Path({str(path)!r}))"
    return run_program(f"{load}\n{program}")


def run_program(program: str) -> str:
    """Return what a program prints that finds `chain` and `harness`."""
    head = f"import sys; sys.path[:0] = {sys.path!r}; from simt import chain, harness"
    command = [sys.executable, "-c", f"{head}\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-4000:]}"


def sanitizer_environment() -> dict[str, str]:
    """Return what Python needs to load a sanitized module; skips the test without the library."""
    compiler, _ = requirements()
    library = toolchain.output_of(*compiler, "-print-file-name=libasan.so").strip()
    if not Path(library).is_absolute():
        pytest.skip(f"{compiler[0]} has no libasan.so")
    # leaks: Python's own
    return {**os.environ, "LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
