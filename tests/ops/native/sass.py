"""The machine code of compiled CUDA kernels."""

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from fastcnn.ops.native import toolchain


def find_disassembler() -> Path | None:
    """cuobjdump of the CUDA toolkit, on the PATH, or of triton; with the nvdisasm that it calls."""
    cuda = toolchain.find_cuda()
    found = shutil.which("cuobjdump")
    folders = [cuda.nvcc.parent] if cuda else []
    folders += [Path(found).parent] if found else []
    if triton := importlib.util.find_spec("triton"):
        folders += [
            Path(p) / "backends/nvidia/bin" for p in triton.submodule_search_locations or ()
        ]
    for folder in folders:
        if all((folder / name).exists() for name in ("cuobjdump", "nvdisasm")):
            return folder / "cuobjdump"
    return None


def disassemble(binary: Path) -> dict[str, dict[str, str]]:
    """Return the instructions of a cubin, an object or a library: by target (sm_80), then by the
    mangled name of the kernel. Skips the test that has no disassembler."""
    program = find_disassembler()
    if program is None:
        pytest.skip("no cuobjdump and nvdisasm: no full CUDA toolkit, and no triton")
    text = toolchain.output_of(str(program), "-sass", str(binary))
    kernels: dict[str, dict[str, str]] = {}
    target = ""
    for part in re.split(r"(?=^\s*(?:code for sm_\d+$|Function : ))", text, flags=re.MULTILINE):
        if arch := re.match(r"\s*code for (sm_\d+)", part):
            target = arch[1]
        elif name := re.match(r"\s*Function : (\S+)", part):
            kernels.setdefault(target, {})[name[1]] = part
    return kernels
