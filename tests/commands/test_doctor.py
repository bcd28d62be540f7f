"""What the doctor says of compilers and of the native library, which it never builds."""

import importlib.metadata
import subprocess
import sys

import fake_build
import pytest

from fastcnn import doctor
from fastcnn.ops.native import build, library, toolchain


@pytest.fixture(autouse=True)
def source(tmp_path, monkeypatch):
    folder = fake_build.write_sources(tmp_path / "csrc")
    monkeypatch.setattr(library, "source_dir", lambda: folder)
    monkeypatch.setattr(build, "present_capabilities", list)
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(build.ARCHS_VARIABLE, raising=False)
    return folder


def examine():
    return {finding.subject: finding for finding in doctor.examine()}


def test_a_library_that_is_not_built_is_not_built_here(tmp_path):
    found = examine()
    assert found["native library"].state == "not built"
    assert "`fastcnn build`" in found["native library"].remedy
    assert found["CUDA code"].state == "would be built for no GPU"
    assert found["native cache"].state == str(tmp_path / "cache" / "native")
    assert "CPU kernels" not in found
    assert list((tmp_path / "cache" / "native").iterdir()) == []
    assert found["C++ compiler"].ok
    assert found["ninja"].ok


def test_a_library_that_is_built_is_loaded_and_its_kernels_listed(monkeypatch):
    built = build.ensure("none")
    state = {"CPU": {"bn_stats", "bn_act"}, "CUDA": set()}
    names = ("bn_stats", "bn_act", "bias_act")
    monkeypatch.setattr("fastcnn.ops.OP_NAMES", names)
    monkeypatch.setattr(
        "torch._C._dispatch_has_kernel_for_dispatch_key",
        lambda name, key: name.removeprefix("fastcnn::") in state[key],
    )
    found = examine()
    assert str(built.path) in found["native library"].state
    assert built.date in found["native library"].state
    assert found["CPU kernels"].state == "2 of 3 ops: bn_stats, bn_act; missing: bias_act"
    assert not found["CPU kernels"].ok
    assert found["CUDA kernels"].state == "none"
    state["CPU"] = set(names)
    assert examine()["CPU kernels"].ok


def test_gpus_that_the_library_has_no_code_for_are_named(monkeypatch):
    build.ensure("none")
    monkeypatch.setattr("fastcnn.ops.native.gpu_archs.present_capabilities", lambda: [(9, 0)])
    found = examine()
    assert found["code for 9.0"].state == "missing"
    assert "fastcnn build --archs 9.0" in found["code for 9.0"].remedy


@pytest.mark.parametrize(
    ("patch", "value", "subject", "said"),
    [
        ("find_compiler", [], "C++ compiler", "install g++"),
        ("find_ninja", None, "ninja", "pip install ninja"),
        ("find_cuda", None, "nvcc", "install the one of torch's CUDA version"),
    ],
)
def test_what_is_missing_to_compile_with(monkeypatch, patch, value, subject, said):
    monkeypatch.setattr(toolchain, patch, lambda: value)
    finding = examine()[subject]
    assert not finding.ok
    assert not finding.needed
    assert said in finding.remedy


@pytest.mark.parametrize(
    ("version", "torch_cuda", "said", "ok"),
    [
        ("13.1", "13.0", "13.1, as torch's CUDA 13.0", True),
        ("12.4", "13.0", "12.4, but torch is of CUDA 13.0", False),
        ("", "13.0", "does not run, but torch is of CUDA 13.0", False),
        ("13.0", None, "13.0, but torch is a CPU-only build", False),
    ],
)
def test_nvcc_is_held_against_torch(tmp_path, monkeypatch, version, torch_cuda, said, ok):
    fake_build.write_toolkit(tmp_path / "cuda", version)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setattr("torch.version.cuda", torch_cuda)
    finding = examine()["nvcc"]
    assert finding.state == f"{tmp_path}/cuda/bin/nvcc: {said}"
    assert finding.ok == ok


def test_a_library_that_does_not_load_is_reported(monkeypatch):
    def fail(path):
        raise OSError("planted")

    build.ensure("none")
    monkeypatch.setattr("torch.ops.load_library", fail)
    finding = examine()["native library"]
    assert "cannot be loaded: planted; `fastcnn build --force` builds it again" in finding.state
    assert not finding.ok


def test_a_wrong_setting_is_reported(monkeypatch):
    monkeypatch.setenv(build.ARCHS_VARIABLE, "hopper")
    assert "'hopper' is no architecture" in examine()["native library"].state


@pytest.mark.full
def test_a_broken_torch_is_one_line():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fastcnn.cli import main\n"
        "sys.exit(main(['doctor']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr == (
        "fastcnn: fastcnn cannot train on this machine; the remedies stand above\n"
    )
    assert "but its import fails" in found.stdout


@pytest.mark.parametrize(
    ("installed", "said", "ok"),
    [
        ({}, "missing; needed for --loader dali", False),
        ({"nvidia-dali-cuda120": "2.4.0"}, "2.4.0 (nvidia-dali-cuda120)", True),
        ({"nvidia-dali-cuda130": "2.4.0"}, "2.4.0 (nvidia-dali-cuda130)", True),
        ({"nvidia-dali-cuda120": "1", "nvidia-dali-cuda130": "2"}, "twice: 1 (nvidia-dali", False),
    ],
)
def test_dali_under_either_name(monkeypatch, installed, said, ok):
    real = importlib.metadata.version

    def version(name):
        if "dali" not in name:
            return real(name)
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "nvidia.dali", object())
    finding = examine()["DALI"]
    assert finding.state.startswith(said)
    assert finding.ok == ok
    assert not finding.needed
    assert ok or "pip install 'fastcnn[dali]' (CUDA 12 and CPU)" in finding.remedy


def test_a_dali_whose_import_fails(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.4.0")
    monkeypatch.setattr(doctor, "DALI_PACKAGES", ("nvidia-dali-cuda120",))
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    finding = examine()["DALI"]
    assert finding.state.startswith("2.4.0 (nvidia-dali-cuda120), but its import fails: ")
    assert not finding.ok
