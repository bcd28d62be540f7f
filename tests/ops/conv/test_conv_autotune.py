"""Which implementation a convolution layer gets: the rule, the cache, and when nothing is measured.

The measurement itself is that of test_conv_measurement.py; here its result is given.
"""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastcnn.ops import conv_autotune
from fastcnn.ops.conv_autotune import FUSED, VENDOR, Plan, Planner, plan_cache, plan_of
from fastcnn.ops.conv_autotune.measurement import ConvLayer, Measured

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
KEY = {"device": "a GPU", "library": "torch2-9.0-1234", "torch": "2.11.0", "cudnn": 91900}
LAYER = ConvLayer(
    *(torch.bfloat16, 128, 32, 32, 64, 96, 3, 3, 1, (1, 1, 1, 1)),
    *("bn", True, True, True, False),
)
FAST = {
    "forward": {"vendor": 3.0, "fused": 1.0},
    "data_gradient": {"vendor": 3.0, "fused": 1.0},
    "weight_gradient": {"vendor": 2.0, "recomputed": 3.0, "fused": 1.0},
}


class Measuring:
    """What a planner measures with: answers with `times`, and counts."""

    def __init__(self, times=FAST, note=""):
        self.answer, self.layers = Measured({} if note else times, note), []

    def __call__(self, layer, device):
        self.layers.append(layer)
        return self.answer


