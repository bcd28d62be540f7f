"""`fastcnn bench --layers` on convolutions: what is met, what is called, what is told.

On a CPU, where the fused ops are composites; a run compares them on a GPU alone.
"""

import pytest
import torch

from fastcnn.archs import get_network
from fastcnn.bench import table
from fastcnn.bench.kernels import conv_layers, layers
from fastcnn.bench.kernels.conv_layers import met_layers, rows_of_convolutions
from fastcnn.ops import conv_autotune
from fastcnn.ops.conv_autotune import Decision, Plan
from fastcnn.ops.conv_autotune import measurement as plan_measure

CPU = torch.device("cpu")
BF16 = torch.bfloat16
LIMITS = {"copy_bytes_per_s": 4.3e12, "flop_per_s": 790e12}


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.fixture
def quick(monkeypatch):
    """One call a round: what is timed does not matter."""
    monkeypatch.setattr(plan_measure, "MOST_CALLS", 1)
    monkeypatch.setattr(conv_layers, "sets_and_calls", lambda *_: (1, 1))
    monkeypatch.setattr(conv_layers, "WARMUP_ROUNDS", 0)


def rows_of(name, batch=2, rounds=1, **options):
    def figures(moved, flop, seconds):
        return {"bytes": moved, "flop": flop, "seconds": seconds}

    network = get_network(name)
    return rows_of_convolutions(network, batch, BF16, CPU, rounds, figures, **options)


def test_layers_are_those_that_a_network_asks_plans_for():
    found = {met.name: met for met in met_layers(get_network("vgg16"), 128, BF16)}
    assert list(found) == [f"conv{i}" for i in range(1, 14)]
    kinds = {met.training.kind for met in found.values()}
    assert kinds == {"bn"}
    first, second = found["conv1"].training, found["conv2"].training
    assert str(first) == (
        "bfloat16 128x32x32x3 by 64x3x3 stride 1 pads 1,1,1,1 bn training no data gradient"
    )
    assert (
        str(second) == "bfloat16 128x32x32x64 by 64x3x3 stride 1 pads 1,1,1,1 bn training pending"
    )
    assert found["conv2"].inference.kind == "inference-pool"
    assert not found["conv3"].training.pending  # a pool lies before it


def test_what_stays_pending_and_what_takes_a_residual():
    found = {met.name: met for met in met_layers(get_network("resnet18"), 2, BF16)}
    assert found["block1.conv2"].residual == (2, 64, 32, 32)
    pending = {name for name, met in found.items() if met.training.pending}
    assert pending == {f"block{i}.conv2" for i in range(1, 9)}
    bias = {met.name: met.training for met in met_layers(get_network("cnn-a"), 2, BF16)}
    assert [layer.kind for layer in bias.values()] == ["bias", "bias-pool"] * 2
    padded = met_layers(get_network("tiny-d"), 2, BF16)[1].training
    assert (padded.r, padded.s, padded.pads) == (2, 1, (0, 1, 0, 0))


def test_every_part_of_every_convolution_is_told(quick):
    rows = rows_of("cnn-a+norm", rivals=("eager",))
    assert all("why" not in row for row in rows)
    parts = {name: [r["part"] for r in rows if r["layer"] == name] for name in ("conv1", "conv2")}
    both = ["layer forward", "layer backward", "inference"]
    assert parts["conv1"] == ["conv forward", "conv weight gradient", *both]
    assert parts["conv2"] == [*conv_layers.PARTS.values(), *both]
    variants = {row["part"]: set(row["seconds"]) for row in rows if row["layer"] == "conv2"}
    assert variants["conv forward"] == {"vendor", "fused"}
    assert variants["conv weight gradient"] == {"vendor", "fused", "recomputed"}
    assert variants["layer forward"] == {"eager", "vendor", "fused"}
    assert variants["layer backward"] == {"eager", "vendor", "fused"}
    assert variants["inference"] == {"eager", "vendor", "fused"}
    assert all(len(s) == 1 for row in rows for s in row["seconds"].values())
    assert {(*row["plan"], row["plan_reason"]) for row in rows} == {
        ("vendor", "vendor", "vendor", "bfloat16: the fused kernels are float32's on the CPU")
    }


