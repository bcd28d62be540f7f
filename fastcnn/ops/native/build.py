"""The native library: compiled on first use or by `fastcnn build`, kept in the cache, loaded once.

A build is a folder `native/torch<version>-<architectures>-<hash>/` of the cache: the library, the
compilers' output (build.log) and a stamp (stamp.json) that says what it was made of and from. The
hash is over sources, flags, torch, CPU features, compilers and architectures, so that a change of
any gives another folder; builds for other machines and versions stay. A folder is compiled under a
temporary name beside it and renamed, under a lock that the kernel releases if its holder dies.

Which build is used: of those made from these sources with these flags for this torch, CPU and
compiler, the one for the most architectures among those that hold what is wanted. So a library
that was built for GPUs also serves where only the CPU's ops are asked for, and a second, smaller
one is not built beside it. Wanted is what FASTCNN_CUDA_ARCHS names, else code for the GPUs
present; with no GPU, the CPU's ops.
"""

import contextlib
import datetime
import hashlib
import importlib.util
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from fastcnn.cache import cache_dir
from fastcnn.errors import BuildError, DataError, FastcnnError, UsageError
from fastcnn.files import load_json
from fastcnn.ops.native import library, toolchain
from fastcnn.ops.native.compile import CANNOT, Make, making, publish, temporary
from fastcnn.ops.native.gpu_archs import (
    ALL,
    capability_of,
    check_gpu_code,
    includes,
    name_of,
    parse_archs,
    present_capabilities,
)
from fastcnn.version import __version__

__all__ = [
    "Built",
    "archs_of_flags",
    "available",
    "check_gpu_code",
    "ensure",
    "ensure_module",
    "find",
    "load",
    "load_existing",
    "native_module",
    "wanted_archs",
]

log = logging.getLogger(__name__)

ARCHS_VARIABLE = "FASTCNN_CUDA_ARCHS"


@dataclass(frozen=True)
class Built:
    """A library that is built: `path`, and what its stamp says of it.

    `archs` are its CUDA architectures, () for the CPU alone; `cuda` is the version of nvcc or
    None; `sources` their sha256; `date` ISO 8601; `build_seconds` what compiling took, `seconds`
    what this call took; `fresh`: this call compiled it.
    """

    path: Path
    archs: tuple[str, ...]
    torch: str
    cuda: str | None
    compiler: str
    flags: tuple[str, ...]
    sources: str
    date: str
    build_seconds: float
    seconds: float = 0.0
    fresh: bool = False

    @property
    def target(self) -> str:
        """What it is built for, in words."""
        return _target(self.archs)

    @property
    def summary(self) -> str:
        """What was built or found, where, when or in how many seconds, in one line."""
        if self.fresh:
            return f"native library for {self.target} built in {self.seconds:.1f} s: {self.path}"
        return f"native library for {self.target} is there since {self.date[:10]}: {self.path}"


def _target(archs: tuple[str, ...]) -> str:
    return f"CPU and CUDA {', '.join(archs)}" if archs else "CPU"


@dataclass(frozen=True)
class Wanted:
    """Architectures to build for; `named` by the user, or else those of the GPUs present."""

    archs: tuple[str, ...]
    named: bool

    def satisfied_by(self, archs: Iterable[str]) -> bool:
        if self.named:
            return includes(archs, self.archs)
        # any code that a GPU can run will do for one that nobody named
        return not any(check_gpu_code(capability_of(arch), archs) for arch in self.archs)


def wanted_archs(archs: str | None = None) -> Wanted:
    """Return the architectures that `archs`, else FASTCNN_CUDA_ARCHS, names ("8.0;9.0+PTX" or
    "none"), else those of the GPUs present. Raises UsageError for a word that is none."""
    if archs is not None:
        return Wanted(parse_archs(archs, "--archs"), True)
    if named := os.environ.get(ARCHS_VARIABLE, "").strip():
        return Wanted(parse_archs(named, ARCHS_VARIABLE), True)
    return Wanted(tuple(name_of(c) for c in present_capabilities()), False)


def archs_of_flags(archs: str | None, cuda: bool, cpu: bool) -> str | None:
    """Return the architectures that the flags of `fastcnn build` name, None if they leave them to
    FASTCNN_CUDA_ARCHS and the GPUs present. Raises UsageError for flags that contradict."""
    if cpu:
        if cuda or archs is not None:
            raise UsageError("--cpu: leave out --cuda and --archs with it")
        return "none"
    if cuda and archs is None and os.environ.get(ARCHS_VARIABLE, "").strip() in ("", "none"):
        return ";".join(ALL)
    if cuda and archs is not None and not parse_archs(archs, "--archs"):
        raise UsageError("--cuda: leave it out with --archs none")
    return archs


