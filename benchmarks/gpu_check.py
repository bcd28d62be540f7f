"""All that needs a GPU, in one command of under ten minutes: build, tests, sanitizers, benchmarks.

    python benchmarks/gpu_check.py                  # all stages; exit code 0 only if all passed
    python benchmarks/gpu_check.py --stages build,tests
    python benchmarks/gpu_check.py --stages build,bench-small,loaders   # the reports' batch sizes
    python benchmarks/gpu_check.py --stages build,tests,loader-rivals   # with DALI, if installed
    python benchmarks/gpu_check.py --stages build,time-to-accuracy      # needs CIFAR-10
    python benchmarks/gpu_check.py --stages build,conv  # the fused convolution: tests, sanitizers,
                                                        # layers, steps, inference
    python benchmarks/gpu_check.py --device cpu     # the same steps without a GPU, to try them

Runs from a bare source tree and needs torch, numpy, ninja, pytest, pytest-benchmark and a CUDA
toolkit of torch's version. Test files that need more are left out and named; that fails the stage
only where they hold tests for a GPU. Every stage has its own time budget and log; one that fails is
recorded and the next one runs. Everything goes into one JSON file, gpu-check.json, written anew
after each stage, beside the logs: in --output, else in $OUT, else in .benchmarks/gpu-check.

Exit codes: 0 all passed, 1 a stage did not, 2 no GPU.
"""

import argparse
import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import REPOSITORY

sys.path.insert(0, str(REPOSITORY))  # of a bare source tree, and before another that is installed

import conv_stages

from fastcnn.bench.environment import environment
from fastcnn.bench.steps import NO_TIME

Result = dict[str, Any]
BUDGET_S = 585.0  # of all stages together
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
NETWORKS = "vgg16,resnet18,cnn-a,cnn-a+norm,murgolo-improved,mao-batchnorm"
RESERVE_S = 20.0  # of a benchmark's budget: for the case that is under way when it ends
RESERVE_SHARE = 0.2  # at most, of the time of `fastcnn bench`, lest a short one begin nothing
NAMES = ("network", "batch", "layer", "backend", "view")  # of a row of fastcnn bench
# what a step is compared under, the dearest to compile last
BACKENDS = "eager fused graph reduce-overhead compile fused-compile max-autotune"
SMALL_BACKENDS = "eager fused graph reduce-overhead"
SMALL_NETWORKS = "cnn-a cnn-c+norm mao-default murgolo-improved tiny-d vgg16"
BUILD = """
import dataclasses, json, logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from fastcnn import ops
from fastcnn.ops.native import build
built = build.ensure()
print(built.summary)
print((built.path.parent / "build.log").read_text("utf-8", "replace"))
ops.load()
found = {n: getattr(built, n) for n in ("archs", "cuda", "compiler", "build_seconds", "fresh")}
found |= {"cuda_kernels": ops.has_kernels("cuda"), "sources": built.sources}
open(sys.argv[1], "w").write(json.dumps(found))
"""


