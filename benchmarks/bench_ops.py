"""The fused ops against eager torch and torch.compile, on the layers of the networks.

    pytest benchmarks/bench_ops.py --benchmark-enable
    FASTCNN_BENCH_QUICK=1 pytest benchmarks/bench_ops.py --benchmark-enable     # under two minutes
    FASTCNN_BENCH_DTYPE=bf16 FASTCNN_BENCH_BATCH=1024 pytest benchmarks/bench_ops.py ...

Every distinct call that the layers of the networks make is a test: each variant's result and
gradients are checked against fp64, then all variants are timed in turn, A B C A B C, over input
sets larger together than the cache. A variant that is wrong is not timed. The table at the end, and
`FASTCNN_BENCH_JSON`, hold the medians of the rounds: times, bytes/s and the share of the device's
copy bandwidth (measured in the same run) on a GPU; on a CPU ratios and shares alone.

| variable (FASTCNN_BENCH_…) | holds | unset |
|---|---|---|
| DEVICE | cuda, cpu | cuda if there is a GPU |
| DTYPE | fp32, bf16, fp16 | fp32 on a CPU, bf16 on a GPU |
| BATCH | images | 128 |
| NETWORKS | names, with commas; `+norm` adds batch norm to each convolution | see NETWORKS |
| QUICK | 1: the largest case of each op, pool and mode, a batch of 32 on a CPU | all cases |
| ALLOCATOR | tuned: as the command `fastcnn` sets up its process; plain: as Python does | plain |
| COMPILE | 0: without torch.compile | 1 |
| ROUNDS | timed rounds, at least 7 | 9 |
| THREADS | of the CPU | torch's default |
| BUDGET_S | seconds after which cases are left out and named | none |
| JSON | the file to write | none |
"""

from functools import partial
from typing import Any

import pytest
import torch
from report import Report, option, switched_on

from fastcnn import ops
from fastcnn.bench.environment import environment
from fastcnn.bench.kernels.cases import (
    Case,
    backward_bytes,
    distinct_cases,
    forward_bytes,
    function_of,
    kept_bytes,
    largest_of_each_kind,
    make_inputs,
)
from fastcnn.bench.kernels.interleaved import WARMUP_ROUNDS, Function, Turns, check
from fastcnn.bench.timing import Time, copy_bandwidth, ratios, spread
from fastcnn.ops import reference
from fastcnn.train import host

