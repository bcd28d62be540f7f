"""The stages of gpu_check.py that are about the fused convolution: what is seen first on a GPU.

Correctness first, by the tests marked `cuda` of the convolution's files; then each layer by every
implementation (`fastcnn bench --layers`), torch.compile for one network, since it takes seconds a
layer; then whole steps, and inference, once under each rule of `--conv`. A rule is one process's,
so that these do not take turns: their ratios are of medians that were measured one after the other,
a minute apart. Those to eager torch are of rounds in one process.

What was to be timed and was not, for want of time, fails a stage.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcnn.bench.kernels.conv_layers import PLAIN
from fastcnn.bench.options import RIVALS
from fastcnn.bench.steps import NO_TIME
from fastcnn.bench.throughput import ONE
from fastcnn.ops.conv_autotune import MODES

Result = dict[str, Any]
Bench = Callable[[str, float, list[str]], Result]
TEST_FILES = ("test_conv*.py", "test_plan*.py", "test_bench_conv*.py")
NETWORKS = ("vgg16", "cnn-a+norm", "cnn-a", "tiny-d")  # of the layers
BATCHES = ("1024", "128")
COMPILED = "cnn-a+norm"  # whose layers torch.compile has as well, at the first of BATCHES
COMPILING_SHARE = 0.4  # of the layers' time
OF_STEPS = ("vgg16", "cnn-a+norm")
OF_INFERENCE = ("vgg16", "cnn-a")
INFERENCE_TARGET = 1.5  # times as fast as eager
BASE = "vendor"  # the rule that the others are held against
OURS = ("fused", "graph")
NOT_OURS = {*RIVALS, *PLAIN}
MOST_NAMED = 5


def test_files(repository: Path) -> list[str]:
    """The convolution's tests, from the repository's root."""
    found = (path for pattern in TEST_FILES for path in (repository / "tests").rglob(pattern))
    return sorted(str(path.relative_to(repository)) for path in found)


def layer_words(on_gpu: bool) -> list[str]:
    """Of every layer, without torch.compile."""
    words = ["--layers", "--rounds", "7", "--backends", "eager"]
    if not on_gpu:
        return [*words, "--arch", "cnn-a", "--batch-size", "4"]
    return [*words, "--arch", *NETWORKS, "--batch-size", *BATCHES]


def compiled_words() -> list[str]:
    """Of the layers that torch.compile has too."""
    words = ["--layers", "--rounds", "7", "--backends", "eager", "compile"]
    return [*words, "--arch", COMPILED, "--batch-size", BATCHES[0]]


def step_words(on_gpu: bool) -> list[str]:
    """Of our backends the one by which a run trains: a step as a CUDA graph."""
    return _words(on_gpu, OF_STEPS)


def inference_words(on_gpu: bool) -> list[str]:
    return ["--inference", *_words(on_gpu, OF_INFERENCE)]


def _words(on_gpu: bool, networks: tuple[str, ...]) -> list[str]:
    if not on_gpu:
        return ["--arch", "mao-default", "--batch-size", "8", "--rounds", "7", "--threads", "1"]
    words = ["--backends", "eager", "graph", "--rounds", "7"]
    return [*words, "--arch", *networks, "--batch-size", BATCHES[0]]


def layers(bench: Bench, budget_s: float, on_gpu: bool) -> Result:
    """Time every layer, then on a GPU those of one network with torch.compile."""
    first_s = budget_s * (1 - COMPILING_SHARE) if on_gpu else budget_s
    result = bench("conv-layers", first_s, layer_words(on_gpu))
    wrong = _faults(result)
    if on_gpu:
        left_s = budget_s - result["seconds"]
        compiled = bench("conv-layers-compile", left_s, compiled_words())
        wrong += [f"with compile: {fault}" for fault in _faults(compiled)]
        seconds = round(result["seconds"] + compiled["seconds"], 1)
        result = result | {"seconds": seconds, "compiled": compiled["content"]}
    return result | _outcome(wrong)


def untimed(content: Result) -> list[str]:
    """What of a benchmark was not timed and should have been: all but the rivals that refuse."""
    named = [f"{what}: no time was left" for what in content.get("left_out", [])]
    for row in content.get("rows", []):
        why = row.get("why")
        if why and (why == NO_TIME or row["backend"] not in NOT_OURS):
            keys = ("network", "batch", "layer", "backend")
            named.append(f"{' '.join(str(row[key]) for key in keys if key in row)}: {why}")
    more = [f"{len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
    return named[:MOST_NAMED] + more


def _faults(result: Result) -> list[str]:
    """What was not timed; without that the state of a benchmark that did not pass."""
    return untimed(result["content"]) or [result["state"]] * (result["state"] != "passed")


def _outcome(faults: list[str]) -> Result:
    return {"state": "failed" if faults else "passed", "reason": "; ".join(faults)}


def under_each_rule(
    bench: Bench, name: str, budget_s: float, words: list[str], on_gpu: bool
) -> Result:
    """Compare the same under each rule; on a CPU, which has no fused convolution, not by that. A
    rule that needs less than its share of the time leaves the rest to those that follow."""
    rules = [rule for rule in MODES if on_gpu or rule != "fused"]
    results: dict[str, Result] = {}
    faults: list[str] = []
    for rule in rules:
        left_s = budget_s - sum(result["seconds"] for result in results.values())
        share_s = left_s / (len(rules) - len(results))
        results[rule] = bench(f"{name}-{rule}", share_s, [*words, "--conv", rule])
        faults += [f"--conv {rule}: {fault}" for fault in _faults(results[rule])]
    contents = {rule: result["content"] for rule, result in results.items()}
    return {
        **_outcome(faults),
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "contents": contents,
        "ratios": ratios(contents),
        "to_eager": ratios_to_eager(contents),
        "target": INFERENCE_TARGET if "--inference" in words else None,
    }


def ratios_to_eager(contents: dict[str, Result]) -> dict[str, float]:
    """How many times as fast as eager torch a backend of ours is in the same process, by network,
    batch, backend and rule; of a GPU."""
    found = {}
    for rule, content in contents.items():
        for row in content.get("rows", []):
            pairs = row.get("times_as_fast_as", {}).get("eager", {})
            if ONE in pairs and row["backend"] in OURS:
                case = (row["network"], str(row["batch"]), row["backend"], rule)
                found[" ".join(case)] = round(pairs[ONE]["median"], 3)
    return found


def ratios(contents: dict[str, Result]) -> dict[str, float]:
    """How many times as fast a rule is as the vendor's convolutions, by network, batch, backend and
    rule; of our own backends, where both have images/s."""
    found = {}
    base = _rates(contents.get(BASE, {}))
    for rule, content in contents.items():
        for case, rate in _rates(content).items():
            if rule != BASE and case in base and "eager" not in case:
                found[" ".join((*case, rule))] = round(rate / base[case], 3)
    return found


def _rates(content: Result) -> dict[tuple[str, ...], float]:
    """Images/s by network, batch and backend."""
    rates = {}
    for row in content.get("rows", []):
        if figures := row.get("images_per_s"):
            case = tuple(str(row[key]) for key in ("network", "batch", "backend"))
            rates[case] = figures["median"] if isinstance(figures, dict) else figures
    return rates