@dataclass
class Check:
    """The run: where it writes, what it runs on, when it must end."""

    device: str
    output: Path
    scratch: Path
    deadline: float

    def run(
        self, command: list[str], log: str, budget_s: float, variables: dict[str, str] | None = None
    ) -> tuple[str, float]:
        """Run a command, its output added to a log; return passed, failed or timeout, seconds."""
        start = time.monotonic()
        budget_s = max(1.0, min(budget_s, self.deadline - start))
        with open(self.output / log, "ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env=self._environment() | (variables or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                state = "failed" if process.wait(budget_s) else "passed"
            except subprocess.TimeoutExpired:
                state = "timeout"
            finally:
                _end(process)
        return state, round(time.monotonic() - start, 1)

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        own = {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "FASTCNN_BENCH_DEVICE": self.device}
        if self.device == "cpu":
            own |= {"CUDA_VISIBLE_DEVICES": "", "FASTCNN_CUDA_ARCHS": "none"}
        return {**os.environ, **own}

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End what the command left running: its process group, which it leads."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def build(check: Check, budget_s: float) -> Result:
    """Compile the library, or find it, and load it; on a GPU it must hold CUDA kernels."""
    written = check.scratch / "build.json"
    state, seconds = check.run([sys.executable, "-c", BUILD, str(written)], "build.log", budget_s)
    result: Result = {"state": state, "seconds": seconds, **_read(written)}
    if state == "passed" and check.on_gpu and not result.get("cuda_kernels"):
        result |= {"state": "failed", "reason": "the library has no CUDA kernels"}
    spilled = re.findall(r"([1-9]\d*) bytes spill stores", (check.output / "build.log").read_text())
    return result | {"kernels_that_spill": len(spilled)}


def tests(check: Check, budget_s: float) -> Result:
    """Run the tests marked `cuda`, from those files that can be imported here; those of the fused
    convolution have a stage of their own."""
    apart = [f"--ignore={name}" for name in conv_stages.test_files(REPOSITORY)]
    return _tests(check, budget_s, ["tests", *apart])


def conv_tests(check: Check, budget_s: float) -> Result:
    """Those of the fused convolution alone."""
    return _tests(check, budget_s, conv_stages.test_files(REPOSITORY))


def _tests(check: Check, budget_s: float, where: list[str]) -> Result:
    start = time.monotonic()
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "cuda"]
    collect = [*pytest, *where, "--collect-only", "-q", "--continue-on-collection-errors"]
    check.run(collect, "tests.log", budget_s / 2)
    files, errors = collected((check.output / "tests.log").read_text("utf-8", "replace"))
    result: Result = {"state": "failed", "seconds": 0.0, "files": files, "not_collected": errors}
    lost = [name for name in errors if "mark.cuda" in (REPOSITORY / name).read_text("utf-8")]
    if not files or lost:
        result["reason"] = f"cannot be imported: {', '.join(lost)}" if lost else "no tests found"
    if files:
        report = check.scratch / "tests.xml"
        command = [*pytest, *files, f"--junitxml={report}", "-q", "--durations=10"]
        left = budget_s - (time.monotonic() - start)
        state, _ = check.run(command, "tests.log", left, {"FASTCNN_TEST_CACHE": _cache(check)})
        result |= {"state": "failed" if lost else state, "counts": counted(report)}
        if check.on_gpu and state == "passed" and not result["counts"].get("passed"):
            result |= {"state": "failed", "reason": "every test was skipped"}
    return result | {"seconds": round(time.monotonic() - start, 1)}


def _cache(check: Check) -> str:
    """Return an empty cache for the tests that yet holds the library, lest they build it again."""
    from fastcnn.cache import cache_dir

    folder = check.scratch / "cache"
    folder.mkdir()
    (folder / "native").symlink_to(cache_dir() / "native")
    return str(folder)


def collected(text: str) -> tuple[list[str], dict[str, str]]:
    """Return the files of the tests that pytest lists, and the files that it could not import,
    each with the reason."""
    files = sorted(set(re.findall(r"^(\S+\.py)::", text, re.MULTILINE)))
    failed = dict.fromkeys(re.findall(r"^ERROR (\S+\.py)", text, re.MULTILINE), "")
    for part in re.split(r"^_+ ERROR collecting ", text, flags=re.MULTILINE)[1:]:
        reasons = re.findall(r"^E +(.*)$", part, re.MULTILINE)
        failed[part.split()[0]] = reasons[-1] if reasons else ""
    return files, failed


def counted(report: Path) -> dict[str, Any]:
    """Return how many tests a JUnit file says passed, failed and were skipped, and which failed."""
    if not report.exists():
        return {}
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcome = [{child.tag for child in case} & {"failure", "error", "skipped"} for case in cases]
    bad = [c for c, tags in zip(cases, outcome, strict=True) if tags & {"failure", "error"}]
    skipped = sum(tags == {"skipped"} for tags in outcome)
    names = [f"{case.get('classname')}::{case.get('name')}" for case in bad]
    passed = len(cases) - len(bad) - skipped
    return {"passed": passed, "failed": len(bad), "skipped": skipped, "failures": names[:50]}


def sanitizers(check: Check, budget_s: float) -> Result:
    """Run sanitize_ops.py by itself, then under each tool of compute-sanitizer, all at once."""
    return _sanitizers(check, budget_s, "sanitize_ops.py")


def conv_sanitizers(check: Check, budget_s: float) -> Result:
    """The same with sanitize_conv.py."""
    return _sanitizers(check, budget_s, "sanitize_conv.py")