def test_a_residual_and_a_projection_are_called_as_in_their_network(quick):
    rows = rows_of("resnet18", batch=1, rivals=())
    assert all("why" not in row for row in rows)
    forward = [row for row in rows if row["part"] == "layer forward"]
    assert len(forward) == 20
    assert all(set(row["seconds"]) == {"vendor", "fused"} for row in forward)


def test_the_layers_are_called_under_the_plan_that_they_stand_for(quick, monkeypatch):
    seen, forward = [], conv_layers.ConvNormAct.forward

    def note(self, *given):
        if given[0].device == CPU:  # not the call without memory, which asks what is met
            seen.append((conv_autotune.mode(), self.backend, self.training))
        return forward(self, *given)

    monkeypatch.setattr(conv_layers.ConvNormAct, "forward", note)
    rows_of("mao-default", batch=1, rivals=("eager",))
    assert set(seen) == {
        ("auto", "torch", True),
        ("auto", "torch", False),  # inference
        ("vendor", "fused", True),
        ("fused", "fused", True),
    }
    assert conv_autotune.mode() == "auto"


def test_the_eager_layer_computes_what_ours_does():
    network = get_network("cnn-a+norm")
    modules = conv_layers.Modules(network, BF16, CPU)
    modules.own.load_state_dict(modules.torch.state_dict())
    met = met_layers(network, 2, BF16)[1]
    given = conv_layers._inputs(met, CPU)
    results = [call(*given) for call in modules.variants("conv2", ("eager",)).values()]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], atol=0.05, rtol=0.02)


def test_numbers_that_are_off_are_named_and_not_timed(quick, monkeypatch):
    monkeypatch.setattr(plan_measure, "disagreement", lambda *_: "forward: fused is off by 0.1")
    rows = rows_of("mao-default", batch=1, rivals=())
    reasons = {(row["backend"], row["why"]) for row in rows if "why" in row}
    off = "ArithmeticError: forward: fused is off by 0.1"
    assert reasons == {("plan_parts", off), ("inference_part", off)}
    parts = {row["part"] for row in rows if "why" not in row}
    assert parts == {"layer forward", "layer backward"}


def broken(*_, **__):
    raise RuntimeError("no compiler")


@pytest.mark.parametrize("when", ["made", "called"])
def test_a_rival_that_raises_is_named_and_ours_are_timed(quick, monkeypatch, when):
    monkeypatch.setattr(torch, "compile", broken if when == "made" else lambda *_, **__: broken)
    rows = rows_of("cnn-a+norm", rivals=("eager", "compile"))
    wrong = [row for row in rows if "why" in row]
    assert {(row["layer"], row["view"]) for row in wrong} == {
        (f"conv{i}", view) for i in range(1, 5) for view in ("module_parts", "inference_part")
    }
    assert {(row["backend"], row["why"]) for row in wrong} == {
        ("compile", "RuntimeError: no compiler")
    }
    views = ("layer forward", "layer backward", "inference")
    timed = [row for row in rows if row.get("part") in views]
    assert len(timed) == 4 * len(views)
    assert all(row["seconds"].keys() == {"eager", "vendor", "fused"} for row in timed)


def test_a_rival_that_raises_in_its_backward_is_named(quick, monkeypatch):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        backward = broken

    def compiled(module, **_):
        return lambda *given: Broken.apply(module(*given))

    monkeypatch.setattr(torch, "compile", compiled)
    rows = rows_of("mao-default", batch=1, rivals=("compile",))
    wrong = {(row["backend"], row["view"]) for row in rows if "why" in row}
    assert wrong == {("compile", "module_parts")}
    backward = [row for row in rows if row.get("part") == "layer backward"]
    assert all(row["seconds"].keys() == {"vendor", "fused"} for row in backward)


