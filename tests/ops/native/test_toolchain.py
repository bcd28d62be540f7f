"""How compilers, ninja, a CUDA toolkit and headers are found; how many compilers run at once."""

import shutil
import sys
from pathlib import Path

import fake_build
import pytest

from fastcnn.ops.native import toolchain
from fastcnn.ops.native.toolchain import find_compiler, find_cuda, find_ninja


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """PATH with one empty folder, no pip packages of CUDA."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "pip_cuda_folders", list)
    return folder


def test_compiler_from_cxx_or_path(path, monkeypatch):
    assert find_compiler() == []
    clang = fake_build.write_program(path / "clang++", "")
    assert find_compiler() == [str(clang)]
    gcc = fake_build.write_program(path / "g++", "")
    assert find_compiler() == [str(gcc)]
    monkeypatch.setenv("CXX", "clang++ -stdlib=libc++")
    assert find_compiler() == [str(clang), "-stdlib=libc++"]
    monkeypatch.setenv("CXX", "gone")
    assert find_compiler() == []


def test_ninja_from_its_package_or_path(path, monkeypatch):
    assert find_ninja()  # the package's, though nothing is on PATH
    monkeypatch.setitem(sys.modules, "ninja", None)
    assert find_ninja() is None
    ninja = fake_build.write_program(path / "ninja", "")
    assert find_ninja() == str(ninja)


def test_cuda_home_stands_above_nvcc_on_path(tmp_path, path, monkeypatch):
    assert find_cuda() is None
    fake_build.write_toolkit(tmp_path / "a")
    fake_build.write_toolkit(tmp_path / "b", "12.4")
    (path / "nvcc").symlink_to(tmp_path / "a" / "bin" / "nvcc")
    assert find_cuda().home == tmp_path / "a"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "b"))
    assert find_cuda().home == tmp_path / "b"
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert find_cuda().version() == "12.4"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_cuda() is None or find_cuda().home != tmp_path
    assert f"CUDA_HOME={tmp_path} holds no CUDA toolkit" in toolchain.no_cuda()


def test_a_wrapper_script_is_no_cuda_home(tmp_path, path):
    home = tmp_path / "cuda"
    fake_build.write_toolkit(home)
    dryrun = f"echo '#$ _HERE_={home}/bin' >&2; echo '#$ TOP={home}/bin/..' >&2"
    fake_build.write_program(path / "nvcc", f"#!/bin/sh\n{dryrun}\n")
    assert find_cuda().home == home
    shutil.rmtree(home / "include")
    assert find_cuda() is None


def test_cuda_from_pip(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "pip_cuda_folders", lambda: [tmp_path])
    fake_build.write_toolkit(tmp_path / "cu13")
    (tmp_path / "cudnn").mkdir()
    cuda = find_cuda()
    assert cuda.home == tmp_path / "cu13"
    assert cuda.runtime(13) is None
    (cuda.home / "lib").mkdir()
    (cuda.home / "lib" / "libcudart.so.13").touch()
    assert cuda.runtime(13) == cuda.home / "lib" / "libcudart.so.13"


def test_an_nvcc_that_does_not_run_has_no_version(tmp_path):
    fake_build.write_toolkit(tmp_path / "cuda")
    (tmp_path / "cuda" / "bin" / "nvcc").write_text("#!/nowhere\n")
    assert toolchain.Cuda(tmp_path / "cuda").version() == ""


def test_identity_changes_with_the_program_behind_a_link(tmp_path):
    (tmp_path / "gcc-12").write_text("a")
    (tmp_path / "c++").symlink_to("gcc-12")
    before = toolchain.identity(tmp_path / "c++")
    assert before == toolchain.identity(tmp_path / "gcc-12")
    (tmp_path / "gcc-12").write_text("ab")
    assert toolchain.identity(tmp_path / "c++") != before


def test_jobs_are_bounded_by_cores_and_memory(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    for gigabytes, jobs in ((64, 8), (5, 3), (0.1, 1)):
        monkeypatch.setattr(toolchain, "free_memory", lambda g=gigabytes: int(g * 2**30))
        assert toolchain.parallel_jobs() == jobs


def test_free_memory_is_the_machine_s_or_less():
    total = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < toolchain.free_memory() < total


def test_cpu_features_are_those_of_the_kernel():
    features = toolchain.cpu_features().split()
    assert {"sse2", "asimd"} & set(features)
    assert features == sorted(features)


def test_python_headers(monkeypatch):
    assert any((folder / "pybind11").is_dir() for folder in toolchain.python_headers())
    monkeypatch.setitem(sys.modules, "pybind11", None)
    with pytest.raises(ImportError, match="pip install pybind11"):
        toolchain.python_headers()
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": "/nowhere"})
    with pytest.raises(ImportError, match=r"/nowhere holds no Python\.h"):
        toolchain.python_headers()


@pytest.mark.parametrize("named", ["/nonexistent/g++", 'g++ "'])
def test_a_compiler_that_is_none_is_named(named, monkeypatch):
    monkeypatch.setenv("CXX", named)
    assert toolchain.find_compiler() == []
    assert repr(named) in toolchain.no_compiler()