def _sanitizers(check: Check, budget_s: float, name: str) -> Result:
    script = [sys.executable, str(REPOSITORY / "benchmarks" / name), check.device]
    start = time.monotonic()
    state, seconds = check.run(script, "sanitizers.log", budget_s / 2)
    result: Result = {"without_tool": {"state": state, "seconds": seconds}}
    program = sanitizer_program()
    if program is None or not check.on_gpu:
        why = "no GPU" if program else "compute-sanitizer is not installed"
        result |= {tool: {"state": "absent", "reason": why} for tool in TOOLS}
    else:
        result |= _under_every_tool(check, program, script, budget_s - (time.monotonic() - start))
    good = all(one["state"] in ("passed", "absent") for one in result.values())
    return {
        "state": "passed" if good else "failed",
        "seconds": round(time.monotonic() - start, 1),
        "tools": result,
    }


def sanitizer_program() -> str | None:
    from fastcnn.ops.native.toolchain import find_cuda

    cuda = find_cuda()
    beside = str(cuda.home / "bin" / "compute-sanitizer") if cuda else ""
    return shutil.which("compute-sanitizer") or shutil.which(beside)


def _under_every_tool(check: Check, program: str, script: list[str], budget_s: float) -> Result:
    from concurrent.futures import ThreadPoolExecutor

    # torch's cache of memory would hide accesses beyond a tensor
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

    def under(tool: str) -> Result:
        log = f"{tool}.log"
        command = [program, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        state, seconds = check.run([*command, *script], log, budget_s, variables)
        text = (check.output / log).read_text("utf-8", "replace")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
        if state == "passed" and not summary:
            state = "failed"  # it never began
        return {"state": state, "seconds": seconds, "summary": summary[-1] if summary else None}

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        results = dict(zip(TOOLS, pool.map(under, TOOLS), strict=True))
    with open(check.output / "sanitizers.log", "ab") as file:
        for tool in TOOLS:  # few files: a machine that lends GPUs may return no more than a handful
            file.write((check.output / f"{tool}.log").read_bytes())
            (check.output / f"{tool}.log").unlink()
    return results


def bench_quick(check: Check, budget_s: float) -> Result:
    """Time one case of each op, pool and mode, against eager torch and torch.compile."""
    return _bench(check, "bench-quick", budget_s, {"QUICK": "1"})


def bench_networks(check: Check, budget_s: float) -> Result:
    """Time every layer of the networks, at batch 1024 on a GPU."""
    if check.on_gpu:
        return _bench(check, "bench-networks", budget_s, {"BATCH": "1024", "NETWORKS": NETWORKS})
    return _bench(
        check, "bench-networks", budget_s, {"BATCH": "8", "NETWORKS": "cnn-a", "COMPILE": "0"}
    )


def bench_step(check: Check, budget_s: float) -> Result:
    """Compare whole training steps with plain PyTorch and torch.compile."""
    words = ["--backends", *BACKENDS.split(), "--rounds", "9"]
    words += ["--arch", "vgg16", "cnn-a+norm", "--batch-size", "1024"]
    if not check.on_gpu:
        words = ["--arch", "cnn-a", "--batch-size", "8", "--rounds", "7", "--threads", "1"]
        words += ["--backends", "eager", "fused"]
    return _fastcnn_bench(check, "bench-step", budget_s, words)


def bench_small(check: Check, budget_s: float) -> Result:
    """The same at a report's batch size, of a network of each of the reports."""
    words = ["--backends", *SMALL_BACKENDS.split(), "--rounds", "7", "--batch-size", "128"]
    words += ["--arch", *SMALL_NETWORKS.split()]
    if not check.on_gpu:
        words = ["--arch", "mao-default", "--batch-size", "8", "--rounds", "7", "--threads", "1"]
        words += ["--backends", "eager", "fused"]
    return _fastcnn_bench(check, "bench-small", budget_s, words)


def loaders(check: Check, budget_s: float) -> Result:
    """The loaders' rates against what steps consume."""
    words = ["--data-only", "--arch", "vgg16", "cnn-a+norm", "--batch-size", "1024"]
    if not check.on_gpu:
        words = ["--data-only", "--arch", "cnn-a", "--batch-size", "8", "--rounds", "7"]
    return _fastcnn_bench(check, "loaders", budget_s, words)


def loader_rivals(check: Check, budget_s: float) -> Result:
    """Our loaders, DALI's where it is installed, against torchvision's DataLoader."""
    written = check.scratch / "loader-rivals.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "bench_data.py")]
    command += ["--device", check.device, "--json", str(written)]
    if not check.on_gpu:
        command += ["--only", "cifar", "--rounds", "1", "--images", "64", "--seconds", "0.05"]
    state, seconds = check.run(command, "loader-rivals.log", budget_s)
    content = _read(written)
    if state == "passed" and not content.get("results"):
        state = "failed"
    return {"state": state, "seconds": seconds, "content": content}


def time_to_accuracy(check: Check, budget_s: float) -> Result:
    """Train vgg16 to 94 % on the images of FASTCNN_BENCH_DATA, else CIFAR-10; five seeds."""
    words = ["--time-to-accuracy", "0.94", "--arch", "vgg16", "--recipe", "fast", "--seeds", "5"]
    words += ["--data", os.environ.get("FASTCNN_BENCH_DATA", "cifar10")]
    if not check.on_gpu:
        words = [
            "--time-to-accuracy",
            "0.1",
            "--arch",
            "cnn-a",
            "--data",
            "digits",
            "--epochs",
            "1",
            "--seeds",
            "1",
        ]
    return _fastcnn_bench(check, "time-to-accuracy", budget_s, words)


def conv_layers(check: Check, budget_s: float) -> Result:
    """Each convolution by every implementation, with the plan that a run takes."""
    bench = functools.partial(_fastcnn_bench, check)
    return conv_stages.layers(bench, budget_s, check.on_gpu)


def conv_steps(check: Check, budget_s: float) -> Result:
    """Whole training steps under each rule that convolutions are chosen by."""
    bench = functools.partial(_fastcnn_bench, check)
    words = conv_stages.step_words(check.on_gpu)
    return conv_stages.under_each_rule(bench, "conv-steps", budget_s, words, check.on_gpu)


def conv_inference(check: Check, budget_s: float) -> Result:
    """The same of inference."""
    bench = functools.partial(_fastcnn_bench, check)
    words = conv_stages.inference_words(check.on_gpu)
    return conv_stages.under_each_rule(bench, "conv-inference", budget_s, words, check.on_gpu)


def _fastcnn_bench(check: Check, name: str, budget_s: float, words: list[str]) -> Result:
    written = check.scratch / f"{name}.json"
    left = min(budget_s, check.deadline - time.monotonic())
    to_begin = str(max(1.0, left - min(RESERVE_S, RESERVE_SHARE * left)))
    command = [sys.executable, "-m", "fastcnn.bench", "--quiet", "--device", check.device]
    command += ["--budget", to_begin, "--json", str(written), *words]
    state, seconds = check.run(command, f"{name}.log", budget_s)
    content = _read(written)
    rows = content.get("rows", [])
    # a rival that fails on a machine is told; ours must not
    lost = [
        r for r in rows if r.get("backend") in conv_stages.OURS and r.get("why", NO_TIME) != NO_TIME
    ]
    if state == "passed" and (lost or not any("why" not in row for row in rows)):
        state = "failed"
    return {"state": state, "seconds": seconds, "content": content}


def _bench(check: Check, name: str, budget_s: float, options: dict[str, str]) -> Result:
    written = check.scratch / f"{name}.json"
    left = min(budget_s, check.deadline - time.monotonic())
    options = {"BUDGET_S": str(max(1.0, left - RESERVE_S)), "JSON": str(written), **options}
    variables = {f"FASTCNN_BENCH_{key}": value for key, value in options.items()}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--benchmark-enable"]
    command += [str(REPOSITORY / "benchmarks" / "bench_ops.py")]
    state, seconds = check.run(command, f"{name}.log", budget_s, variables)
    content = _read(written)
    if state == "passed" and not content.get("rows"):
        state = "failed"
    return {"state": state, "seconds": seconds, "content": content}


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}


