"""The native library's builds: kept, chosen, rebuilt; killed, stopped, failed and raced ones."""

import ctypes
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_build
import pytest
import torch
from fake_build import left_in, lines, processes_of, start, wait_until

from fastcnn.errors import BuildError, UsageError
from fastcnn.ops.native import build, library, toolchain


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("FASTCNN_CACHE", str(folder))
    monkeypatch.delenv(build.ARCHS_VARIABLE, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    # the GPU of the machine that runs the tests must not change what they build
    monkeypatch.setattr(build, "present_capabilities", list)
    return folder


@pytest.fixture
def source(tmp_path):
    return fake_build.write_sources(tmp_path / "csrc")


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """Install a compiler with `compiler(delay=..., fail=...)`; returns the file of its calls."""

    def install(**words):
        monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
        return fake_build.write_compiler(tmp_path / "cxx", **words)

    return install


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA toolkit of torch's version."""
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(library, "_torch_libraries", lambda archs: [])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return fake_build.write_toolkit(tmp_path / "cuda")


@pytest.fixture
def queue():
    return fake_build.FORK.Queue()


def value_of(built):
    return ctypes.CDLL(str(built.path)).fake_value()


def test_built_once_and_found_after(source, cache, compiler):
    calls = compiler()
    first, second = build.ensure(source=source), build.ensure(source=source)
    assert (first.fresh, second.fresh) == (True, False)
    assert first.path == second.path == build.find(source=source).path
    assert len(lines(calls)) == 2
    assert value_of(first) == 7
    assert (first.archs, first.cuda, first.torch) == ((), None, torch.__version__)
    assert "-march=native" in first.flags
    assert first.target == "CPU"
    assert first.build_seconds > 0
    log = (first.path.parent / "build.log").read_text()
    assert "bindings.cpp" in log
    assert "[3/3]" in log
    assert left_in(cache / "native") == []


def test_force_builds_again_in_the_same_place(source):
    first = build.ensure(source=source)
    second = build.ensure(source=source, force=True)
    assert second.fresh
    assert first.path == second.path


@pytest.mark.parametrize("file", ["value.h", "bindings.cpp", "cpu/one.cpp"])
def test_a_changed_source_gives_another_build_and_the_old_one_stays(source, file):
    first = build.ensure(source=source)
    with open(source / file, "a") as text:
        text.write("// changed\n")
    assert build.find(source=source) is None
    second = build.ensure(source=source)
    assert second.fresh
    assert first.path.exists()
    assert first.path != second.path


def other_version(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "__version__", torch.__version__ + ".post1")


def other_commit(monkeypatch, tmp_path):
    """A nightly build of the same day, or one that somebody made."""
    monkeypatch.setattr(torch.version, "git_version", "0" * 40)


def other_cuda(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "1.0")


def other_library(monkeypatch, tmp_path):
    """The same commit with other flags."""
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    (tmp_path / "torch" / "lib" / "libtorch_cpu.so").write_bytes(b"shorter")
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))


@pytest.mark.parametrize("change", [other_version, other_commit, other_cuda, other_library])
def test_an_upgraded_torch_gives_another_build(source, monkeypatch, tmp_path, change):
    first = build.ensure(source=source)
    assert build.find(source=source).path == first.path
    monkeypatch.setattr(library, "_torch_libraries", lambda archs: [])
    change(monkeypatch, tmp_path)
    assert build.find(source=source) is None
    second = build.ensure(source=source)
    assert second.fresh
    assert first.path != second.path
    assert first.path.exists()


def test_another_cpu_or_compiler_or_other_flags_give_another_build(
    source, compiler, tmp_path, monkeypatch
):
    compiler()
    build.ensure(source=source)
    with monkeypatch.context() as changed:
        changed.setattr(toolchain, "cpu_features", lambda: "one more")
        assert build.find(source=source) is None
    with monkeypatch.context() as changed:
        changed.setattr(library, "FLAGS", [*library.FLAGS, "-g"])
        assert build.find(source=source) is None
    assert build.find(source=source)
    os.utime(tmp_path / "cxx", (0, 0))
    assert build.find(source=source) is None


