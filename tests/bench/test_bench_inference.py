"""`fastcnn bench --inference`: the same function under every backend, and a wrong one is seen."""

import json
from dataclasses import replace

import pytest
import torch
from graph_twin import CpuTwin
from test_bench import LIMITS, command, content_of
from test_fold import images_for, logits_of, model_of, relative
from torch import nn

from fastcnn.archs import NETWORKS
from fastcnn.archs.fold import Folded
from fastcnn.archs.layers import ConvNormAct, LinearNormAct, ResidualBlock
from fastcnn.archs.plain import plain
from fastcnn.bench import inference, plot, table, throughput
from fastcnn.bench.inference import Forward, InferenceBench, LogitsCheck
from fastcnn.bench.options import settings_of
from fastcnn.bench.rivals import baselines
from fastcnn.bench.rivals.variants import Task
from fastcnn.bench.run import Run
from fastcnn.bench.steps import Steps
from fastcnn.errors import UsageError
from fastcnn.train.graph import WARM_UP, Replay

BACKENDS = ("eager", "eager-fp32", "fused")
TASK = Task("murgolo-improved", 4, "resident", BACKENDS, images=24, inference=True)


@pytest.fixture
def bench(library):
    return InferenceBench(TASK)


def why_wrong(bench, backend="fused"):
    check = LogitsCheck(bench)
    variant = bench.variant(backend, augment=False)
    return check.why_wrong(backend, variant, check.run(variant))


# the rivals' network


@pytest.mark.parametrize("name", [n for n in NETWORKS if n != "tiny-e"])
def test_the_plain_network_is_the_same_function_in_torchs_modules(name):
    model = model_of(name).double()
    images = images_for(model, name, 2, torch.float64)
    wanted = logits_of(model, images)
    rival = plain(model)
    assert relative(logits_of(rival, images), wanted) < 1e-12
    ours = (ConvNormAct, LinearNormAct, ResidualBlock)
    assert not any(isinstance(module, ours) for module in rival.modules())
    assert sum(p.numel() for p in rival.parameters()) == sum(p.numel() for p in model.parameters())


def test_weights_of_products_are_rounded_once():
    rival = baselines.cast_products(plain(model_of("vgg11")), torch.bfloat16)
    for module in rival.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d | nn.BatchNorm1d):
            norm = isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d)
            assert module.weight.dtype is (torch.float32 if norm else torch.bfloat16)
    assert baselines.cast_products(rival, None) is rival


# what is compared


@pytest.mark.parametrize("name", ["cnn-a", "cnn-a+norm", "mao-batchnorm", "murgolo-improved"])
def test_all_backends_are_right(library, name):
    bench = InferenceBench(Task(name, 4, "resident", BACKENDS, images=24, inference=True))
    assert [why_wrong(bench, backend) for backend in BACKENDS] == [""] * 3


def test_half_precision_is_judged_by_eagers_own(library):
    task = Task("murgolo-improved", 4, "resident", BACKENDS, half="bf16", images=24, inference=True)
    bench = InferenceBench(task)
    assert set(bench.sets) == {torch.float32, torch.bfloat16}
    assert [why_wrong(bench, backend) for backend in BACKENDS] == [""] * 3
    fused = bench.variant("fused", augment=False)
    assert next(fused.model.parameters()).dtype is torch.bfloat16


def test_eager_judges_even_where_it_is_not_timed(library):
    task = Task("mao-default", 4, "resident", ("eager-fp32",), half="bf16", images=16)
    found = Steps(replace(task, inference=True))
    assert found.wrong == {}
    assert found.variants == ["eager-fp32"]


def test_sets_lie_normalised_and_take_turns(bench):
    sets = bench.sets[torch.float32]
    assert 3 <= len(sets) <= 6
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in sets)
    assert torch.cat(sets).mean().abs() < 0.1
    seen = []
    forward = Forward(lambda x: seen.append(x) or x.sum(), sets, Replay(None))
    for _ in range(2 * len(sets)):
        forward()
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in sets] * 2


def test_passes_keep_nothing_for_a_backward(bench):
    variant = bench.variant("eager", augment=False)
    assert variant.augmented() is variant
    assert not any(m.training for m in variant.model.modules())
    variant.step()
    assert not variant.result().requires_grad


def test_norms_are_not_those_of_a_new_network(bench):
    norm = bench.model("eager").conv1.norm
    assert norm.running_mean.abs().min() > 0
    assert norm.running_var.std() > 0.1
    assert norm.weight.std() > 0.1
    assert norm.bias.abs().min() > 0


class Unfolded:
    """A fold with something planted in its network."""

    def __init__(self, model, half):
        self.network = Folded(model, half).network
        with torch.no_grad():
            self.plant(self.network, model)


PLANTED = {
    "old weights": lambda new, old: new.conv1.conv.weight.copy_(old.conv1.conv.weight),
    "no bias": lambda new, old: new.conv1.conv.bias.zero_(),
    "a rounded weight": lambda new, old: new.conv1.conv.weight.copy_(
        new.conv1.conv.weight.bfloat16()
    ),
    "a nan": lambda new, old: new.conv1.conv.bias.fill_(torch.nan),
}


@pytest.mark.full
@pytest.mark.parametrize("planted", PLANTED)
def test_a_wrong_fold_is_seen(bench, monkeypatch, planted):
    monkeypatch.setattr(Unfolded, "plant", staticmethod(PLANTED[planted]), raising=False)
    monkeypatch.setattr(inference, "Folded", Unfolded)
    assert "logits of pass" in why_wrong(bench)
    found = Steps(TASK)
    assert found.variants == ["eager", "eager-fp32"]
    assert "errs by" in found.wrong["fused"]