def find(archs: str | None = None, source: Path | None = None) -> Built | None:
    """Return the build that `ensure` would use, or None if it would have to compile.

    Compiles nothing. Raises as `wanted_archs`; BuildError without sources or a cache folder.
    """
    return _find(wanted_archs(archs), source or library.source_dir(), native_dir())


def ensure(
    archs: str | None = None, force: bool = False, quiet: bool = False, source: Path | None = None
) -> Built:
    """Return a library for `archs` (see `wanted_archs`), compiled only if there is none yet.

    `force` compiles in any case. Progress goes to the log unless `quiet`. Raises BuildError if
    something to compile with is missing, nvcc is of another CUDA major version than torch, or the
    compiler fails; UsageError for a word that is no architecture.
    """
    start = time.perf_counter()
    source = source or library.source_dir()
    wanted, native = wanted_archs(archs), native_dir()
    built = None if force else _find(wanted, source, native)
    if built is None:
        possible = _possible(wanted)
        # GPUs without nvcc get the CPU's ops, which may be there
        built = None if force else _find(possible, source, native)
        built = built or _build(possible, source, native, force, quiet)
    return replace(built, seconds=time.perf_counter() - start)


_loading = threading.Lock()
_loaded: dict[Path, Built] = {}


def load(archs: str | None = None, quiet: bool = False, source: Path | None = None) -> Built:
    """Make the library's kernels known to torch, compiling them if need be; once in a process.

    A second call returns the library that is loaded, whatever it asks for. Raises as `ensure`,
    and BuildError if the library cannot be loaded.
    """
    source = source or library.source_dir()
    with _loading:
        if source not in _loaded:
            built = ensure(archs, quiet=quiet, source=source)
            if built.fresh and not quiet:
                log.info("native library for %s built in %.0f s", built.target, built.seconds)
            _load(built, source)
        return _loaded[source]


def load_existing(source: Path | None = None) -> Built | None:
    """As `load`, but compile nothing: None if there is no library that `load` would use."""
    source = source or library.source_dir()
    with _loading:
        if source not in _loaded:
            built = find(source=source)
            if built is None:
                return None
            _load(built, source)
        return _loaded[source]


def _load(built: Built, source: Path) -> None:
    try:
        torch.ops.load_library(built.path)
    except (OSError, RuntimeError) as error:
        raise BuildError(
            f"{built.path} cannot be loaded: {' '.join(str(error).split())[:300]}; "
            "`fastcnn build --force` builds it again"
        ) from error
    _loaded[source] = built


def available(archs: str | None = None, source: Path | None = None) -> str:
    """Return "" if the library is built or could be, else the reason and the remedy.

    Compiles nothing: what only a compiler can find out is not foreseen.
    """
    try:
        if find(archs, source) is None:
            _possible(wanted_archs(archs))
    except FastcnnError as error:
        return str(error)
    return ""


def native_module(quiet: bool = False, source: Path | None = None) -> tuple[ModuleType | None, str]:
    """Return the Python module `fastcnn._native` and "", or None and the reason.

    It is linked to the library, which is loaded first. Raises as `load`.
    """
    source = source or library.source_dir()
    path, reason = ensure_module(load(quiet=quiet, source=source), quiet, source)
    if path is None:
        return None, reason
    try:
        return _import("fastcnn._native", path), ""
    except ImportError as error:
        return None, f"{path} cannot be imported: {error}"


def ensure_module(
    built: Built, quiet: bool = False, source: Path | None = None
) -> tuple[Path | None, str]:
    """Return the file of the Python module that belongs to a library, compiled beside it if it is
    not there yet, and ""; or None and the reason: nothing depends on it."""
    source = source or library.source_dir()
    if not (source / "native.cpp").exists():
        return None, f"{source} holds no native.cpp"
    try:
        path = built.path.with_name(library.module_name(source))
        if not path.exists():
            _build_module(built, path, source, quiet)
    except (BuildError, ImportError) as error:
        return None, f"no module fastcnn._native: {error}"
    return path, ""


def native_dir() -> Path:
    """Return the folder of the builds. Raises BuildError if it cannot be written."""
    try:
        folder = cache_dir() / "native"
        folder.mkdir(exist_ok=True)
    except DataError as error:
        raise BuildError(str(error)) from error
    except OSError as error:
        raise BuildError(f"{error.filename}: {error.strerror}; set FASTCNN_CACHE") from error
    return folder


# the builds there are


