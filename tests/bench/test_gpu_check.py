"""benchmarks/gpu_check.py: stages that fail, hang or find nothing; what it reads from logs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import conv_stages
import gpu_check
import sanitize_conv

REPOSITORY = Path(__file__).resolve().parents[2]
COLLECTED = """\
tests/ops/test_ops.py::test_values[a-cuda]
tests/ops/test_ops.py::test_values[b-cuda]
tests/train/step/test_cuda.py::test_run
==================================== ERRORS ====================================
______________________ ERROR collecting tests/commands/test_cli.py ______________________
tests/commands/test_cli.py:12: in <module>
    from fastcnn.cli import main
E   ModuleNotFoundError: No module named 'jsonargparse'
=========================== short test summary info ============================
ERROR tests/commands/test_cli.py
"""
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_ops" name="a"/>
<testcase classname="tests.test_ops" name="b"><failure message="x"/></testcase>
<testcase classname="tests.test_ops" name="c"><skipped/></testcase>
<testcase classname="tests.test_ops" name="d"><error message="x"/></testcase>
</testsuite></testsuites>"""


@pytest.fixture
def check(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return gpu_check.Check("cpu", tmp_path, scratch, time.monotonic() + 60)


@pytest.mark.full
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu_check.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stdout.splitlines()) == 1
    assert "no GPU" in done.stdout


@pytest.mark.full
def test_the_tree_that_it_lies_in_is_checked(tmp_path):
    code = "import gpu_check, fastcnn; print(fastcnn.__file__)"
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'benchmarks')!r}); {code}"
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=bare, capture_output=True, text=True)
    assert done.stdout.strip() == str(REPOSITORY / "fastcnn" / "__init__.py"), done.stderr