def test_the_cuda_half_does_not_concern_a_build_for_the_cpu(source):
    build.ensure(source=source)
    (source / "cuda" / "two.cu").write_text("")
    (source / "kernels.h").write_text("")
    (source / "native.cpp").write_text("")
    assert build.find(source=source)


def test_a_library_outlives_the_compiler(source, tmp_path, monkeypatch):
    built = build.ensure(source=source)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.ensure(source=source).path == built.path
    assert build.available(source=source) == ""


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [cut, lambda path: path.unlink()])
def test_a_damaged_library_is_built_again(source, caplog, damage):
    first = build.ensure(source=source)
    damage(first.path)
    with caplog.at_level(logging.WARNING, "fastcnn"):
        second = build.ensure(source=source)
    assert "is damaged" in caplog.text
    assert second.fresh
    assert value_of(second) == 7


@pytest.mark.parametrize("stamp", ["", "[]", "[" * 100_000, '{"key": {"archs": []}, "date": ""}'])
def test_a_damaged_stamp_is_no_build(source, stamp):
    first = build.ensure(source=source)
    (first.path.parent / "stamp.json").write_text(stamp)
    assert build.ensure(source=source).fresh


def test_loaded_once_by_all_threads(source, compiler):
    calls = compiler(delay=0.2)
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(build.load(source=source))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(fake_build.SECONDS)
    assert len(results) == 4
    assert len({id(result) for result in results}) == 1
    assert len(lines(calls)) == 2
    assert str(results[0].path) in torch.ops.loaded_libraries
    # for good: not even a change of the sources matters to this process
    (source / "value.h").write_text("constexpr int value = 8;\n")
    assert build.load(source=source) is results[0]


def test_a_library_that_does_not_load_is_an_error_with_a_remedy(source):
    text = (
        '#include <stdexcept>\nstatic int x = [] { throw std::runtime_error("no"); return 1; }();'
    )
    built = build.ensure(source=source)
    stamp = json.loads((built.path.parent / "stamp.json").read_text())
    built.path.write_text(text)  # no library at all, but the one that its stamp speaks of
    stamp["library"] = build._sha256(built.path)
    (built.path.parent / "stamp.json").write_text(json.dumps(stamp))
    with pytest.raises(BuildError, match=r"cannot be loaded: .*fastcnn build --force"):
        build.load(source=source)


# which build is used


def test_a_build_for_gpus_serves_the_cpu_too(source, toolkit, monkeypatch):
    cuda = build.ensure("8.0;9.0+PTX", source=source)
    assert (cuda.archs, cuda.cuda) == (("8.0", "9.0+PTX"), "13.0")
    assert cuda.target == "CPU and CUDA 8.0, 9.0+PTX"
    [call] = lines(toolkit)
    assert "-gencode=arch=compute_80,code=sm_80" in call
    assert "code=compute_90" in call
    for fewer in (None, "none", "9.0", "8.0,9.0", "9.0+PTX 8.0"):
        assert build.ensure(fewer, source=source).path == cuda.path
    for more in ("8.6", "8.0+PTX", "8.0;10.0"):
        assert build.find(more, source=source) is None
    # also where a smaller one is there, and newer
    assert build.ensure("none", force=True, source=source).archs == ()
    assert build.find(source=source).path == build.find("none", source=source).path == cuda.path
    monkeypatch.setenv(build.ARCHS_VARIABLE, "8.6")
    assert build.find(source=source) is None


def test_gpus_that_nobody_named_take_any_code_that_they_can_run(source, toolkit, monkeypatch):
    cuda = build.ensure("8.0;9.0+PTX", source=source)
    for capability, served in (((8, 6), True), ((12, 0), True), ((7, 5), False)):
        monkeypatch.setattr(build, "present_capabilities", lambda c=capability: [c])
        found = build.find(source=source)
        assert (found is not None and found.path == cuda.path) == served
    assert build.ensure(source=source).archs == ("7.5",)


