"""The arithmetic of the benchmarks: cases, bytes, checks, rounds, rows; no figure is judged."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcnn.archs import NETWORKS, get_network
from fastcnn.bench import timing
from fastcnn.bench.kernels import cases as layer_cases
from fastcnn.bench.kernels import interleaved
from fastcnn.bench.kernels.cases import Case, backward_bytes, calls_of, forward_bytes
from fastcnn.bench.rivals import correctness
from fastcnn.ops import reference

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import bench_ops
import report

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
CONV = Case("bn_act", (2, 4, 6, 6), post_slope=0.0)
POOLED = dataclasses.replace(CONV, op="bn_act_pool", pool=(2, 2, 0))
Y, POOL, C = 288, 72, 72  # values of x, of the pooled result; bytes of codes


# cases from the networks


def test_calls_are_the_layers_in_order():
    calls = calls_of(get_network("cnn-a"), 16)
    assert calls == [
        Case("bias_act", (16, 32, 32, 32), post_slope=0.0),
        Case("bias_act_pool", (16, 32, 32, 32), post_slope=0.0, pool=(2, 2, 0)),
        Case("bias_act", (16, 64, 16, 16), post_slope=0.0),
        Case("bias_act_pool", (16, 64, 16, 16), post_slope=0.0, pool=(2, 2, 0)),
        Case("bias_act", (16, 128), post_slope=0.0, bias=False),
        Case("bias_act", (16, 10), bias=False),
    ]
    assert [case.does_nothing for case in calls] == [False] * 5 + [True]


def test_norm_behind_a_name_adds_it_to_each_convolution():
    calls = calls_of(get_network("cnn-a+norm"), 16)
    assert [case.op for case in calls[:4]] == ["bn_act", "bn_act_pool"] * 2
    assert [case.shape for case in calls] == [c.shape for c in calls_of(get_network("cnn-a"), 16)]


def test_slopes_pools_and_residuals_come_from_the_records():
    mao = calls_of(get_network("mao-batchnorm"), 2)
    first = Case("bn_act_pool", (2, 64, 28, 28), 0.01, 1.0, (2, 2, 0))
    assert mao[0] == first
    assert calls_of(get_network("mao-batchnorm"), 2, training=False)[0] == dataclasses.replace(
        first, training=False
    )
    assert sum(case.residual for case in calls_of(get_network("resnet18"), 2)) == 8
    assert {c.pool for c in calls_of(get_network("murgolo-base"), 2)} == {(3, 2, 0), None}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_cases(name):
    calls = calls_of(NETWORKS[name], 2)
    assert len(calls) == len(calls_of(NETWORKS[name], 2, training=False))
    assert all(math.prod(case.pooled_shape) for case in calls)


def test_distinct_cases_name_their_networks_and_leave_out_idle_ones():
    cases = layer_cases.distinct_cases(["vgg16", "resnet18"], 4)
    assert cases[Case("bn_act", (4, 64, 32, 32), post_slope=0.0)] == ["vgg16", "resnet18"]
    assert not any(case.does_nothing for case in cases)
    kinds = layer_cases.largest_of_each_kind(cases)
    assert len(kinds) == len({case.kind for case in cases})
    assert max(cases, key=lambda case: math.prod(case.shape)).shape in {c.shape for c in kinds}


# bytes


@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        (CONV, 3 * Y * 2, 5 * Y * 2),
        (dataclasses.replace(CONV, training=False), 2 * Y * 2, None),
        (dataclasses.replace(CONV, residual=True), 4 * Y * 2, 7 * Y * 2),
        (dataclasses.replace(CONV, residual=True, post_slope=1.0), 4 * Y * 2, 6 * Y * 2),
        (POOLED, (2 * Y + POOL) * 2 + C, (3 * Y + 2 * POOL) * 2 + 2 * C),
        (dataclasses.replace(POOLED, training=False), (Y + POOL) * 2, None),
        (dataclasses.replace(CONV, op="bias_act"), 2 * Y * 2, 3 * Y * 2),
        (dataclasses.replace(CONV, op="bias_act", post_slope=1.0), 2 * Y * 2, 2 * Y * 2),
        (dataclasses.replace(POOLED, op="bias_act_pool"), (Y + POOL) * 2 + C, (Y + POOL) * 2 + C),
    ],
    ids=str,
)
def test_bytes_of_a_pass(case, forward, backward):
    assert forward_bytes(case, 2) == forward
    passes = bench_ops.passes_of(case, 2)
    if backward is None:
        assert list(passes) == ["forward"]
    else:
        assert passes == {"forward": forward, "backward": backward, "both": forward + backward}
        assert backward_bytes(case, 2) == backward


def test_bytes_that_eager_keeps():
    # x, the pool's input, an int64 index a pooled value; mean and rstd of 4 channels
    assert kept_by(POOLED, reference) == 4 * (Y + Y) + 8 * POOL + 2 * 4 * 4


# tensors, calls, checks


@pytest.mark.parametrize(
    "case", calls_of(get_network("resnet18"), 2)[:6] + calls_of(get_network("mao-batchnorm"), 2)
)
def test_inputs_fit_the_call(case):
    inputs = layer_cases.make_inputs(case, torch.float32, CPU, 0)
    y = layer_cases.function_of(case, reference)(inputs.tensors)
    assert y.shape == case.pooled_shape == inputs.dy.shape
    if y.dim() == 4:
        assert inputs.tensors["x"].is_contiguous(memory_format=torch.channels_last)
    assert all(
        gradient is not None for gradient in torch.autograd.grad(y, inputs.differentiable, y)
    )


def test_a_wrong_variant_is_not_timed():
    right = layer_cases.function_of(POOLED, reference)

    def wrong(t):
        return right(t) * 1.01

    def nan(t):
        return right(t) + torch.tensor([math.nan, 0.0, 0.0, 0.0]).view(-1, 1, 1)

    def broken(t):
        raise RuntimeError("no compiler")

    variants = {"fused": right, "eager": right, "a": wrong, "b": nan, "c": broken}
    found = interleaved.check(POOLED, variants, torch.float32, CPU)
    assert found.keys() == {"a", "b", "c"}
    assert found["c"] == "RuntimeError: no compiler"
    assert "errs by nan" in found["b"]


def test_errors_beyond_twice_eagers_are_wrong():
    errors = {"eager": {"y": 1e-3}, "fused": {"y": 2e-3}, "compile": {"y": 2.2e-3}}
    assert correctness.wrong_ones(errors, 1e-4).keys() == {"compile"}
    assert correctness.wrong_ones({"eager": {"y": 0.2}}, 1e-4).keys() == {"eager"}


def test_checks_leave_the_running_statistics_of_the_inputs():
    inputs = layer_cases.make_inputs(CONV, torch.float32, CPU, 0)
    before = inputs.tensors["running_mean"].clone()
    results = interleaved.results_of(layer_cases.function_of(CONV, reference), inputs)
    assert torch.equal(inputs.tensors["running_mean"], before)
    assert not torch.equal(results["running_mean"], before)
    assert results.keys() == {"y", "dx", "dweight", "dbias", "running_mean", "running_var"}


# rounds


def test_sets_are_larger_than_the_cache_and_calls_few_enough():
    small, large = 8 * 64 * 64 * 4, 1024 * 64 * 64 * 64 * 4
    sets, calls = timing.sets_and_calls(small, "cuda", 16 * small)
    assert (sets, calls) == (64, timing.MOST_CALLS["cuda"])
    assert timing.sets_and_calls(large, "cuda", 16 * small)[0] == 3
    assert timing.sets_and_calls(large, "cpu", 16 * small)[1] == 1


def test_variants_take_turns_over_all_sets(monkeypatch):
    monkeypatch.setattr(interleaved, "sets_and_calls", lambda *_: (3, 2))
    seen = []

    def noting(name):
        def function(t):
            seen.append((name, t["x"].data_ptr()))
            return layer_cases.function_of(CONV, reference)(t)

        return function

    both = interleaved.Turns(CONV, {"a": noting("a"), "b": noting("b")}, torch.float32, CPU)
    both()
    both()
    assert [name for name, _ in seen] == ["a", "a", "b", "b"] * 2
    places = [place for _, place in seen]
    assert places[:6] == places[:3] * 2 == places[:3] + places[3:6]
    assert len(set(places)) == 3
    assert {name: len(times) for name, times in both.times.items()} == {"a": 2, "b": 2}
    assert all(time.forward > 0 and time.backward > 0 for time in both.times["a"])


def test_medians_extremes_and_ratios():
    assert timing.spread([3.0, 1.0, 2.00004], 10) == {"median": 20.0, "min": 10.0, "max": 30.0}
    # the ratio of medians, and the extremes round by round
    assert timing.ratios([4.0, 8.0, 6.0], [2.0, 2.0, 6.0]) == {
        "median": 3.0,
        "min": 1.0,
        "max": 4.0,
    }


# rows, table, file


def content_of(gpu):
    times = {
        "fused": [timing.Time(1e-6, 2e-6, 5e-6)] * 7,
        "eager": [timing.Time(2e-6, 6e-6, 9e-6)] * 7,
    }
    rows = bench_ops.rows_of(CONV, times, copy=1e9, itemsize=4, absolute=bool(gpu))
    machine = {"machine": {"cpu": "a CPU", "gpu": gpu}, "torch": "2", "commit": "c", "date": "d"}
    rest = {"dtype": "float32", "allocator": "plain", "rounds": 7, "copy_gb_per_s": 1.0}
    refused = [{"case": str(CONV), "variant": "compile", "why": "y errs"}]
    return machine | rest | {"rows": rows, "refused": refused, "left_out": ["another"]}


def test_rows_on_a_gpu_have_times_and_rates():
    rows = content_of("a GPU")["rows"]
    assert [row["pass"] for row in rows] == ["forward", "backward", "both"]
    both = rows[2]
    assert both["bytes"] == 8 * Y * 4
    fused = both["variants"]["fused"]
    assert fused["time_us"] == {"median": 3.0, "min": 3.0, "max": 3.0}
    assert fused["gb_per_s"] == pytest.approx(8 * Y * 4 / 3e-6 / 1e9, abs=0.1)
    assert fused["share_of_copy"] == pytest.approx(8 * Y * 4 / 3e-6 / 1e9, abs=1e-3)
    assert fused["host_us"]["median"] == 5.0
    assert both["times_as_fast_as"]["eager"]["median"] == 2.667


def test_rows_on_a_cpu_have_ratios_alone():
    rows = content_of(None)["rows"]
    text = json.dumps(rows)
    assert "time_us" not in text
    assert "gb_per_s" not in text
    assert "host_us" not in text
    assert rows[1]["times_as_fast_as"]["eager"]["median"] == 3.0


@pytest.mark.parametrize("gpu", [None, "a GPU"])
def test_table(gpu):
    lines = bench_ops.table(content_of(gpu))
    text = "\n".join(lines)
    assert ("GB/s" in text) == bool(gpu)
    assert "2.67 (2.67 to 2.67)" in text
    assert lines[-2] == f"not timed: {CONV} compile: y errs"
    assert lines[-1] == "left out, no time left: another"


def test_the_file_is_written_at_every_addition(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCNN_BENCH_JSON", str(tmp_path / "new" / "file.json"))
    found = report.Report("bench_ops", {"rows": []}, lambda content: [])
    found.add("rows", {"a": 1})
    assert json.loads((tmp_path / "new" / "file.json").read_text()) == {"rows": [{"a": 1}]}
    # pytest-benchmark's table makes room for ours, and only for ours
    ours, other = ({"fullname": f"benchmarks/{n}.py::test"} for n in ("bench_ops", "bench_data"))
    assert found.pytest_benchmark_group_stats([ours]) == []
    assert found.pytest_benchmark_group_stats([ours, other]) is None


@pytest.mark.full
def test_a_run_from_end_to_end(library, tmp_path):
    path = tmp_path / "ops.json"
    options = {"NETWORKS": "murgolo-improved", "BATCH": "2", "COMPILE": "0", "DEVICE": "cpu"}
    options |= {"JSON": str(path), "THREADS": "1", "ROUNDS": "7", "QUICK": "1", "DTYPE": "fp32"}
    variables = {f"FASTCNN_BENCH_{name}": value for name, value in options.items()}
    # beside other tests pytest-benchmark times nothing
    without_xdist = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks/bench_ops.py",
        "--benchmark-enable",
        "-q",
    ]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=REPOSITORY,
        env=without_xdist | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    content = json.loads(path.read_text())
    assert content["library_sources"] == library.sources
    assert content["rounds"] == 7
    training = {row["case"] for row in content["rows"] if row["pass"] == "backward"}
    assert "bn_act_pool-pool320-2x32x32x32-1-0" in training
    assert all("eager" in row["times_as_fast_as"] for row in content["rows"])
    assert all(
        row["networks"] == ["murgolo-improved"] for row in content["rows"] if "networks" in row
    )
    assert {"fused", "eager"} in [row.get("kept_bytes", {}).keys() for row in content["rows"]]
    assert "x eager" in done.stdout
    assert content["refused"] == content["left_out"] == []


def kept_by(case, module):
    """Bytes that the backward of one op keeps by itself, x among them."""
    inputs = layer_cases.make_inputs(case, torch.float32, CPU, 0)
    known = [t for name, t in inputs.tensors.items() if name not in ("x", "residual")]
    call = layer_cases.function_of(case, module)
    return layer_cases.kept_bytes(lambda: call(inputs.tensors), known)


def test_the_op_keeps_less_than_eager(library):
    from fastcnn import ops

    fused, eager = (kept_by(POOLED, module) for module in (ops, reference))
    # x, a byte a pooled value, mean and rstd
    assert fused == 4 * Y + C + 2 * 4 * 4
    assert fused < eager