def test_commands_are_logged_and_ended(check):
    assert check.run(["true"], "a.log", 10)[0] == "passed"
    assert check.run(["sh", "-c", "echo told; exit 3"], "a.log", 10)[0] == "failed"
    log = (check.output / "a.log").read_text()
    assert log == "$ true\n$ sh -c echo told; exit 3\ntold\n"
    state, seconds = check.run(["sh", "-c", "sleep 300 & echo $!; wait"], "b.log", 1)
    assert state == "timeout"
    assert seconds < 10
    child = int((check.output / "b.log").read_text().splitlines()[-1])
    deadline = time.monotonic() + 10  # until the system has ended what was killed
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _runs(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_failed_stage_is_recorded_and_the_next_runs(check, monkeypatch, capsys):
    def broken(check, budget_s):
        raise ValueError("of this\nkind")

    def good(check, budget_s):
        return {"state": "passed", "seconds": 1.0}

    stages = {"tests": (broken, 10), "build": (good, 10), "bench-quick": (good, 10)}
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    content = gpu_check.run_stages(check, ["tests", "build", "bench-quick"], 1.0)
    assert not content["passed"]
    assert content["stages"]["tests"]["reason"] == "ValueError: of this kind"
    assert content["stages"]["bench-quick"]["state"] == "passed"
    assert json.loads((check.output / "gpu-check.json").read_text()) == content
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_without_a_library_nothing_is_timed(check, monkeypatch):
    def failing(check, budget_s):
        return {"state": "failed", "seconds": 1.0}

    monkeypatch.setattr(gpu_check, "STAGES", dict.fromkeys(gpu_check.STAGES, (failing, 10)))
    content = gpu_check.run_stages(check, list(gpu_check.STAGES), 1.0)
    states = [one["state"] for one in content["stages"].values()]
    assert states == ["failed", "failed", *["skipped"] * (len(states) - 2)]


def test_files_that_cannot_be_imported_are_named():
    files, errors = gpu_check.collected(COLLECTED)
    assert files == ["tests/ops/test_ops.py", "tests/train/step/test_cuda.py"]
    reason = "ModuleNotFoundError: No module named 'jsonargparse'"
    assert errors == {"tests/commands/test_cli.py": reason}


def test_outcomes_are_counted(tmp_path):
    path = tmp_path / "tests.xml"
    path.write_text(JUNIT)
    assert gpu_check.counted(path) == {
        "passed": 1,
        "failed": 2,
        "skipped": 1,
        "failures": ["tests.test_ops::b", "tests.test_ops::d"],
    }
    assert gpu_check.counted(tmp_path / "none.xml") == {}


def test_sanitizers_that_are_not_there_are_absent(check, monkeypatch):
    monkeypatch.setattr(gpu_check.Check, "run", lambda *_: ("passed", 1.0))
    result = gpu_check.sanitizers(check, 10)
    assert result["state"] == "passed"
    assert {result["tools"][tool]["state"] for tool in gpu_check.TOOLS} == {"absent"}


@pytest.mark.parametrize(
    ("code", "says", "state"),
    [
        (0, "ERROR SUMMARY: 0 errors", "passed"),
        (86, "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", "failed"),
        (0, "", "failed"),
    ],
)
def test_a_sanitizers_word_counts(check, tmp_path, code, says, state):
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho '========= {says}'\nexit {code}\n")
    program.chmod(0o755)
    found = gpu_check._under_every_tool(check, str(program), ["true"], 30)
    assert found.keys() == set(gpu_check.TOOLS)
    assert (found["racecheck"]["state"], found["racecheck"]["summary"]) == (state, says or None)
    assert not (check.output / "racecheck.log").exists()


def test_all_stages_fit_into_ten_minutes():
    budgets = [gpu_check.STAGES[name][1] for name in gpu_check.UNASKED]
    assert sum(budgets) <= gpu_check.BUDGET_S < 600
    assert "time-to-accuracy" not in gpu_check.UNASKED
    assert "bench-step" in gpu_check.UNASKED
    assert not set(gpu_check.GROUPS["conv"]) & set(gpu_check.UNASKED)


def test_the_convolution_and_its_build_fit_into_ten_minutes():
    names = ["build", *gpu_check.GROUPS["conv"]]
    assert names[1] == "conv-tests"  # before anything is timed
    assert sum(gpu_check.STAGES[name][1] for name in names) <= gpu_check.BUDGET_S


def test_the_convolutions_tests_are_found():
    files = conv_stages.test_files(REPOSITORY)
    found = {Path(file).name for file in files}
    assert {"test_conv_measurement.py", "test_bench_conv_layers.py"} <= found
    assert all((REPOSITORY / file).exists() for file in files)


def rates_of(**images_per_s):
    rows = [
        {"network": "n", "batch": 8, "backend": name, "images_per_s": {"median": rate}}
        for name, rate in images_per_s.items()
    ]
    return {"mode": "throughput", "left_out": [], "rows": rows}


def test_rules_are_held_against_the_vendors_convolutions():
    contents = {
        "auto": rates_of(eager=9.0, fused=3.0, graph=4.0),
        "fused": rates_of(fused=1.0),
        "vendor": rates_of(eager=1.0, fused=2.0),
    }
    assert conv_stages.ratios(contents) == {"n 8 fused auto": 1.5, "n 8 fused fused": 0.5}
    assert conv_stages.ratios({"auto": {}, "vendor": {}}) == {}


@pytest.mark.parametrize("failing", [None, "fused"])
def test_every_rule_is_run_and_one_that_fails_is_named(failing):
    told = []

    def bench(name, budget_s, words):
        told.append((name, budget_s, words[-1]))
        state = "failed" if words[-1] == failing else "passed"
        return {"state": state, "seconds": 2.0, "content": rates_of(fused=1.0)}

    result = conv_stages.under_each_rule(bench, "conv-steps", 30.0, [], on_gpu=True)
    # what a rule leaves of its time is the others'
    assert told == [
        ("conv-steps-auto", 10.0, "auto"),
        ("conv-steps-fused", 14.0, "fused"),
        ("conv-steps-vendor", 26.0, "vendor"),
    ]
    assert result["seconds"] == 6.0
    assert result["state"] == ("failed" if failing else "passed")
    assert result["reason"] == ("--conv fused: failed" if failing else "")
    assert "n 8 fused auto: 1.00 times as fast as --conv vendor" in gpu_check.line_of(
        "conv-steps", result
    )


def test_a_layer_that_is_wrong_fails_its_stage(check, monkeypatch):
    def run(self, command, log, budget_s):
        path = Path(command[command.index("--json") + 1])
        good = {"network": "n", "batch": 1, "layer": "conv1", "part": "inference"}
        bad = {"network": "n", "batch": 1, "layer": "conv2", "backend": "plan_parts", "why": "off"}
        path.write_text(json.dumps({"mode": "layers", "rows": [good, bad], "left_out": []}))
        return "passed", 1.0

    monkeypatch.setattr(gpu_check.Check, "run", run)
    result = gpu_check.conv_layers(check, 60)
    assert (result["state"], result["reason"]) == ("failed", "n 1 conv2 plan_parts: off")


def test_a_layers_rival_that_fails_is_named_and_no_fault(check, monkeypatch):
    def run(self, command, log, budget_s):
        path = Path(command[command.index("--json") + 1])
        named = {"network": "n", "batch": 1, "layer": "conv1"}
        wrong = [
            {**named, "backend": rival, "view": "inference_part", "why": "refused"}
            for rival in ("eager", "compile", "cudnn")
        ]
        rows = [{**named, "part": "inference"}, *wrong]
        path.write_text(json.dumps({"mode": "layers", "rows": rows, "left_out": []}))
        return "passed", 1.0

    monkeypatch.setattr(gpu_check.Check, "run", run)
    check.device = "cuda"
    result = gpu_check.conv_layers(check, 60)
    assert (result["state"], result["reason"]) == ("passed", "")
    line = gpu_check.line_of("conv-layers", result)
    assert "not timed: n 1 conv1 cudnn inference_part" in line
    assert "with compile: not timed: n 1 conv1 compile inference_part" in line


@pytest.mark.parametrize("compiling", ["failed", "timeout"])
def test_layers_whose_compilation_does_not_end_fail_their_stage(compiling):
    told = []

    def bench(name, budget_s, words):
        told.append((name, budget_s, words))
        state = compiling if "compile" in words else "passed"
        return {"state": state, "seconds": 20.0, "content": {}}

    result = conv_stages.layers(bench, 100.0, on_gpu=True)
    assert (result["state"], result["reason"]) == ("failed", f"with compile: {compiling}")
    assert result["seconds"] == 40.0
    assert [(name, budget_s) for name, budget_s, _ in told] == [
        ("conv-layers", 60.0),
        ("conv-layers-compile", 80.0),  # and what the first has left
    ]
    first, second = (words[words.index("--backends") + 1 :] for _, _, words in told)
    assert (first[:2], second[:3]) == (["eager", "--arch"], ["eager", "compile", "--arch"])
    assert set(second[3:]) == {"cnn-a+norm", "--batch-size", "1024"}


@pytest.mark.parametrize("stage", ["conv_layers", "conv_steps", "conv_inference"])
@pytest.mark.parametrize("how", ["left out", "eager", "graph"])
def test_what_there_was_no_time_for_fails_a_stage_of_the_convolution(
    check, monkeypatch, stage, how
):
    def run(self, command, log, budget_s):
        path = Path(command[command.index("--json") + 1])
        named = {"network": "n", "batch": 8}
        rows = [
            {**named, "backend": backend} | ({"why": gpu_check.NO_TIME} if how == backend else {})
            for backend in ("eager", "graph")
        ]
        left_out = ["n batch 8 graph"] * (how == "left out")
        path.write_text(json.dumps({"mode": "throughput", "rows": rows, "left_out": left_out}))
        return "passed", 1.0

    monkeypatch.setattr(gpu_check.Check, "run", run)
    result = getattr(gpu_check, stage)(check, 60)
    assert result["state"] == "failed"
    name = "n batch 8 graph" if how == "left out" else f"n 8 {how}"
    assert f"{name}: no time was left" in result["reason"]


def test_many_that_were_not_timed_are_counted():
    content = {"left_out": [f"n{i}" for i in range(8)]}
    named = [f"n{i}: no time was left" for i in range(5)]
    assert conv_stages.untimed(content) == [*named, "3 more"]


def test_ratios_to_eager_are_of_one_process_and_told_beside_the_target():
    def bench(name, budget_s, words):
        rows = [
            {"network": "n", "batch": 8, "backend": "eager", "times_as_fast_as": {}},
            {
                **{"network": "n", "batch": 8, "backend": "graph"},
                "times_as_fast_as": {"eager": {"one process": {"median": 1.62}}},
            },
        ]
        content = {"mode": "inference", "left_out": [], "rows": rows}
        return {"state": "passed", "seconds": 2.0, "content": content}

    for words, target in ((["--inference"], " (target 1.5)"), ([], "")):
        result = conv_stages.under_each_rule(bench, "conv", 30.0, words, on_gpu=True)
        assert result["to_eager"] == dict.fromkeys(
            ("n 8 graph auto", "n 8 graph fused", "n 8 graph vendor"), 1.62
        )
        told = gpu_check.line_of("conv", result).split("; ")
        assert f"n 8 graph fused: 1.62 times as fast as eager{target}" in told


@pytest.mark.parametrize("stage", ["conv-layers", "conv-steps", "conv-inference"])
def test_short_stages_of_the_convolution_have_time_to_begin(check, monkeypatch, stage):
    begun = []

    def run(self, command, log, budget_s):
        begun.append(float(command[command.index("--budget") + 1]))
        return "passed", budget_s

    monkeypatch.setattr(gpu_check.Check, "run", run)
    check.device, check.deadline = "cuda", time.monotonic() + 600
    function, budget_s = gpu_check.STAGES[stage]
    function(check, budget_s)
    assert min(begun) >= 25
    assert sum(begun) == pytest.approx(0.8 * budget_s, rel=0.05)


def test_the_convolutions_steps_are_few_enough():
    for words, networks in (
        (conv_stages.step_words(True), ["vgg16", "cnn-a+norm"]),
        (conv_stages.inference_words(True), ["vgg16", "cnn-a"]),
    ):
        text = " ".join(words)
        assert f"--arch {' '.join(networks)} --batch-size 1024" in text
        assert text.endswith("1024")
        assert "--backends eager graph --" in text


@pytest.mark.full
def test_layers_are_told_without_a_gpu(check, library):
    result = gpu_check.conv_layers(check, 60)
    assert result["state"] == "passed"
    assert {"product", "chain forward"} <= {row["part"] for row in result["content"]["rows"]}


def test_a_group_of_stages_is_named_by_one_word(tmp_path, monkeypatch):
    told = []

    def run_stages(check, names, scale):
        told.extend(names)
        return {"passed": True}

    monkeypatch.setattr(gpu_check, "run_stages", run_stages)
    words = ["--device", "cpu", "--stages", "build,conv", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words])
    assert gpu_check.main() == 0
    assert told == [
        "build",
        "conv-tests",
        "conv-sanitizers",
        "conv-layers",
        "conv-steps",
        "conv-inference",
    ]


