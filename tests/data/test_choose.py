"""What --loader auto comes to: by the pixels, the memory, the disk and what is installed."""

import importlib.util
import subprocess
import sys

import pytest
import torch

from fastcnn.config import DataConfig
from fastcnn.data.choose import choose, free_memory, has_dali
from fastcnn.errors import UsageError

CPU = torch.device("cpu")
GB = 10**9
imported = []
module = sys.modules["fastcnn.data.choose"]  # its name in the package is the function's


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine with 8 GB of free memory, 100 GB of free disk and DALI."""

    def be(memory=8 * GB, disk=100 * GB, dali=True):
        monkeypatch.setattr(module, "free_memory", lambda device: (memory, "memory"))
        monkeypatch.setattr(module, "free_disk", lambda: disk)
        monkeypatch.setattr(module, "has_dali", lambda: dali)
        monkeypatch.setattr(module, "import_dali", lambda: imported.append(1))

    imported.clear()
    be()
    return be


def chosen(images=50_000, sides=(32, 32), folder=True, **options):
    found = choose(DataConfig(data="x", **options), images, sides, folder, CPU)
    return found.loader, found.store, found.why


def test_small_images_are_resident():
    loader, store, why = chosen()
    assert (loader, store) == ("resident", "packed")
    assert not imported
    assert why == "--loader auto is resident: 154 MB of pixels, 8.0 GB of memory free"


def test_they_may_take_less_than_half_of_the_memory(machine):
    size = 50_000 * 32 * 32 * 3
    machine(memory=2 * size)
    assert chosen()[:2] == ("dali", "files")
    machine(memory=2 * size + 1)
    assert chosen()[0] == "resident"


def test_of_a_folder_they_must_fit_on_the_disk(machine):
    machine(disk=100 * 10**6)
    assert chosen() == (
        "dali",
        "files",
        "--loader auto is dali: 154 MB of pixels, 100 MB free on the cache's disk",
    )
    assert chosen(folder=False)[:2] == ("resident", "packed")  # packed already


def test_without_dali_the_torch_loader_takes_them(machine):
    machine(memory=GB // 10, dali=False)
    loader, store, why = chosen()
    assert (loader, store) == ("torch", "files")
    assert why == (
        "--loader auto is torch: 154 MB of pixels, 100 MB of memory free; DALI, which is faster, "
        "is not installed"
    )
    machine(memory=GB // 10)
    assert chosen(folder=False)[:2] == ("dali", "packed")


@pytest.mark.parametrize("loader", ["resident", "dali", "torch"])
@pytest.mark.parametrize("folder", [True, False])
def test_what_is_asked_for_is_taken(loader, folder, machine):
    machine(memory=1)
    store = "files" if folder and loader != "resident" else "packed"
    assert chosen(loader=loader, folder=folder) == (loader, store, "")
    assert chosen(loader=loader, folder=folder, store="packed")[1] == "packed"


@pytest.mark.parametrize("dali", [True, False])
def test_files_are_never_resident(machine, dali):
    machine(dali=dali)
    assert chosen(store="files")[:2] == ("dali" if dali else "torch", "files")
    with pytest.raises(UsageError, match="--store files: the resident loader"):
        chosen(store="files", loader="resident")
    with pytest.raises(UsageError, match="--store files: x is no folder of images"):
        chosen(store="files", folder=False)


def test_packed_by_order_is_resident_where_it_fits(machine):
    assert chosen(store="packed")[:2] == ("resident", "packed")
    machine(memory=1)
    assert chosen(store="packed")[:2] == ("dali", "packed")


def test_dali_that_is_missing_is_said_before_anything_is_packed(machine):
    machine(dali=False)
    with pytest.raises(UsageError, match=r"DALI is not installed; pip install 'fastcnn\[dali\]'"):
        chosen(loader="dali")


@pytest.mark.full
def test_dali_is_looked_for_without_importing_it():
    code = (
        "import sys\nfrom fastcnn.data.choose import has_dali\nprint(has_dali())\n"
        "assert 'nvidia.dali' not in sys.modules\n"
        "sys.modules['nvidia'] = None\nprint(has_dali())"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    there = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    assert out.stdout.split() == [str(there is not None), "False"]
    assert has_dali() == (there is not None)


def test_a_container_s_limit_counts(tmp_path, monkeypatch):
    total, _ = free_memory(CPU)
    assert 10**6 < total < 10**15
    for name, text in (
        ("memory.max", "3000000"),
        ("memory.current", "2500000"),
        ("memory.stat", "anon 5\ninactive_file 400000\n"),
    ):
        (tmp_path / name).write_text(text)
    files = (str(tmp_path / "memory.max"), str(tmp_path / "memory.current"))
    monkeypatch.setattr(module, "CGROUPS", (files,))
    assert free_memory(CPU) == (900_000, "memory")
    (tmp_path / "memory.max").write_text("max")
    assert free_memory(CPU)[0] > 900_000


@pytest.mark.cuda
def test_a_gpu_s_own_memory_counts():
    free, what = free_memory(torch.device("cuda"))
    assert what == "GPU memory"
    assert 0 < free <= torch.cuda.get_device_properties(0).total_memory