def test_a_gpu_without_nvcc_gets_the_ops_of_the_cpu(source, monkeypatch, caplog):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr(build, "present_capabilities", lambda: [(9, 0)])
    monkeypatch.setattr(toolchain, "find_cuda", lambda: None)
    with caplog.at_level(logging.WARNING, "fastcnn"):
        built = build.ensure(source=source)
    assert built.archs == ()
    assert "no CUDA kernels for the GPU" in caplog.text
    assert build.ensure(source=source).path == built.path
    with pytest.raises(BuildError, match="no CUDA toolkit"):
        build.ensure("9.0", source=source)


def test_changed_cuda_sources_or_nvcc_give_another_build(source, toolkit):
    build.ensure("8.0", source=source)
    os.utime(toolkit.parent / "bin" / "nvcc", (0, 0))
    assert build.find("8.0", source=source) is None
    assert build.ensure("8.0", source=source).fresh
    (source / "kernels.h").write_text("// changed\n")
    assert build.find("8.0", source=source) is None


# what is installed


def test_every_package_and_every_source_is_installed():
    tomllib = pytest.importorskip("tomllib")
    root = Path(__file__).parents[3]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(root) for path in root.glob("fastcnn/**/__init__.py")}
    assert set(settings["packages"]) == {
        *(".".join(folder.parts) for folder in folders),
        "fastcnn._csrc",
    }
    csrc = root / settings["package-dir"]["fastcnn._csrc"]
    patterns = settings["package-data"]["fastcnn._csrc"]
    installed = {path for pattern in patterns for path in csrc.glob(pattern)}
    assert installed == {path for path in csrc.rglob("*.*") if path.suffix != ".md"}
    insight = root / "fastcnn" / "insight" / "html"
    patterns = settings["package-data"]["fastcnn.insight.html"]
    installed = {path for pattern in patterns for path in insight.glob(pattern)}
    assert installed == {
        path for path in insight.rglob("*.*") if path.suffix not in (".py", ".pyc")
    }