@pytest.mark.full
def test_steps_are_compared_without_a_gpu(check, library):
    result = gpu_check.bench_step(check, 60)
    assert result["state"] == "passed"
    assert [row["backend"] for row in result["content"]["rows"]] == ["eager", "fused"]
    line = gpu_check.line_of("bench-step", result)
    assert "2 rows, 0 left out" in line


def test_a_comparison_without_rows_has_failed(check, monkeypatch):
    def run(self, command, log, budget_s):
        assert command[2] == "fastcnn.bench"
        path = Path(command[command.index("--json") + 1])
        rows = [{"network": "n", "batch": 1, "backend": "graph", "why": "x"}]
        path.write_text(json.dumps({"mode": "throughput", "rows": rows, "left_out": []}))
        return "passed", 1.0

    monkeypatch.setattr(gpu_check.Check, "run", run)
    result = gpu_check.bench_step(check, 60)
    assert result["state"] == "failed"
    assert "not timed: n 1 graph" in gpu_check.line_of("bench-step", result)


@pytest.mark.parametrize(
    ("backend", "why", "state"),
    [
        ("graph", "cannot be captured", "failed"),
        ("fused", "loss errs by 3", "failed"),
        ("graph", "no time was left", "passed"),
        ("max-autotune", "the compiler's fault", "passed"),
    ],
)
def test_a_comparison_without_ours_has_failed(check, monkeypatch, backend, why, state):
    def run(self, command, log, budget_s):
        path = Path(command[command.index("--json") + 1])
        common = {"network": "n", "batch": 1}
        rows = [{**common, "backend": "eager"}, {**common, "backend": backend, "why": why}]
        path.write_text(json.dumps({"mode": "throughput", "rows": rows, "left_out": []}))
        return "passed", 1.0

    monkeypatch.setattr(gpu_check.Check, "run", run)
    assert gpu_check.bench_step(check, 60)["state"] == state


