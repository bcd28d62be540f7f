"""What a command does to its own process, each in a process of its own."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from fastcnn.train.host import keep_freed_memory
torch.set_num_threads(1)
if {tuned}:
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
[faults() for _ in range(8)]  # until the heap has its size
print(sum(faults() for _ in range(4)))
"""

DENORMAL = """
import torch
from fastcnn.train.host import tune_process
{tune}
print((torch.full((1000,), 1e-39) * 0.5).sum().item() == 0)
"""

THREADS = """
import torch
from fastcnn.train.host import tune_process, usable_cores
tune_process({given})
print(torch.get_num_threads() == {wanted})
"""


def output_of(code):
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return found.stdout.strip()


@pytest.mark.full
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator is glibc's")
def test_freed_tensors_are_not_faulted_in_again():
    # 4 tensors of 64 MiB are 65,536 pages of 4 KiB
    plain, tuned = (int(output_of(FAULTS.format(tuned=on))) for on in (False, True))
    assert plain > 100
    # a system that is short of memory may have taken a tensor's pages back meanwhile
    assert tuned <= plain / 3


def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(monkeypatch):
    code = "import os\nfrom fastcnn.cli import main\nmain(['archs', '--json'])\n"
    code += "print(os.environ.get('GOMP_SPINCOUNT'))"
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert output_of(code).endswith("10000")
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert output_of(code).endswith("77")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert output_of(code).endswith("None")


@pytest.mark.full
def test_denormals_are_flushed():
    assert output_of(DENORMAL.format(tune="")) == "False"
    assert output_of(DENORMAL.format(tune="tune_process(2)")) == "True"


@pytest.mark.full
def test_threads_are_those_asked_for():
    assert output_of(THREADS.format(given=3, wanted=3)) == "True"
    assert output_of(THREADS.format(given="", wanted="usable_cores()")) == "True"