def test_an_eager_that_errs_judges_nobody(bench):
    check = LogitsCheck(bench)
    check.eager = dict.fromkeys(check.eager, 0.5)
    variant = bench.variant("fused", augment=False)
    found = check.run(variant)
    assert "eager, by which it is judged" in check.why_wrong("fused", variant, found)


def graph_steps(monkeypatch, recorder):
    monkeypatch.setattr(inference, "recorder_for", lambda device, mode: recorder)
    return Steps(Task("mao-default", 4, "resident", ("graph",), images=16, inference=True))


def test_the_graph_itself_is_checked(library, monkeypatch):
    twin = CpuTwin()
    found = graph_steps(monkeypatch, twin)
    assert found.wrong == {}
    assert twin.captures == 1
    assert found.time("graph") > 0


def test_a_graph_that_goes_on_with_its_first_images_is_wrong(library, monkeypatch):
    class Idle(CpuTwin):
        def capture(self, work):
            replay, left = super().capture(work), [1]
            return lambda: replay() if left and left.pop() else None

    assert "logits of pass 5 errs by" in graph_steps(monkeypatch, Idle()).wrong["graph"]
    assert WARM_UP + inference.CHECKED == 5


def test_a_graph_that_was_not_captured_is_wrong(library, monkeypatch):
    monkeypatch.setattr(Replay, "captured", 0)
    found = graph_steps(monkeypatch, CpuTwin()).wrong["graph"]
    assert found == "none of the steps that were checked was a graph"


# options, rows, table, chart


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--inference --layers", "--inference: leave out --layers with it"),
        ("--inference --loader torch", "--loader: means nothing to --inference"),
        ("--inference --workers 2", "--workers: means nothing to --inference"),
        ("--inference --seeds 2", "--seeds: goes with --time-to-accuracy alone"),
        ("--inference --lr 0.1", "--lr: goes with --time-to-accuracy alone"),
        ("--inference --time-to-accuracy 0.9", "--inference: leave out --time-to-accuracy"),
    ],
)
def test_what_means_nothing_is_refused(capsys, words, expected):
    code, out, err = command(capsys, *words.split())
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1


def test_tasks_are_of_inference(library):
    settings = settings_of({"inference": True, "device": "cpu", "plot": "x.png", "threads": "1"})
    found = list(Run(settings, ["bench"]).tasks())
    assert all(task.inference for task in found)
    assert str(found[0]) == "vgg16 batch 256 inference"
    assert Task.from_json(found[0].to_json()) == found[0]


def gpu_row(backend, step_s):
    task = Task("vgg16", 1024, "resident", ("eager", "graph"), "cuda", "bf16", inference=True)
    seconds = {(throughput.ONE, "eager"): [0.02] * 7, (throughput.ONE, backend): [step_s] * 7}
    facts = {"set_up_s": 1.0, "peak_bytes": 3 * 2**20, "launches": 12.0, "kernels": 90.0}
    return throughput.row_of(task, backend, seconds, facts, {})


def test_table_and_chart_of_a_gpu_have_rates_and_no_share(tmp_path):
    rows = [gpu_row("eager", 0.02), gpu_row("graph", 0.005)]
    content = content_of(rows, "a GPU", mode="inference")
    heads, cells = table.cells_of(content)
    shown = dict(zip(heads, cells[1], strict=True))
    assert shown["images/s"] == "204,800 (204,800 to 204,800)"
    assert shown["x eager"] == "4.00 (4.00 to 4.00)"
    assert not any(head.startswith("of ") for head in heads)
    assert list(plot.panels_of(content)) == ["vgg16, batch 1024"]
    assert plot._title(content).startswith("inference, images/s")
    assert plot._title(content | {"mode": "throughput"}).startswith("training step, images/s")
    plot.draw(content, tmp_path / "bars.png")
    with_share = throughput.row_of(
        Task("vgg16", 1024, "resident", ("graph",), "cuda", "bf16"),
        "graph",
        {(throughput.ONE, "graph"): [0.005] * 7},
        {"peak_bytes": 0, "launches": 0.0},
        LIMITS,
    )
    heads, cells = table.cells_of(content_of([*rows, with_share], "a GPU"))
    column = heads.index("of K5")
    assert [row[column] for row in cells] == ["", "", "62%"]


@pytest.mark.full
def test_a_comparison_from_end_to_end(library, capsys, tmp_path):
    path = tmp_path / "x.json"
    words = "--inference --arch mao-batchnorm --batch-size 4 --threads 1 --device cpu --rounds 7"
    words += f" --backends eager fused graph --json {path} --plot {tmp_path / 'x.png'}"
    code, out, err = command(capsys, *words.split())
    assert code == 0
    assert "mao-batchnorm batch 4 inference: eager, fused, graph" in err
    content = json.loads(path.read_text())
    assert content["mode"] == "inference"
    assert "limits" not in content
    fused, graph = content["rows"][1:]
    assert fused["times_as_fast_as"]["eager"].keys() == set(throughput.PAIRS)
    assert "CUDA graph" in graph["why"]
    assert not any(word in path.read_text() for word in ("ms_per", "images_per_s", "kept"))
    assert "images/s" not in out
    assert "kept" not in out
    assert (tmp_path / "x.png").exists()


def test_a_graph_without_a_gpu_is_one_line():
    bench = InferenceBench(TASK)
    with pytest.raises(UsageError, match="CUDA graphs need a GPU"):
        bench.variant("graph", augment=False)
