"""A native library that compiles in a moment, and compilers that are slow, fail or count calls."""

import multiprocessing
import os
import time
from pathlib import Path

from fastcnn.errors import FastcnnError
from fastcnn.ops.native import build

FORK = multiprocessing.get_context("fork")  # children need not import torch again
SECONDS = 30  # far more than any step here takes

COMPILER = """#!/bin/sh
case "$*" in
  *--version*) exec c++ --version ;;
  *" -c "*) echo "$*" >> {calls}; sleep $(cat {delay}); {fail} ;;
esac
exec c++ "$@"
"""
# compiles a .cu as C++, as long as nothing in it is CUDA
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.88"; exit ;;
esac
echo "$*" >> {calls}
for word; do last2=$last; last=$word; case $word in *.cu) source=$word ;; esac; done
exec c++ -fPIC -x c++ -c "$source" -o "$last"
"""


def write_sources(folder, value=7):
    """A library whose function `fake_value` returns `value`."""
    for part in ("cpu", "cuda"):
        (folder / part).mkdir(parents=True)
    (folder / "value.h").write_text(f"constexpr int value = {value};\n")
    (folder / "bindings.cpp").write_text(
        '#include "value.h"\nextern "C" int fake_value() { return value; }\n'
    )
    (folder / "cpu" / "one.cpp").write_text('extern "C" int fake_one() { return 1; }\n')
    (folder / "cuda" / "two.cu").write_text('extern "C" int fake_two() { return 2; }\n')
    return folder


def write_program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def write_compiler(path, delay=0.0, fail=""):
    """A C++ compiler; returns the file that lists its calls. The delay stands in a file beside
    it, so that it can change while the compiler stays the same."""
    calls, delay_file = path.with_name("calls"), path.with_name("delay")
    calls.touch()
    delay_file.write_text(str(delay))
    write_program(path, COMPILER.format(calls=calls, delay=delay_file, fail=fail))
    return calls


def write_toolkit(home, version="13.0"):
    """A CUDA toolkit; returns the file that lists the calls of its nvcc."""
    calls = home / "calls"
    write_program(home / "bin" / "nvcc", NVCC.format(calls=calls, version=version))
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    calls.touch()
    return calls


def lines(path):
    return path.read_text().splitlines()


def wait_until(condition, seconds=SECONDS):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def start(source, queue=None, **options):
    """Build in a process of its own, which puts the result or the error into the queue."""
    process = FORK.Process(target=_ensure, args=(source, queue, options), daemon=True)
    process.start()
    return process


def _ensure(source, queue, options):
    try:
        built = build.ensure(source=source, **options)
        result = ("built", built.fresh, str(built.path))
    except FastcnnError as error:
        result = ("error", type(error).__name__, str(error))
    if queue:
        queue.put(result)


def processes_of(cache):
    """Commands that run with this cache folder, of any process started for it."""
    marker = f"FASTCNN_CACHE={cache}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int(folder.name) != os.getpid() and marker in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # gone, or a zombie
            continue
    return found


def left_in(native):
    """What is in the folder of the builds beside finished ones."""
    return sorted(path.name for path in native.iterdir() if not path.name.startswith("torch"))
