"""Memory that runs out: of the process here, of a GPU by what torch says of it."""

import os
import re
import subprocess
import sys

import pytest
import torch
from small_runs import start

from fastcnn.errors import UsageError
from fastcnn.train import evaluate, memory, step
from fastcnn.train.checkpoints import checkpoint

CPU = torch.device("cpu")
GPU_TEXT = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of "
    "which 1.00 GiB is free."
)

# fastcnn with so many more bytes of memory than it has after its imports
LIMITED = """
import resource, sys
import torch, sklearn.datasets, rich.progress
from fastcnn.cli import main

pages = int(open("/proc/self/statm").read().split()[0])
most = pages * resource.getpagesize() + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (most, most))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.full
def test_a_process_without_memory_says_what_to_try(tmp_path):
    options = ["--arch", "vgg11", "--data", "digits", "--batch-size", "1400", "--threads", "1"]
    options += ["--output", str(tmp_path), "--epochs", "1", "--loader", "resident", "--quiet"]
    words = [sys.executable, "-c", LIMITED, str(700 * 2**20), "train", *options]
    env = dict(os.environ) | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 2, done.stderr
    pattern = (
        r"fastcnn: out of memory at --batch-size 1400 \(peak (\d\.\d\d) GiB, \d\.\d\d more asked "
        r"for\): try --batch-size (\d+)"
    )
    found = re.fullmatch(pattern, done.stderr.splitlines()[-1])
    assert found, done.stderr
    assert 0 < int(found[2]) <= 700


@pytest.mark.parametrize(
    ("error", "lacks"),
    [
        (torch.OutOfMemoryError(GPU_TEXT), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("Expected all tensors to be on the same device"), False),
        (ValueError("can't"), False),
    ],
)
def test_what_counts_as_a_lack_of_memory(error, lacks):
    assert memory.lacks_memory(error) is lacks


@pytest.mark.parametrize(
    ("text", "asked"),
    [(GPU_TEXT, 2 * 2**30), ("you tried to allocate 1024 bytes. Error", 1024), ("bad_alloc", 0)],
)
def test_what_was_asked_for(text, asked):
    assert memory.asked_bytes(text) == asked


@pytest.mark.parametrize(
    ("batch_size", "peak", "asked", "smaller"),
    [(512, 70, 2, 256), (512, 10, 90, 48), (100, 70, 0, 48), (12, 70, 0, 6), (1, 70, 0, 0)],
)
def test_a_batch_to_try(batch_size, peak, asked, smaller):
    assert memory.batch_to_try(batch_size, peak, asked) == smaller


def test_no_smaller_batch_than_one():
    with (
        pytest.raises(UsageError, match=r"--batch-size 1 \(.*: take smaller images or another net"),
        memory.advising("--batch-size", 1, CPU, str),
    ):
        raise torch.OutOfMemoryError(GPU_TEXT)


def test_another_error_stays():
    with pytest.raises(RuntimeError, match="same device"), memory.advising("", 1, CPU, str):
        raise RuntimeError("Expected all tensors to be on the same device")


@pytest.mark.parametrize(
    ("owner", "name", "option"),
    [
        (step.TrainStep, "_forward", "--batch-size 24"),
        (evaluate, "predict", "--eval-batch-size 16"),
    ],
)
def test_the_checkpoint_is_kept_and_the_option_that_helps_named(
    tmp_path, monkeypatch, owner, name, option
):
    original, calls = getattr(owner, name), iter(range(99))

    def lacking(*arguments):
        if next(calls) == 4:
            raise torch.OutOfMemoryError(GPU_TEXT)
        return original(*arguments)

    monkeypatch.setattr(owner, name, lacking)
    kept = r"; the last good checkpoint is \S+last\.pt"
    with pytest.raises(UsageError, match=rf"at {option} \(peak .*: try {option[:-3]} \d+{kept}"):
        start(tmp_path)
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] >= 3
