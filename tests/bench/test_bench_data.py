"""The benchmark of loaders: what it writes, and that it refuses a loader that delivers wrongly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_data

from fastcnn.errors import UsageError

pytestmark = pytest.mark.full

RIVALS = {"folder 0", "folder 1", "folder 2", "memory 0", "memory 2"}
OURS = {"torch 2", "resident"}
DALI = {"dali store", "dali files"}
CIFAR = bench_data.SETS[0]


def test_run_as_a_script_it_writes_every_loader(tmp_path):
    """With tiny turns: the figures mean nothing, their structure does."""
    command = [sys.executable, bench_data.__file__, "--rounds", "1", "--images", "64"]
    command += [
        "--seconds",
        "0.02",
        "--only",
        "cifar",
        "--device",
        "cpu",
        "--json",
        tmp_path / "found.json",
    ]
    unset = {name for name in os.environ if name.startswith("FASTCNN_BENCH_")}
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "found.json").read_text())
    assert set(content) == {"command", "environment", "results", "targets"}
    assert content["environment"]["machine"]["gpu"] is None
    assert set(content["results"]) == {"cifar"}
    found = content["results"]["cifar"]
    assert (found["batch"], found["side"], found["n"]) == (128, 32, 1)
    assert found["images"] == "smooth noise"
    loaders = found["loaders"]
    assert set(loaders) - DALI == RIVALS | OURS
    for name, row in loaders.items():
        assert row["images_per_s"]["min"] > 0
        assert row["images_a_turn"] % 64 == 0
        assert row["difference_levels"] <= bench_data.TOLERANCE
        assert set(row["times_as_fast_as"]) == RIVALS - {name}
        assert set(row["times_as_fast_as"]["folder 2" if name != "folder 2" else "folder 0"]) == {
            *("median", "min", "max")
        }
    assert content["targets"] == bench_data.judged(content["results"])
    assert len(content["targets"]) == 1 + bool(DALI & set(loaders))
    for line in content["targets"]:
        assert line in done.stdout


def batches(x, y):
    """A maker of a loader that delivers these in two batches."""
    return lambda count, augmented: [(x[:5], y[:5]), (x[5:], y[5:])]


def test_a_loader_that_delivers_something_else_is_refused():
    x, y = torch.randn(8, 3, 4, 4), torch.arange(8)
    right = batches(x, y)
    level = 1 / (255 * torch.tensor(bench_data.STD).view(1, 3, 1, 1))
    near = batches(x + 0.5 * level, y)
    found = bench_data.check("cifar", {"folder 0": right, "near": near}, CIFAR)
    assert found == {"folder 0": 0.0, "near": 0.5}
    for wrong in (
        batches(x + 2 * level, y),
        batches(x.flip(3), y),
        batches(x, y.flip(0)),
        batches(x.flip(0), y.flip(0)),
    ):
        with pytest.raises(UsageError, match="cifar: wrong differs from folder 0 by"):
            bench_data.check("cifar", {"folder 0": right, "wrong": wrong}, CIFAR)


def test_a_loader_that_delivers_too_few_images_is_refused():
    x, y = torch.zeros(100, 3, 4, 4), torch.zeros(100, dtype=torch.int64)
    make = batches(x, y)
    with pytest.raises(UsageError, match="100 images delivered, 256 expected"):
        bench_data.Turn(make, CIFAR, torch.device("cpu"), torch.get_num_threads(), 1.0)


def test_targets_are_judged_by_the_median():
    def loaders(resident, dali=None):
        rows = {"resident": resident} | ({"dali store": dali} if dali else {})
        return {
            name: {"times_as_fast_as": {"memory 0": {"median": times, "min": 0.1, "max": 99.0}}}
            for name, times in rows.items()
        }

    assert bench_data.judged({"cifar": {"loaders": loaders(20.0, 9.9)}}) == [
        "cifar: resident 20.0x memory 0, 20x: met",
        "cifar: dali store 9.9x memory 0, 10x: MISSED",
    ]
    assert bench_data.judged({"cifar": {"loaders": loaders(19.9)}}) == [
        "cifar: resident 19.9x memory 0, 20x: MISSED"
    ]
    assert bench_data.judged({"tiny": {"loaders": {}}}) == []
