"""The benchmark of the updates: what moves, what is compared, what is told."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_update
from bench_update import Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.fixture(autouse=True)
def _few_parameters(monkeypatch):
    monkeypatch.setattr(bench_update, "shapes_of", lambda _: [(8, 3, 3, 3), (5,)])


def test_bytes_that_must_move():
    # weight and momentum read and written, gradient read; copy written; average read and written
    assert Case("n").bytes_of(10) == 10 * (8 + 8 + 4)
    assert Case("n", half=True, average=True).bytes_of(10) == 10 * (8 + 8 + 2 + 2 + 8)
    assert Case("n", "adamw").bytes_of(10) == 10 * (8 + 16 + 4)


@pytest.mark.parametrize("rule", ["sgd", "adamw"])
@pytest.mark.parametrize(("half", "average"), [(False, False), (True, False), (True, True)])
def test_all_variants_do_the_same(monkeypatch, rule, half, average):
    monkeypatch.setattr(bench_update, "LR", 0.1)  # a step that can be told from none
    monkeypatch.setattr(bench_update, "RATE", 0.3)
    variants = bench_update.variants_of(Case("n", rule, half, average), CPU)
    weights = {name: state.params[0].clone() for name, (state, _) in variants.items()}
    assert bench_update.wrong_ones(variants) == {}
    for name, (state, _) in variants.items():
        assert (state.params[0] - weights[name]).abs().max() > 1e-4


def test_a_variant_that_is_wrong_is_named():
    variants = bench_update.variants_of(Case("n", half=True), CPU)
    state = variants["fused"][0]
    variants["fused"] = (state, lambda: state.params[1].add_(0.01))
    assert bench_update.wrong_ones(variants).keys() == {"fused"}
    state.params[0].fill_(torch.nan)
    assert bench_update.wrong_ones(variants).keys() == {"fused"}


@pytest.mark.parametrize("gpu", [None, "a GPU"])
def test_rows_and_table(gpu):
    seconds = {"fused": [1e-6] * 7, "torch": [2e-6] * 7}
    row = bench_update.row_of(Case("n"), 10, seconds, copy=1e9, absolute=bool(gpu))
    assert row["times_as_fast_as"]["torch"]["median"] == 2
    assert row["variants"]["fused"]["share_of_copy"] == pytest.approx(0.2)
    assert ("time_us" in json.dumps(row)) == bool(gpu)
    content = {"machine": {"cpu": "a CPU", "gpu": gpu}, "torch": "2", "commit": "c", "date": "d"}
    lines = bench_update.table(content | {"rounds": 7, "rows": [row], "refused": ["n: fused: bad"]})
    assert ("GB/s" in lines[1]) == bool(gpu)
    assert "x torch 2.00 (2.00 to 2.00)" in lines[1]
    assert lines[2] == "not timed: n: fused: bad"
