"""The stages of gpu_check.py that are about the fused convolution: what is seen first on a GPU.

Correctness first, by the tests marked `cuda` of the convolution's files; then each layer by every
implementation (`fastcnn bench --layers`); then whole steps, and inference, once under each rule of
`--conv`. A rule is one process's, so that these do not take turns: their ratios are of medians that
were measured one after the other, a minute apart.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastcnn.ops.plans import MODES

Result = dict[str, Any]
Bench = Callable[[str, float, list[str]], Result]
TEST_FILES = ("test_conv*.py", "test_plan*.py", "test_bench_conv*.py")
NETWORKS = ("vgg16", "cnn-a+norm", "cnn-a", "tiny-d")
BATCHES = ("1024", "128")
BASE = "vendor"  # the rule that the others are held against


def test_files(repository: Path) -> list[str]:
    """The convolution's tests, from the repository's root."""
    found = (path for pattern in TEST_FILES for path in (repository / "tests").glob(pattern))
    return sorted(str(path.relative_to(repository)) for path in found)


def layer_words(on_gpu: bool) -> list[str]:
    """Without torch.compile, which takes seconds a layer: `--backends eager compile` has it."""
    if not on_gpu:
        return ["--layers", "--arch", "cnn-a", "--batch-size", "4", "--rounds", "7"]
    words = ["--layers", "--rounds", "7", "--backends", "eager"]
    return [*words, "--arch", *NETWORKS, "--batch-size", *BATCHES]


def step_words(on_gpu: bool) -> list[str]:
    """Of our backends the one by which a run trains: a step as a CUDA graph."""
    return _words(on_gpu, ["eager", "graph"])


def inference_words(on_gpu: bool) -> list[str]:
    return ["--inference", *_words(on_gpu, ["eager", "fused", "graph"])]


def _words(on_gpu: bool, backends: list[str]) -> list[str]:
    if not on_gpu:
        return ["--arch", "mao-default", "--batch-size", "8", "--rounds", "7", "--threads", "1"]
    words = ["--backends", *backends, "--rounds", "7"]
    return [*words, "--arch", *NETWORKS, "--batch-size", *BATCHES]


def wrong_layers(content: Result) -> list[str]:
    """The convolutions of a table that were not timed, and why."""
    rows = [row for row in content.get("rows", []) if "why" in row]
    named = [f"{row['network']} {row['layer']} {row['backend']}: {row['why']}" for row in rows]
    return named[:5]


def under_each_rule(
    bench: Bench, name: str, budget_s: float, words: list[str], on_gpu: bool
) -> Result:
    """Compare the same under each rule; on a CPU, which has no fused convolution, not by that."""
    rules = [rule for rule in MODES if on_gpu or rule != "fused"]
    results = {
        rule: bench(f"{name}-{rule}", budget_s / len(rules), [*words, "--conv", rule])
        for rule in rules
    }
    states = {rule: result["state"] for rule, result in results.items()}
    bad = [f"--conv {rule} {state}" for rule, state in states.items() if state != "passed"]
    return {
        "state": "failed" if bad else "passed",
        "reason": ", ".join(bad),
        "seconds": round(sum(result["seconds"] for result in results.values()), 1),
        "contents": {rule: result["content"] for rule, result in results.items()},
        "ratios": ratios({rule: result["content"] for rule, result in results.items()}),
    }


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