# name, function, seconds that it may take
STAGES: dict[str, tuple[Callable[[Check, float], Result], float]] = {
    "build": (build, 90),
    "tests": (tests, 110),
    "sanitizers": (sanitizers, 90),
    "bench-quick": (bench_quick, 45),
    "bench-networks": (bench_networks, 50),
    "bench-step": (bench_step, 200),
    "bench-small": (bench_small, 330),
    "loaders": (loaders, 90),
    "loader-rivals": (loader_rivals, 300),
    "time-to-accuracy": (time_to_accuracy, 300),
    "conv-tests": (conv_tests, 95),
    "conv-sanitizers": (conv_sanitizers, 70),
    "conv-layers": (conv_layers, 110),
    "conv-steps": (conv_steps, 120),
    "conv-inference": (conv_inference, 100),
}
GROUPS = {"conv": [name for name in STAGES if name.startswith("conv-")]}
# the time of all others; time-to-accuracy needs CIFAR-10 as well
NAMED_ALONE = ("bench-small", "loaders", "loader-rivals", "time-to-accuracy", *GROUPS["conv"])
UNASKED = [name for name in STAGES if name not in NAMED_ALONE]
NEED_THE_LIBRARY = [name for name in STAGES if name not in ("build", "tests")]


def run_stages(check: Check, names: list[str], scale: float) -> dict[str, Any]:
    """Run the stages in order and write the JSON file after each; scale: of the time budgets."""
    content: dict[str, Any] = {"device": check.device, **environment(torch.device(check.device))}
    content |= {"passed": False, "stages": {}}
    for name in names:
        function, budget_s = STAGES[name]
        built = content["stages"].get("build", {"state": "passed"})["state"]
        if name in NEED_THE_LIBRARY and built != "passed":
            result: Result = {"state": "skipped", "seconds": 0.0, "reason": "there is no library"}
        elif check.deadline - time.monotonic() < 1:
            result = {"state": "skipped", "seconds": 0.0, "reason": "no time was left"}
        else:
            result = _guarded(function, check, budget_s * scale)
        content["stages"][name] = result
        content["passed"] = all(one["state"] == "passed" for one in content["stages"].values())
        (check.output / "gpu-check.json").write_text(json.dumps(content, indent=1), "utf-8")
        print(line_of(name, result), flush=True)
    return content