def _find(wanted: Wanted, source: Path, native: Path) -> Built | None:
    """Return the build to use, by the rule at the top, or None."""
    stamps = []
    for path in native.glob(f"torch{torch.__version__}-*/stamp.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stamp = load_json(path)
            archs = tuple(stamp["key"]["archs"])
            if wanted.satisfied_by(archs):
                stamps.append((len(archs), str(stamp["date"]), path.parent, stamp))
    keys: dict[tuple[str, ...], dict[str, Any]] = {}
    for _, _, folder, stamp in sorted(stamps, key=lambda entry: entry[:3], reverse=True):
        archs = tuple(stamp["key"]["archs"])
        keys[archs] = keys.get(archs) or library.key_of(source, archs)
        if library.fits(stamp["key"], keys[archs]) and (built := _checked(folder, stamp)):
            return built
    return None


def _checked(folder: Path, stamp: dict[str, Any]) -> Built | None:
    """Return the build in `folder`, or None, with a warning, if its library is damaged."""
    path, key = folder / library.LIBRARY, stamp["key"]
    try:
        if _sha256(path) != stamp["library"]:
            raise ValueError("it has changed since it was built")
        return Built(
            path=path,
            archs=tuple(key["archs"]),
            torch=key["torch"],
            cuda=stamp["cuda"],
            compiler=stamp["compiler"],
            flags=tuple(key["flags"]),
            sources=key["sources"],
            date=stamp["date"],
            build_seconds=float(stamp["seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("native library %s is damaged (%s)", path, error)
        return None


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# making one


def _possible(wanted: Wanted) -> Wanted:
    """Return what can be built of what is wanted; raises BuildError if that is nothing.

    GPUs that nobody named get no code where there is no nvcc; the CPU's ops remain.
    """
    if not toolchain.find_compiler():
        raise BuildError(f"{CANNOT}: {toolchain.no_compiler()}")
    if toolchain.find_ninja() is None:
        raise BuildError(f"{CANNOT}: {toolchain.NO_NINJA}")
    if not wanted.archs:
        return wanted
    if torch.version.cuda is None:
        raise BuildError(
            f"{CANNOT} for CUDA {', '.join(wanted.archs)}: torch {torch.__version__} is a "
            f"CPU-only build; install its CUDA build, or set {ARCHS_VARIABLE}=none"
        )
    cuda = toolchain.find_cuda()
    if cuda is None and wanted.named:
        raise BuildError(f"{CANNOT} for CUDA {', '.join(wanted.archs)}: {toolchain.no_cuda()}")
    if cuda is None:
        log.warning("no CUDA kernels for the GPU: %s", toolchain.no_cuda())
        return Wanted((), False)
    nvcc, major = cuda.version(), torch.version.cuda.split(".")[0]
    if nvcc.split(".")[0] != major:
        raise BuildError(
            f"{CANNOT}: {cuda.nvcc} is of CUDA {nvcc or 'unknown'}, torch {torch.__version__} of "
            f"CUDA {torch.version.cuda}; set CUDA_HOME to a CUDA {major} toolkit, or "
            f"{ARCHS_VARIABLE}=none"
        )
    return wanted


def _build(wanted: Wanted, source: Path, native: Path, force: bool, quiet: bool) -> Built:
    key = library.key_of(source, wanted.archs)
    name = library.folder_name(key)
    with making(native, name, quiet) as make:
        # another process may have made it while this one waited
        if not force and (built := _find(wanted, source, native)):
            return built
        with temporary(native, name) as folder:
            stamp = _compile(folder, key, source, make)
            publish(folder, native / name)
    built = _checked(native / name, stamp)
    if built is None:
        raise BuildError(f"{native / name} changed after it was built; start again")
    return replace(built, fresh=True)


def _compile(folder: Path, key: dict[str, Any], source: Path, make: Make) -> dict[str, Any]:
    """Make library and stamp in `folder`; return the stamp."""
    start = time.perf_counter()
    archs = tuple(key["archs"])
    steps = library.library_steps(source, archs)
    make(folder, steps, f"building the native library for {_target(archs)}")
    if library.key_of(source, archs) != key:
        raise BuildError(f"{source} or the compiler changed during the build; start again")
    for path in folder.glob("*.o"):
        path.unlink()
    cuda = toolchain.find_cuda() if archs else None
    stamp = {
        "key": key,
        "library": _sha256(folder / library.LIBRARY),
        "fastcnn": __version__,
        "compiler": toolchain.first_line(*toolchain.find_compiler(), "--version"),
        "cuda": cuda.version() if cuda else None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - start, 1),
    }
    (folder / "stamp.json").write_text(json.dumps(stamp, indent=1), encoding="utf-8")
    return stamp


def _build_module(built: Built, path: Path, source: Path, quiet: bool) -> None:
    _possible(Wanted((), named=True))
    native, name = path.parent.parent, path.parent.name
    steps = library.module_steps(source, built.archs, built.path, path.name)
    with making(native, f"{name}.module", quiet) as make:
        if not path.exists():
            with temporary(native, f"{name}.module") as folder:
                make(folder, steps, "building fastcnn._native")
                (folder / path.name).rename(path)


def _import(name: str, path: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules[name] = module
    return module