@pytest.mark.parametrize("results", [{}, {"cifar": {}}])
def test_loaders_without_figures_have_failed(check, monkeypatch, results):
    from bench_data import options_of

    def run(self, command, log, budget_s):
        options = options_of(command[2:])
        assert options.device == check.device
        Path(options.json).write_text(json.dumps({"results": results}))
        return "passed", 1.0

    monkeypatch.setattr(gpu_check.Check, "run", run)
    assert gpu_check.loader_rivals(check, 60)["state"] == ("passed" if results else "failed")


@pytest.mark.parametrize("device", ["cpu", "cuda"], ids=["on a CPU", "on a GPU"])
def test_the_words_of_each_comparison_are_options(check, monkeypatch, device):
    from fastcnn.bench.options import settings_of
    from fastcnn.cli import parse

    told = []

    def run(self, command, log, budget_s):
        told.append(command)
        return "failed", 1.0

    monkeypatch.setattr(gpu_check.Check, "run", run)
    check.device = device
    gpu_check.bench_step(check, 60)
    gpu_check.bench_small(check, 60)
    gpu_check.loaders(check, 60)
    gpu_check.time_to_accuracy(check, 60)
    gpu_check.conv_layers(check, 60)
    gpu_check.conv_steps(check, 60)
    gpu_check.conv_inference(check, 60)
    steps, small, rates, times, layers, *rest = (
        settings_of(parse(["bench", *["modern" if w == "fast" else w for w in command[3:]]])[1])
        for command in told
    )
    assert steps.own.budget == pytest.approx(0.8 * 60, abs=1)
    assert small.own.budget == pytest.approx(0.8 * 60, abs=1)
    assert rates.own.data_only
    assert times.own.time_to_accuracy
    assert layers.own.layers
    compiled = rest[: device == "cuda"]
    assert [one.own.backends for one in compiled] == [["eager", "compile"]] * len(compiled)
    ruled = rest[len(compiled) :]
    rules = ["auto", "fused", "vendor"] if device == "cuda" else ["auto", "vendor"]
    assert [one.config.run.conv for one in ruled] == rules * 2
    assert [one.own.inference for one in ruled] == sorted([False, True] * len(rules))
    assert steps.config.run.device == device


def test_the_convolutions_tests_run_in_their_own_stage_alone(check, monkeypatch):
    asked = []
    monkeypatch.setattr(gpu_check, "_tests", lambda check, budget_s, where: asked.append(where))
    gpu_check.tests(check, 1)
    gpu_check.conv_tests(check, 1)
    assert "--ignore=tests/ops/conv/test_conv_cuda.py" in asked[0]
    assert "tests/ops/conv/test_conv_cuda.py" in asked[1]


def test_the_convolutions_script_for_sanitizers_judges_its_results(library, monkeypatch):
    monkeypatch.setattr(sanitize_conv, "CASES", sanitize_conv.CASES[:6])
    assert sanitize_conv.main("cpu") == 0
    right = sanitize_conv.torchs

    def wrong(case, t):
        y, *rest = right(case, t)
        return (y * 1.3, *rest)

    monkeypatch.setattr(sanitize_conv, "torchs", wrong)
    assert sanitize_conv.main("cpu") == 1