@pytest.fixture
def path(tmp_path):
    return plan_cache.file_of(tmp_path, KEY)


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors count as those of a GPU with the kernels; the planner that decides on them."""
    measuring = Measuring()
    planner = Planner(CPU, None, KEY, measuring)
    monkeypatch.setattr(conv_autotune, "why_vendor", lambda device, dtype: "")
    monkeypatch.setattr(conv_autotune, "_can_be_fused", lambda x: True)
    monkeypatch.setattr(conv_autotune, "_planner_of", lambda device: planner)
    planner.measuring = measuring
    return planner


def ask(n=128, kind="bn", pending=True, training=True, **asked):
    x = torch.empty(n, 64, 32, 32, dtype=torch.bfloat16, device="meta")
    filters = torch.empty(96, 64, 3, 3, dtype=torch.bfloat16, device="meta")
    return conv_autotune.plan_for(x, filters, 1, (1, 1, 1, 1), kind, pending, training, **asked)


# the rule


def test_every_gradient_goes_to_the_faster_behind_a_fused_forward():
    assert plan_of(FAST) == FUSED
    slow_weight = FAST | {"weight_gradient": {"vendor": 2.0, "recomputed": 3.0, "fused": 3.5}}
    assert plan_of(slow_weight) == Plan("fused", "fused", "vendor")
    slow_data = FAST | {"data_gradient": {"vendor": 3.0, "fused": 3.5}}
    assert plan_of(slow_data) == Plan("fused", "vendor", "fused")


def test_the_recomputation_counts_where_the_vendor_makes_the_gradient_of_the_filter():
    # 4.0 + 4.0 fused against 5.0 + 4.0, but 4.0 + 5.5 with the input made again
    times = {
        "forward": {"vendor": 5.0, "fused": 4.0},
        "weight_gradient": {"vendor": 4.0, "recomputed": 5.5, "fused": 6.0},
    }
    assert plan_of(times) == VENDOR
    times["weight_gradient"]["recomputed"] = 4.0
    assert plan_of(times) == Plan("fused", "vendor", "vendor")


@pytest.mark.parametrize(("fused", "plan"), [(96.9, "fused"), (97.1, "vendor"), (100.0, "vendor")])
def test_the_vendor_wins_ties_by_a_margin(fused, plan):
    assert plan_of({"forward": {"vendor": 100.0, "fused": fused}}).forward == plan


def test_an_inference_plan_has_a_forward_alone():
    assert plan_of({"forward": {"vendor": 2.0, "fused": 1.0}}) == Plan("fused", "vendor", "vendor")


# the cache


def test_a_decision_is_measured_once_and_found_again(path):
    measuring = Measuring()
    first = Planner(CPU, path, KEY, measuring)
    assert first.known(LAYER) is None
    assert first.decide(LAYER).plan == FUSED
    assert first.known(LAYER).times == FAST
    again = Planner(CPU, path, KEY, measuring)
    assert (again.known(LAYER).plan, again.known(LAYER).times) == (FUSED, FAST)
    assert again.sizes() == {128, 32}
    assert measuring.layers == [LAYER]
    assert json.loads(path.read_text())["device"] == "a GPU"
    assert not list(path.parent.glob("*.tmp"))
    assert not list(path.parent.glob("*.lock"))


@pytest.mark.parametrize("name", ConvLayer._fields)
def test_each_field_of_a_layer_is_part_of_its_name(name):
    value = getattr(LAYER, name)
    other = {
        bool: lambda: not value,
        int: lambda: value + 1,
        str: lambda: "bias",
        tuple: lambda: (1, 2, 1, 2),
        torch.dtype: lambda: torch.float16,
    }[type(value)]()
    assert str(LAYER._replace(**{name: other})) != str(LAYER)


@pytest.mark.parametrize("name", KEY)
def test_each_part_of_the_key_is_another_file(tmp_path, name):
    other = {**KEY, name: f"not {KEY[name]}"}
    assert plan_cache.file_of(tmp_path, other) != plan_cache.file_of(tmp_path, KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"layers": 3}',
        '{"layers": {"NAME": 3}}',
        '{"layers": {"NAME": {"times": null, "sizes": "abc"}}}',
        '{"layers": {"NAME": {"times": {"forward": {"vendor": 1.0, "fused": 0.5}}}}}',
        '{"layers": {"NAME": {"times": {"forward": 1, "data_gradient": 1, "weight_gradient": 1}}}}',
        "\x00\xff",
    ],
)
def test_a_damaged_file_is_measured_again_and_mended(path, text):
    path.parent.mkdir()
    path.write_text(text.replace("NAME", str(LAYER)), "latin-1")
    planner = Planner(CPU, path, KEY, Measuring())
    assert planner.known(LAYER) is None
    assert planner.sizes() == set()
    assert planner.decide(LAYER).plan == FUSED
    assert Planner(CPU, path, KEY).known(LAYER).plan == FUSED


@pytest.mark.parametrize("value", [float("nan"), -1.0, 0.0, "1", None])
def test_figures_that_are_none_are_not_taken(path, value):
    entry = {"times": FAST | {"forward": {"vendor": value, "fused": 1.0}}}
    assert plan_cache.add(path, KEY, {str(LAYER): entry})
    assert Planner(CPU, path, KEY).known(LAYER) is None


def test_a_pending_layers_entry_without_the_recomputed_gradient_is_measured_again(path):
    times = FAST | {"weight_gradient": {"vendor": 2.0, "fused": 1.0}}
    plain = LAYER._replace(pending=False)
    assert plan_cache.add(path, KEY, {str(layer): {"times": times} for layer in (LAYER, plain)})
    planner = Planner(CPU, path, KEY, Measuring())
    assert planner.known(LAYER) is None
    assert planner.known(plain).plan == FUSED
    assert planner.decide(LAYER).times == FAST
    assert Planner(CPU, path, KEY).known(LAYER).times == FAST


def test_a_file_that_cannot_be_read_or_written_costs_no_more_than_the_figures(path, caplog):
    path.parent.write_text("a file where the folder should be")
    measuring = Measuring()
    planner = Planner(CPU, path, KEY, measuring)
    assert planner.known(LAYER) is None
    assert planner.decide(LAYER).plan == FUSED
    assert "cannot be written" in caplog.text
    assert planner.known(LAYER).plan == FUSED  # in memory
    assert len(measuring.layers) == 1


def test_a_lock_that_is_never_released_is_not_waited_for(path, monkeypatch, caplog):
    monkeypatch.setattr(plan_cache, "WAIT_S", 0.1)
    path.parent.mkdir()
    with plan_cache.locked(path.with_suffix(".lock"), lambda: None):
        assert not plan_cache.add(path, KEY, {"a": {}})
    assert "another process holds its lock" in caplog.text


def test_a_write_that_fails_leaves_the_old_file(path, monkeypatch):
    plan_cache.add(path, KEY, {"a": {}})

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(plan_cache.os, "replace", fail)
    assert not plan_cache.add(path, KEY, {"b": {}})
    assert set(plan_cache.read(path)) == {"a"}
    assert not list(path.parent.glob("*.tmp"))


WRITER = """
import sys
from pathlib import Path
from fastcnn.ops.conv_autotune import plan_cache
name, path = sys.argv[1], Path(sys.argv[2])
for i in range(20):
    assert plan_cache.add(path, {}, {f"{name}-{i}": {"times": {}}})