def test_a_shape_that_cudnns_own_fusion_refuses_costs_no_other():
    calls = {"vendor": broken, "fused": broken, "cudnn": broken, "eager": lambda: None}
    wrong = conv_layers._refused(calls, lambda name: calls[name](), CPU)
    assert wrong == {"cudnn": "RuntimeError: no compiler"}
    assert list(calls) == ["vendor", "fused", "eager"]


def test_ours_that_raises_is_no_rivals_fault(quick, monkeypatch):
    monkeypatch.setattr(conv_layers, "_under", broken)
    rows = rows_of("mao-default", batch=1, rivals=("eager",))
    wrong = {row["backend"]: row["why"] for row in rows if "why" in row}
    assert wrong == {"module_parts": "RuntimeError: no compiler"}


def test_what_a_part_moves_and_computes():
    met = met_layers(get_network("vgg16"), 1024, BF16)[1]  # 64 to 64 channels, 32x32
    image, taps = 1024 * 32 * 32 * 64, 64 * 64 * 9
    flop = 2 * image * 64 * 9
    expected = {
        "conv forward": (2 * image + taps, flop),
        "conv data gradient": (3 * image + taps, flop),  # x is pending: dy, x, dx
        "conv weight gradient": (2 * image + taps, flop),
        "layer forward": (4 * image + taps, flop),
        "layer backward": (5 * image + 2 * taps, 2 * flop),
        "inference": (image * 1.25 + taps, flop),  # pooled
    }
    for part, (values, computed) in expected.items():
        assert conv_layers.bytes_and_flop(met, part) == (2 * values, computed), part


def test_a_residual_is_moved_where_it_is_added():
    layers = met_layers(get_network("resnet18"), 128, BF16)
    met = next(met for met in layers if met.name == "block1.conv2")
    plain = met._replace(residual=None)
    residual = 2 * 128 * 32 * 32 * 64  # bytes
    added = {
        part: conv_layers.bytes_and_flop(met, part)[0] - conv_layers.bytes_and_flop(plain, part)[0]
        for part in ("conv forward", "layer forward", "inference")
    }
    assert added == {"conv forward": 0, "layer forward": residual, "inference": residual}


def test_the_rows_of_a_gpu_are_in_the_table():
    seconds = {"vendor": [2e-4] * 7, "fused": [1e-4] * 7, "recomputed": [3e-4] * 7}
    row = {"network": "n", "batch": 1, "layer": "conv2", "part": "conv weight gradient"}
    row |= conv_layers.plan_entries(Decision(Plan("fused", "vendor", "fused")))
    row |= layers._figures_of_part(10**6, 10**9, seconds, LIMITS)
    assert row["times_as_fast_as"]["vendor"]["median"] == 2.0
    content = {"rows": [row], "mode": "layers", "machine": {"gpu": "a GPU"}}
    heads, cells = table.cells_of(content)
    told = dict(zip(heads, cells[0], strict=True))
    assert (told["us vendor"], told["us fused"], told["us eager"]) == ("200.0", "100.0", "")
    assert told["plan"] == "fused"
    assert told["x vendor"].startswith("2.00")
    row |= {"part": "conv data gradient", "plan_reason": "--conv vendor"}
    assert table.cells_of(content)[1][0][-1] == "vendor (--conv vendor)"


@pytest.mark.cuda
def test_on_a_gpu_every_part_has_its_variants():
    gpu = torch.device("cuda", 0)
    rows = layers.rows_of_network("cnn-a", 64, BF16, gpu, 7, LIMITS, ("eager",))
    # cuDNN's own fusion may refuse a shape
    assert {row["backend"] for row in rows if "why" in row} <= {"cudnn"}
    inference = [row for row in rows if row.get("part") == "inference"]
    assert len(inference) == 4
    for row in inference:
        assert row["variants"].keys() - {"cudnn"} == {"vendor", "fused", "eager"}