def test_an_installed_copy_of_the_sources_comes_first(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "fastcnn"
    monkeypatch.setattr(library, "PACKAGE", package)
    with pytest.raises(BuildError, match="install fastcnn again"):
        library.source_dir()
    beside = fake_build.write_sources(package.parent / "csrc")
    assert library.source_dir() == beside
    inside = fake_build.write_sources(package / "_csrc")
    assert library.source_dir() == inside


# what is missing


def test_no_compiler(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler: install g\\+\\+"):
        build.ensure(source=source)
    assert "install g++" in build.available(source=source)


def test_no_ninja(source, monkeypatch):
    monkeypatch.setattr(toolchain, "find_ninja", lambda: None)
    with pytest.raises(BuildError, match="pip install ninja"):
        build.ensure(source=source)
    assert "pip install ninja" in build.available(source=source)


@pytest.mark.parametrize(("version", "said"), [("12.4", "12.4"), ("", "unknown")])
def test_nvcc_of_another_cuda_is_refused_before_compiling(
    source, compiler, tmp_path, monkeypatch, version, said
):
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    nvcc_calls, calls = fake_build.write_toolkit(tmp_path / "cuda", version), compiler()
    with pytest.raises(BuildError, match=rf"of CUDA {said}, torch .* of CUDA 13.0; set CUDA_HOME"):
        build.ensure("9.0", source=source)
    assert lines(nvcc_calls) == lines(calls) == []
    assert said in build.available("9.0", source=source)
    assert build.available("none", source=source) == ""


def test_torch_without_cuda_is_refused(source, monkeypatch):
    monkeypatch.setattr("torch.version.cuda", None)
    with pytest.raises(BuildError, match="CPU-only build"):
        build.ensure("9.0", source=source)


def test_a_word_that_is_no_architecture(source, monkeypatch):
    monkeypatch.setenv(build.ARCHS_VARIABLE, "8.0;hopper")
    with pytest.raises(UsageError, match="FASTCNN_CUDA_ARCHS: 'hopper'"):
        build.ensure(source=source)
    assert "'hopper'" in build.available(source=source)


def test_a_cache_that_cannot_be_written_is_replaced(source, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with caplog.at_level(logging.WARNING, "fastcnn"):
        built = build.ensure(source=source)
    assert built.path.is_relative_to(tmp_path / f"fastcnn-{os.getuid()}")
    assert "file/cache" in caplog.text
    shutil.rmtree(built.path.parent.parent)
    built.path.parent.parent.touch()
    with pytest.raises(BuildError, match="native: File exists; set FASTCNN_CACHE"):
        build.ensure(source=source)


# what fails


def test_the_first_error_and_the_log_are_named(source, cache):
    (source / "cpu" / "one.cpp").write_text("#warning planted\nint one() { return two; }\n")
    with pytest.raises(BuildError) as raised:
        build.ensure(source=source)
    message = str(raised.value)
    assert "one.cpp:2:20: error: 'two' was not declared" in message
    assert "\n" not in message
    [log] = left_in_failed(cache)
    assert str(log) in message
    assert "#warning" in log.read_text()
    assert left_in(cache / "native") == []
    (source / "cpu" / "one.cpp").write_text("")
    assert build.ensure(source=source).fresh


def left_in_failed(cache):
    return list((cache / "native").glob("*.failed.log"))


def test_a_name_that_no_library_defines_is_an_error_of_the_build(source):
    (source / "cpu" / "one.cpp").write_text("int gone(); int one() { return gone(); }\n")
    with pytest.raises(BuildError, match=r"undefined reference to `gone\(\)'"):
        build.ensure(source=source)


def test_sources_that_change_during_the_build(source, compiler):
    compiler(fail=f"echo '// changed' >> {source}/value.h")
    with pytest.raises(BuildError, match="changed during the build"):
        build.ensure(source=source)


# killed, stopped, raced


@pytest.mark.parametrize("changed", [False, True], ids=["same sources", "changed sources"])
def test_after_a_killed_build_the_next_one_works_at_once(
    source, cache, compiler, tmp_path, changed
):
    calls = compiler(delay=600)
    process = start(source)
    wait_until(lambda: lines(calls))
    os.kill(process.pid, signal.SIGKILL)
    process.join(fake_build.SECONDS)
    assert len(left_in(cache / "native")) == 2  # its folder and its lock
    # nobody was left to end them, yet the compilers are gone
    wait_until(lambda: not processes_of(cache))
    if changed:
        (source / "value.h").write_text("constexpr int value = 8;\n")
    (tmp_path / "delay").write_text("0")
    begin = time.monotonic()
    assert value_of(build.ensure(source=source)) == (8 if changed else 7)
    assert time.monotonic() - begin < 10
    assert left_in(cache / "native") == []


@pytest.mark.parametrize(
    ("signum", "exit_code"),
    [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGHUP, -signal.SIGHUP), (signal.SIGINT, 1)],
)
def test_a_stopped_build_leaves_nothing(source, cache, compiler, signum, exit_code):
    calls = compiler(delay=600)
    process = start(source)
    wait_until(lambda: lines(calls))
    assert processes_of(cache)
    os.kill(process.pid, signum)
    process.join(fake_build.SECONDS)
    # as without a build: SIGINT is KeyboardInterrupt, which multiprocessing turns into 1
    assert process.exitcode == exit_code
    assert processes_of(cache) == []
    assert left_in(cache / "native") == []
    assert left_in_failed(cache) == []


def test_a_handler_of_the_caller_hears_the_signal(source, cache, compiler):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    try:
        compiler(delay=600)
        threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(BuildError, match="stopped by SIGTERM"):
            build.ensure(source=source)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [1]
    assert left_in(cache / "native") == []


def test_four_processes_compile_once(source, cache, compiler, queue):
    calls = compiler(delay=0.5)
    processes = [start(source, queue) for _ in range(4)]
    results = [queue.get(timeout=fake_build.SECONDS) for _ in processes]
    assert sorted(result[:2] for result in results) == [("built", False)] * 3 + [("built", True)]
    assert len({path for _, _, path in results}) == 1
    assert len(lines(calls)) == 2
    assert left_in(cache / "native") == []
    for process in processes:
        process.join(fake_build.SECONDS)


def test_a_failure_is_reported_by_those_who_waited_and_tried_once(source, cache, compiler, queue):
    calls = compiler(delay=1, fail="echo 'one.cpp:1:1: error: planted'; exit 1")
    processes = [start(source, queue) for _ in range(3)]
    results = [queue.get(timeout=fake_build.SECONDS) for _ in processes]
    assert len({message for _, _, message in results}) == 1
    assert all(result[:2] == ("error", "BuildError") for result in results)
    assert "one.cpp:1:1: error: planted; all output: " in results[0][2]
    tried = len(lines(calls))
    assert tried <= 2  # compilers at once, of one build
    # who comes later tries again: the cause may be mended
    assert start(source, queue).join(fake_build.SECONDS) is None
    assert "planted" in queue.get(timeout=fake_build.SECONDS)[2]
    assert len(lines(calls)) > tried
    assert left_in(cache / "native") == []


def test_who_waits_takes_over_from_a_stopped_build(source, compiler, queue):
    calls = compiler(delay=2)
    first = start(source)
    wait_until(lambda: lines(calls))
    second = start(source, queue)
    time.sleep(0.3)
    os.kill(first.pid, signal.SIGTERM)
    assert queue.get(timeout=fake_build.SECONDS)[:2] == ("built", True)
    first.join(fake_build.SECONDS)
    second.join(fake_build.SECONDS)


def test_who_waits_can_be_stopped(source, cache, compiler):
    calls = compiler(delay=600)
    first = start(source)
    wait_until(lambda: lines(calls))
    second = start(source)
    time.sleep(0.5)
    for process in (second, first):
        os.kill(process.pid, signal.SIGTERM)
        process.join(fake_build.SECONDS)
        assert process.exitcode == -signal.SIGTERM
    assert left_in(cache / "native") == []


# what is seen of it


def test_progress_is_a_line_and_none_if_quiet(source, compiler, caplog):
    compiler()
    with caplog.at_level(logging.INFO, "fastcnn"):
        build.ensure(source=source, quiet=True)
        assert caplog.text == ""
        build.ensure(source=source, force=True)
    assert "building the native library for CPU: 3 steps" in caplog.text


# the Python module


NATIVE = """#include <pybind11/pybind11.h>
extern "C" int fake_value();
PYBIND11_MODULE(_native, m) { m.def("value", &fake_value); }
"""


@pytest.mark.full
def test_the_python_module_is_linked_to_the_library(source, cache):
    assert build.native_module(source=source) == (None, f"{source} holds no native.cpp")
    (source / "native.cpp").write_text(NATIVE)
    # in a process of its own: here, libraries of other tests bear the same name
    code = (
        "import pathlib, sys\n"
        "from fastcnn.ops.native import build\n"
        f"module, reason = build.native_module(source=pathlib.Path({str(source)!r}))\n"
        "print(module.value(), repr(reason), module is sys.modules['fastcnn._native'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout == "7 '' True\n", found.stderr
    assert left_in(cache / "native") == []
    path, reason = build.ensure_module(build.load(source=source), source=source)
    assert (path.parent, reason) == (build.find(source=source).path.parent, "")


def test_the_python_module_may_fail(source, monkeypatch):
    (source / "native.cpp").write_text("int x = y;")
    module, reason = build.native_module(source=source)
    assert module is None
    assert "native.cpp:1:9: error: 'y'" in reason
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    assert "apt-get install python3-dev" in build.native_module(source=source)[1]
    assert build.load(source=source).path.exists()