"""


@pytest.mark.full
def test_two_processes_and_a_thread_lose_no_entry_of_one_another(path):
    command = [sys.executable, "-c", WRITER]
    writers = [subprocess.Popen([*command, name, path], cwd=ROOT) for name in ("a", "b")]
    own = threading.Thread(
        target=lambda: [plan_cache.add(path, {}, {f"c-{i}": {}}) for i in range(20)]
    )
    own.start()
    own.join()
    assert [writer.wait(600) for writer in writers] == [0, 0]
    assert set(plan_cache.read(path)) == {f"{name}-{i}" for name in "abc" for i in range(20)}


def test_what_another_process_has_measured_is_taken(path):
    here, there = (Planner(CPU, path, KEY, Measuring()) for _ in range(2))
    assert here.known(LAYER) is None
    there.decide(LAYER)
    assert here.known(LAYER).plan == FUSED


def test_what_another_process_has_measured_meanwhile_decides(path):
    slow = FAST | {"forward": {"vendor": 1.0, "fused": 9.0}}
    there = Planner(CPU, path, KEY, Measuring(slow))

    def measuring(layer, device):
        there.decide(layer)
        return Measured(FAST)

    assert Planner(CPU, path, KEY, measuring).decide(LAYER).plan == VENDOR
    assert Planner(CPU, path, KEY).known(LAYER).plan == VENDOR


# what is not measured


def test_a_layer_that_cannot_be_measured_is_the_vendors_and_not_written(path, caplog):
    planner = Planner(CPU, path, KEY, Measuring(note="forward: fused is off by 0.1"))
    decision = planner.decide(LAYER)
    assert (decision.plan, decision.reason) == (VENDOR, "forward: fused is off by 0.1")
    assert str(LAYER) in caplog.text
    assert planner.known(LAYER) == decision
    assert not path.exists()


SHAPES = [  # filters (K, C, R, S), stride, pads, whether the CPU has kernels
    ((4, 3, 3, 3), 1, (1, 1, 1, 1), True),
    ((4, 3, 3, 3), 1, (0, 2, 1, 0), True),
    ((4, 3, 3, 3), 2, (1, 1, 1, 1), False),
    ((4, 3, 5, 5), 1, (2, 2, 2, 2), False),
    ((4, 3, 3, 3), 1, (3, 3, 3, 3), False),
]


@pytest.mark.parametrize(("filters", "stride", "pads", "has_kernels"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_the_cpu_fuses(monkeypatch, dtype, filters, stride, pads, has_kernels):
    measuring = Measuring()
    planner = Planner(CPU, None, KEY, measuring)
    monkeypatch.setattr(conv_autotune, "_planner_of", lambda device: planner)
    x = torch.zeros(2, 3, 8, 8, dtype=dtype)
    has_kernels = has_kernels and dtype != torch.bfloat16
    plan = {}
    for mode in conv_autotune.MODES:
        conv_autotune.set_mode(mode)
        plan[mode] = conv_autotune.plan_for(
            x, torch.zeros(filters), stride, pads, "bn", False, True
        )
    measured = has_kernels and dtype == torch.float32  # fp64 is for checks
    assert plan["vendor"] == VENDOR
    assert plan["fused"] == (FUSED if has_kernels else VENDOR)
    assert plan["auto"] == (FUSED if measured else VENDOR)
    assert len(measuring.layers) == measured


def test_modes(gpu):
    x = torch.empty(1, 1, 1, 1)
    assert ask() == FUSED
    assert len(gpu.measuring.layers) == 1
    conv_autotune.set_mode("vendor")
    assert ask() == VENDOR
    assert not conv_autotune.may_defer(x)
    conv_autotune.set_mode("fused")
    assert ask(n=7) == FUSED
    assert conv_autotune.may_defer(x)
    assert len(gpu.measuring.layers) == 1
    with pytest.raises(ValueError, match="mode: expected one of auto, fused, vendor, got 'fast'"):
        conv_autotune.set_mode("fast")


@pytest.mark.parametrize(("proven", "plan"), [(False, VENDOR), (True, FUSED)])
def test_on_a_gpu_auto_measures_only_kernels_that_have_passed_on_one(
    gpu, monkeypatch, proven, plan
):
    monkeypatch.setattr(conv_autotune, "MEASURED_ON_GPU", proven)
    monkeypatch.setattr(
        conv_autotune, "_is_capturing", lambda device: False
    )  # which needs a driver
    monkeypatch.setattr(conv_autotune, "_known_sizes", lambda device: (128, 32))
    with FakeTensorMode():
        x = torch.empty(128, 64, 32, 32, dtype=torch.bfloat16, device="cuda")
        filters = torch.empty(96, 64, 3, 3, dtype=torch.bfloat16, device="cuda")
    asked = (x, filters, 1, (1, 1, 1, 1), "bn", True, True)
    assert conv_autotune.plan_for(*asked) == plan
    assert conv_autotune.may_defer(x) == proven
    assert len(gpu.measuring.layers) == proven
    assert ("--conv fused takes the library's" in conv_autotune.summary([plan], x.device)) != proven
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    gpu.decide(LAYER)  # as another process may have, which is read when code is compiled
    assert conv_autotune.plan_for(*asked) == plan
    conv_autotune.set_mode("fused")
    assert conv_autotune.plan_for(*asked) == FUSED
    assert conv_autotune.may_defer(x)


def test_kernels_count_as_proven_by_a_committed_check_alone():
    found = [json.loads(path.read_text()) for path in (ROOT / "benchmarks/results").glob("*.json")]
    assert found
    checks = [one for one in found if isinstance(one, dict) and "stages" in one]
    proven = any(one["passed"] and "conv-tests" in one["stages"] for one in checks)
    assert proven or not conv_autotune.MEASURED_ON_GPU


def test_every_argument_is_part_of_what_is_measured(gpu):
    ask()
    ask(n=64)
    ask(kind="bias")
    ask(pending=False)
    ask(training=False)
    ask(wants_data_gradient=False)
    ask(with_bias=True)
    assert len(set(gpu.measuring.layers)) == 7
    first = gpu.measuring.layers[0]
    assert first == LAYER


def test_nothing_is_chosen_by_timings_in_deterministic_mode(gpu):
    ask()
    torch.use_deterministic_algorithms(True)
    assert ask() == VENDOR
    assert not conv_autotune.may_defer(torch.empty(1, 1, 1, 1))
    conv_autotune.set_mode("fused")
    assert ask() == FUSED


def test_nothing_is_measured_while_a_graph_is_captured(gpu, monkeypatch):
    capturing = True
    monkeypatch.setattr(conv_autotune, "_is_capturing", lambda device: capturing)
    assert ask() == VENDOR
    assert gpu.measuring.layers == []
    capturing = False
    assert ask() == FUSED
    capturing = True
    assert ask() == FUSED
    assert len(gpu.measuring.layers) == 1


def test_nothing_is_measured_while_torch_compile_traces(gpu):
    def fused(x, filters):
        return x + (conv_autotune.plan_for(x, filters, 1, (1,) * 4, "bn", True, True) == FUSED)

    def is_fused(n):
        x = torch.zeros(n, 64, 32, 32, dtype=torch.bfloat16)
        filters = torch.zeros(96, 64, 3, 3, dtype=torch.bfloat16)
        return bool(torch.compile(fused, backend="eager", fullgraph=True)(x, filters).max())

    torch._dynamo.reset()
    assert not is_fused(128)
    assert gpu.measuring.layers == []
    torch._dynamo.reset()
    ask()
    assert is_fused(128)
    conv_autotune.set_mode("vendor")
    assert not is_fused(128)  # compiled again
    conv_autotune.set_mode("auto")
    # another batch, which torch makes a symbol of
    assert not is_fused(64)
    assert not is_fused(32)
    torch._dynamo.reset()
    assert len(gpu.measuring.layers) == 1


def test_torch_compile_follows_the_rule_by_which_layers_defer(gpu):
    def defers(x):
        return x + conv_autotune.may_defer(x)

    compiled = torch.compile(defers, backend="eager", fullgraph=True)
    x = torch.zeros(2, 3, 4, 4, dtype=torch.bfloat16)
    assert compiled(x).max() == 1
    conv_autotune.set_mode("vendor")
    assert compiled(x).max() == 0
    conv_autotune.set_mode("auto")
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(True)
    assert compiled(x).max() == 0
    torch._dynamo.reset()


# what is said


def test_a_run_is_told_how_many_layers_are_fused(gpu, caplog):
    caplog.set_level(logging.INFO)
    with conv_autotune.noted() as taken:
        ask()
        ask()
        conv_autotune.set_mode("vendor")
        ask()
    ask()
    assert taken == [FUSED, FUSED, VENDOR]
    assert conv_autotune.summary(taken, CPU) == "convolutions: 2 of 3 fused (--conv vendor)"
    conv_autotune.set_mode("auto")
    assert conv_autotune.summary(taken, CPU) == (
        "convolutions: 2 of 3 fused (measured; `fastcnn bench --layers` shows why)"
    )
    assert conv_autotune.summary([], CPU) == ""
