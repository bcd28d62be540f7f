"""Runs whose disk is full, and saves that are killed: real processes, real refusals."""

import contextlib
import ctypes
import os
import random
import re
import resource
import signal
import sys
import time

import commands_apart
import pytest
import torch
from commands_apart import SMALL, Apart

from fastcnn import cli
from fastcnn.files import remove_leftovers
from fastcnn.train.checkpoints import checkpoint

EVERY_STEP = [*SMALL, "--epochs", "50", "--checkpoint-steps", "1", "--name", "run"]
KILLS = 50
# <linux/sched.h>, <sys/mount.h>
CLONE_NEWNS, CLONE_NEWUSER, MS_REC, MS_PRIVATE = 0x20000, 0x10000000, 0x4000, 1 << 18
NO_MOUNT = 77


def needed(line, file, reason):
    """The bytes that a refusal names."""
    found = re.fullmatch(
        rf"fastcnn: cannot write \S+/{file}: {reason} \(([\d,]+) bytes needed, [\d,]+ free\)"
        r"(; the former one is kept)?",
        line,
    )
    assert found, line
    return int(found[1].replace(",", ""))


def test_a_file_that_the_system_will_not_let_grow_ends_the_run_with_its_checkpoint(tmp_path):
    run = tmp_path / "run"
    with commands_apart.command(
        tmp_path / "log", *EVERY_STEP, "--output", str(tmp_path)
    ) as process:
        process.wait_for((run / "last.pt").exists)
        size = (run / "last.pt").stat().st_size
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
        assert process.ended() == 4
    line = process.output.splitlines()[-1]
    assert abs(needed(line, r"last\.pt", "File too large") - size) < 10_000
    assert line.endswith("; the former one is kept")
    assert {path.name for path in run.iterdir()} >= {"last.pt", "checkpoints.json"}
    assert [path.name for path in run.iterdir() if path.name.endswith(".part")] == []
    assert checkpoint.load(run / "last.pt")["step"] > 0


def on_a_small_disk(folder, words):
    """The command with `folder` on a disk of 40 MB; says what it leaves there."""
    libc = ctypes.CDLL(None, use_errno=True)
    spaces = CLONE_NEWNS if os.getuid() == 0 else CLONE_NEWNS | CLONE_NEWUSER
    mounted = libc.unshare(spaces) == 0
    mounted = mounted and libc.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
    if not mounted or libc.mount(b"none", str(folder).encode(), b"tmpfs", 0, b"size=40m"):
        return NO_MOUNT
    code = cli.main(words)
    kept = {*os.listdir(folder / "run")} - {"config.yaml", "environment.json"}
    print(*sorted(kept))  # noqa: T201
    print(checkpoint.load(folder / "run" / "last.pt")["step"] > 0)  # noqa: T201
    return code


def fill(path):
    with open(path, "wb", 0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 16))


def test_a_full_disk_ends_the_run_with_its_checkpoint(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    words = [*EVERY_STEP, "--output", str(disk)]
    with Apart(tmp_path / "log", on_a_small_disk, disk, words) as process:
        seen = f"/proc/{process.pid}/root{disk}"
        process.wait_for(lambda: os.path.exists(f"{seen}/run/last.pt") or not process.alive)
        if process.alive:
            fill(f"{seen}/filler")
        code = process.ended()
    if code == NO_MOUNT:
        pytest.skip("this system lets nobody mount a disk of their own")
    *lines, names, loads = process.output.splitlines()
    # whichever file was written when it was full
    assert needed(lines[-1], r"\S+", "No space left on device") > 0
    # whole files alone; more of them where the disk lasted for longer
    least, kept = {"checkpoints.json", "last.pt"}, {*names.split()}
    assert least <= kept <= least | {"last-2.pt", "best.pt", "metrics.csv"}
    assert (code, loads) == (4, "True")


def save_for_ever(path, told):
    """Save one checkpoint after the other; write the number of each that is done to `told`."""
    torch.set_num_threads(1)
    state = {"model": {"w": torch.zeros(100_000)}, "optimizer": {"w": torch.zeros(100_000)}}
    start = checkpoint.load(path)["step"] if path.exists() else 0
    with open(told, "ab", 0) as done:
        for step in range(start + 1, 10**9):
            for tensors in (state["model"], state["optimizer"]):
                tensors["w"].fill_(step)
            checkpoint.save({"step": step, **state}, path, keep=3)
            done.write(step.to_bytes(4, sys.byteorder))


def numbers(told):
    return memoryview(told.read_bytes()).cast("i").tolist() if told.exists() else []


@pytest.mark.full
def test_a_save_killed_at_any_moment_leaves_the_last_good_checkpoint(tmp_path):
    folder, told = tmp_path / "run", tmp_path / "told"
    folder.mkdir()
    draw, halves = random.Random(0), 0
    for _ in range(KILLS):
        before = numbers(told)
        with Apart(tmp_path / "log", save_for_ever, folder / "last.pt", told) as process:
            process.wait_for(lambda before=before: len(numbers(told)) > len(before) + 1)
            time.sleep(draw.uniform(0, 0.02))
            process.send(signal.SIGKILL)
            assert process.ended() == -signal.SIGKILL
        done = numbers(told)[-1]
        names = {path.name for path in folder.iterdir()}
        finished = {name for name in names if not name.endswith(".part")}
        halves += finished != names
        assert finished <= {"last.pt", "last-2.pt", "last-3.pt", "checkpoints.json"}
        for name in finished - {"checkpoints.json"}:
            state = checkpoint.load(folder / name)
            assert state["step"] >= (done if name == "last.pt" else 1)
            for part in ("model", "optimizer"):
                assert torch.equal(state[part]["w"], torch.full((100_000,), state["step"]))
        remove_leftovers(folder)
        assert {path.name for path in folder.iterdir()} == finished
    # or else nothing was interrupted
    assert halves > KILLS // 5
