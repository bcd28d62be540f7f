"""The CPU ops under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

import subprocess
from pathlib import Path

import pytest

from fastcnn.ops.native import toolchain

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
CPU = ROOT / "csrc" / "cpu"
FLAGS = ["-std=c++17", "-O1", "-march=native", "-ffp-contract=fast", "-Wno-psabi", "-pthread"]
FLAGS += ["-fno-math-errno", f"-I{CPU.parent}", f"-I{CPU}"]
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)
SOURCES = (ROOT / "tests/cpu/driver.cpp", *sorted(CPU.glob("*.cpp")))


def compile_with(sanitizers, *words):
    compiler = toolchain.find_compiler()
    if not compiler:
        pytest.skip("no C++ compiler")
    made = subprocess.run([*compiler, *FLAGS, *sanitizers, *words], capture_output=True, text=True)
    if "cannot find" in made.stderr and "san" in made.stderr:
        pytest.skip(f"the compiler has no {sanitizers[0]}")
    assert made.returncode == 0, made.stderr


def link_and_run(sanitizers, objects, program):
    compile_with(sanitizers, *objects, "-o", program)
    return subprocess.run([program], capture_output=True, text=True)


def objects_of(folder, sanitizers):
    found = {}
    for source in SOURCES:
        found[source.name] = folder / f"{source.stem}.o"
        compile_with(sanitizers, "-c", source, "-o", found[source.name])
    return found


@pytest.fixture(scope="module")
def address_objects(tmp_path_factory):
    return objects_of(tmp_path_factory.mktemp("address"), ADDRESS)


def test_no_op_touches_what_is_not_its_own(address_objects, tmp_path):
    ran = link_and_run(ADDRESS, address_objects.values(), tmp_path / "driver")
    assert (ran.returncode, ran.stdout) == (0, "clean\n"), ran.stderr[:2000]


def test_no_two_threads_write_the_same(tmp_path):
    objects = objects_of(tmp_path, THREAD).values()
    ran = link_and_run(THREAD, objects, tmp_path / "driver")
    assert (ran.returncode, ran.stdout) == (0, "clean\n"), ran.stderr[:2000]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("bn_act.cpp", "store<W>(dx + at, pre.none()", "store<W>(dx + at + 1, pre.none()"),
        ("update.cpp", "std::min(kTileCount, tasks[i].end - at)", "kTileCount"),
        ("conv_weight_gradient.cpp", "if (r >= rows || s >= columns) return V{};", ""),
        ("find_nonfinite.cpp", "i < task.end", "i < task.begin + kTaskValues"),
    ],
)
def test_an_overrun_is_seen(address_objects, tmp_path, name, old, new):
    """The planted error: dx one value too far, or a tensor's last tile or task a whole
    one."""
    text = (CPU / name).read_text()
    planted = text.replace(old, new)
    assert planted != text
    source = tmp_path / name
    source.write_text(planted)
    compile_with(ADDRESS, "-c", source, "-o", tmp_path / "planted.o")
    objects = (address_objects | {name: tmp_path / "planted.o"}).values()
    ran = link_and_run(ADDRESS, objects, tmp_path / "driver")
    assert ran.returncode != 0
    assert "heap-buffer-overflow" in ran.stderr