NETWORKS = [
    *["vgg16", "resnet18", "cnn-a", "cnn-a+norm", "murgolo-base", "murgolo-improved"],
    *["mao-default", "mao-batchnorm", "tiny-a", "tiny-b"],
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

DEVICE = torch.device(option("DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))
DTYPE_NAME = option("DTYPE", "bf16" if DEVICE.type == "cuda" else "fp32")
if DTYPE_NAME not in DTYPES:
    raise pytest.UsageError(f"FASTCNN_BENCH_DTYPE: expected {', '.join(DTYPES)}, got {DTYPE_NAME}")
DTYPE = DTYPES[DTYPE_NAME]
QUICK = switched_on("QUICK", False)
BATCH = int(option("BATCH", "32" if QUICK and DEVICE.type == "cpu" else "128"))
ROUNDS = max(7, int(option("ROUNDS", "9")))
ALLOCATOR = option("ALLOCATOR", "plain")
BUDGET_S = float(option("BUDGET_S", "inf"))


def chosen_cases() -> dict[Case, list[str]]:
    """Return the cases of this run, each with the networks that it is from."""
    cases = distinct_cases(option("NETWORKS", ",".join(NETWORKS)).split(","), BATCH)
    return largest_of_each_kind(cases) if QUICK else cases


# the variants of a case


def variants_of(case: Case, compiled: bool) -> dict[str, Function]:
    """Return fused, eager and torch.compile's functions, in the order in which they take turns."""
    variants = {"fused": function_of(case, ops), "eager": function_of(case, reference)}
    if compiled:
        # each case is one function to the compiler, and it recompiles one only a few times
        torch.compiler.reset()
        variants["compile"] = torch.compile(function_of(case, reference), dynamic=False)
    return variants


def passes_of(case: Case, itemsize: int) -> dict[str, int]:
    """Return the passes that are timed and the bytes that each must move."""
    passes = {"forward": forward_bytes(case, itemsize)}
    if case.training:
        passes["backward"] = backward_bytes(case, itemsize)
        passes["both"] = sum(passes.values())
    return passes


def rows_of(
    case: Case, times: dict[str, list[Time]], copy: float, itemsize: int, absolute: bool
) -> list[dict[str, Any]]:
    """Return a row a pass: medians and extremes of the rounds. copy: bytes/s; absolute: whether
    times and bytes/s may be told, which is so on a GPU."""
    rows = []
    for name, moved in passes_of(case, itemsize).items():
        seconds = {v: [getattr(t, name) for t in found] for v, found in times.items()}
        row: dict[str, Any] = {"case": str(case), "pass": name, "bytes": moved, "variants": {}}
        for variant, samples in seconds.items():
            figures: dict[str, Any] = {}
            rate = moved / spread(samples, digits=9)["median"]
            if absolute:
                figures["time_us"] = spread(samples, 1e6)
                figures["gb_per_s"] = round(rate / 1e9, 1)
            figures["share_of_copy"] = round(rate / copy, 3)
            row["variants"][variant] = figures
        rivals = [v for v in seconds if v != "fused" and "fused" in seconds]
        row["times_as_fast_as"] = {v: ratios(seconds[v], seconds["fused"]) for v in rivals}
        rows.append(row)
    if absolute:
        for variant, found in times.items():
            rows[-1]["variants"][variant]["host_us"] = spread([t.host for t in found], 1e6)
    return rows


def kept_by_each(case: Case) -> dict[str, int]:
    """Return the bytes that the backward of a case keeps by itself, fused and eager."""
    if not case.training:
        return {}
    kept = {}
    for name, module in (("fused", ops), ("eager", reference)):
        t = make_inputs(case, DTYPE, DEVICE, 0).tensors
        known = [t[n] for n in t if n not in ("x", "residual")]
        kept[name] = kept_bytes(partial(function_of(case, module), t), known)
    return kept


# the run


def new_content(copy: float) -> dict[str, Any]:
    """Return what a run's JSON file holds before the first case; copy: bytes/s."""
    return {
        **environment(DEVICE),
        "dtype": str(DTYPE).removeprefix("torch."),
        "batch": BATCH,
        "allocator": ALLOCATOR if DEVICE.type == "cpu" else "torch's",
        "rounds": ROUNDS,
        "copy_gb_per_s": round(copy / 1e9, 1) if DEVICE.type == "cuda" else None,
        "library_sources": ops.load().sources,
        "rows": [],
        "refused": [],
        "left_out": [],
    }


def table(content: dict[str, Any]) -> list[str]:
    """Return a line for each row: times and bytes/s on a GPU, ratios everywhere."""
    gpu = content["machine"]["gpu"]
    where = gpu or content["machine"]["cpu"]
    lines = [
        f"{where}, torch {content['torch']}, commit {content['commit']}, {content['date']}",
        f"{content['dtype']}, allocator {content['allocator']}, {content['rounds']} rounds; "
        "x eager: how many times as fast as eager, the ratio of medians (extremes of the rounds)",
    ]
    if gpu:
        lines.append(f"device copy, read + write: {content['copy_gb_per_s']:,} GB/s")
    lines.append(
        f"{'case':<52} {'pass':<9}"
        + f"{'us':>9} {'GB/s':>7} " * bool(gpu)
        + f"{'of copy':>8}  {'x eager':<24}{'x compile':<24}"
    )
    lines += [_line(row, bool(gpu)) for row in content["rows"]]
    lines += [f"not timed: {r['case']} {r['variant']}: {r['why']}" for r in content["refused"]]
    if content["left_out"]:
        lines.append(f"left out, no time left: {', '.join(content['left_out'])}")
    return lines


def _line(row: dict[str, Any], gpu: bool) -> str:
    fused = row["variants"].get("fused")
    words = f"{row['case']:<52} {row['pass']:<9}"
    if fused is None:
        return f"{words} fused was not timed"
    if gpu:
        words += f"{fused['time_us']['median']:>9.1f} {fused['gb_per_s']:>7,.0f} "
    words += f"{fused['share_of_copy']:>8.0%}  "
    for rival in ("eager", "compile"):
        r = row["times_as_fast_as"].get(rival)
        told = f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})" if r else ""
        words += f"{told:<24}"
    return words.rstrip()


@pytest.fixture(scope="module")
def copy_rate():
    """Bytes/s of a large copy, after the process was set up as the options ask."""
    if option("THREADS"):
        torch.set_num_threads(int(option("THREADS")))
    if DEVICE.type == "cpu" and ALLOCATOR == "tuned":
        host.tune_process(torch.get_num_threads())
    return copy_bandwidth(DEVICE)


@pytest.fixture(scope="module")
def report(request, copy_rate):
    found = Report("bench_ops", new_content(copy_rate), table)
    request.config.pluginmanager.register(found)
    return found


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = chosen_cases()
        metafunc.parametrize(("case", "networks"), cases.items(), ids=map(str, cases))


def test_op(benchmark, report, copy_rate, case, networks):
    if report.spent_s > BUDGET_S:
        report.add("left_out", str(case))
        pytest.skip(f"{BUDGET_S:g} s are spent")
    variants = variants_of(case, switched_on("COMPILE", True))
    refused = check(case, variants, DTYPE, DEVICE)
    right = {name: f for name, f in variants.items() if name not in refused}
    turns = Turns(case, right, DTYPE, DEVICE)
    benchmark.pedantic(turns, rounds=ROUNDS, warmup_rounds=WARMUP_ROUNDS)
    if benchmark.stats is not None:
        times = {name: found[-ROUNDS:] for name, found in turns.times.items()}
        rows = rows_of(case, times, copy_rate, DTYPE.itemsize, DEVICE.type == "cuda")
        kept = {} if refused.keys() & {"fused", "eager"} else kept_by_each(case)
        rows[0] |= {"networks": networks, "kept_bytes": kept}
        rows[0] |= {"sets": len(turns.sets), "calls": turns.calls, "launched_ahead": turns.held}
        rows[0]["sets_over_cache"] = turns.sets_over_cache
        benchmark.extra_info["rows"] = rows
        report.add("rows", *rows)
    report.add("refused", *[{"case": str(case), "variant": v, "why": refused[v]} for v in refused])
    assert not refused.keys() & {"fused", "eager"}, refused