def _guarded(function: Callable[[Check, float], Result], check: Check, budget_s: float) -> Result:
    start = time.monotonic()
    try:
        return function(check, budget_s)
    except Exception as error:  # recorded, and the next stage runs
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"state": "failed", "seconds": round(time.monotonic() - start, 1), "reason": reason}


def line_of(name: str, result: Result) -> str:
    """Return a stage's outcome in a line."""
    words = [f"{name:<15} {result['state']:<8} {result['seconds']:6.1f} s"]
    words += [f"{key} {result[key]}" for key in ("reason", "archs") if result.get(key)]
    if counts := result.get("counts"):
        words.append(", ".join(f"{counts[key]} {key}" for key in ("passed", "failed", "skipped")))
    if names := result.get("not_collected"):
        words.append(f"not collected: {', '.join(names)}")
    words += [f"{tool} {one['state']}" for tool, one in result.get("tools", {}).items()]
    content = result.get("content") or {}
    words += content.get("targets", [])
    if content.get("rows"):
        words += timed(content)
    if compiled := result.get("compiled"):
        words += [f"with compile: {word}" for word in timed(compiled)]
    target = f" (target {result['target']})" if result.get("target") else ""
    ratios = result.get("to_eager", {}).items()
    words += [f"{name}: {ratio:.2f} times as fast as eager{target}" for name, ratio in ratios]
    ratios = result.get("ratios", {}).items()
    words += [f"{name}: {ratio:.2f} times as fast as --conv vendor" for name, ratio in ratios]
    return "; ".join(words)


def timed(content: dict[str, Any]) -> list[str]:
    """What of a benchmark was timed and what was not."""
    if "mode" in content:
        named = [" ".join(str(row[k]) for k in row if k in NAMES) for row in content["rows"]]
        bad = [name for name, row in zip(named, content["rows"], strict=True) if "why" in row]
        words = [f"{len(named) - len(bad)} rows, {len(content['left_out'])} left out"]
        return words + [f"not timed: {name}" for name in bad]
    cases = len({row["case"] for row in content["rows"]})
    words = [f"{cases} cases timed, {len(content['left_out'])} left out"]
    return words + [f"refused: {one['case']} {one['variant']}" for one in content["refused"]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    named = f"default: %(default)s; also {', '.join((*NAMED_ALONE, *GROUPS))}"
    parser.add_argument("--stages", default=",".join(UNASKED), help=named)
    parser.add_argument("--output", type=Path, help="folder of the JSON file and the logs")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds (%(default)g)")
    options = parser.parse_args()
    names = [n for word in options.stages.split(",") for n in GROUPS.get(word, [word])]
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(f"--stages: no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch finds no GPU; `--device cpu` tries the steps without one")
        return 2
    folder = options.output or Path(os.environ.get("OUT") or REPOSITORY / ".benchmarks/gpu-check")
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.log"):
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        deadline = time.monotonic() + options.budget
        check = Check(options.device, folder, Path(scratch), deadline)
        content = run_stages(check, names, options.budget / BUDGET_S)
    print(f"{'passed' if content['passed'] else 'FAILED'}: {folder / 'gpu-check.json'}")
    return 0 if content["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
