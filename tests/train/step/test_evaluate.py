"""Evaluation by the folded network: its figures, and that it leaves the model as it is."""

import pytest
import torch
from graph_twin import CpuTwin
from small_runs import assert_same, final_state, start
from test_fold import RARE, changed, images_for, model_of
from test_graph import resident_bytes
from torch.nn import functional as F

from fastcnn.archs.fold import fold
from fastcnn.archs.layers import ConvNormAct, LinearNormAct
from fastcnn.train import loop, run
from fastcnn.train.evaluate import Evaluator, evaluate, predict
from fastcnn.train.numerics.half import half_network
from fastcnn.train.numerics.precision import Precision

CPU = torch.device("cpu")
PRECISIONS = {"fp32": Precision(), "bf16": Precision(torch.bfloat16)}


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def batches_of(count=24, size=10):
    images = images_for(None, RARE, count)
    labels = torch.arange(count) % 10
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, count, size)]


@pytest.mark.parametrize("name", PRECISIONS)
def test_figures_are_those_of_the_model_to_rounding(name):
    model, precision, batches = model_of(RARE), PRECISIONS[name], batches_of()
    found = evaluate(model, batches, 10, precision, CPU)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    with torch.no_grad():
        logits = half_network(model, precision.dtype)[0](images.to(precision.dtype or images.dtype))
    wanted = F.cross_entropy(logits.float(), labels).item()
    # the mean over images of what rounding moves a logit by
    close = 1e-6 if name == "fp32" else 2**-8
    assert found.figures.loss == pytest.approx(wanted, rel=close)
    assert found.figures.images == 24


def test_no_norm_is_left_to_compute(monkeypatch):
    ran = []
    for kind in (ConvNormAct, LinearNormAct):

        def forward(self, *inputs, own=kind.forward):
            ran.append(self.norm)
            return own(self, *inputs)

        monkeypatch.setattr(kind, "forward", forward)
    evaluate(model_of(RARE), batches_of(), 10, Precision(), CPU)
    assert ran == [None] * 7 * 3


@torch.no_grad()
def test_the_mean_of_both_directions_is_not_rounded_to_half_precision():
    model = fold(model_of(RARE), torch.bfloat16)
    images = images_for(None, RARE, 24).bfloat16()
    parts = [model(given) for given in (images, images.flip(-1))]
    wanted = sum(part.float() for part in parts) / 2
    found = predict(model, images, True)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert not torch.equal(sum(parts).float() / 2, wanted)


@pytest.mark.parametrize("recorder", [None, CpuTwin()], ids=["eager", "graph"])
@pytest.mark.parametrize("name", PRECISIONS)
def test_every_evaluation_takes_the_weights_as_they_are(name, recorder):
    model, batches = model_of(RARE, "fused"), batches_of()
    evaluator = Evaluator(model, batches, 10, PRECISIONS[name], CPU, True, recorder)
    seen = []
    for _ in range(4):
        found = evaluator()
        fresh = evaluate(model, batches, 10, PRECISIONS[name], CPU, True)
        assert found.figures == fresh.figures
        assert torch.equal(found.confusion, fresh.confusion)
        seen.append(found.figures.loss)
        changed(model)
        with torch.no_grad():
            model.conv1.norm.running_mean.add_(len(seen))
    assert len(set(seen)) == 4
    assert evaluator.replay.captured == (2 if recorder else 0)


def test_evaluations_do_not_grow():
    model, batches = model_of(RARE, "fused"), batches_of()
    evaluator = Evaluator(model, batches, 10, PRECISIONS["bf16"], CPU)
    sizes = []
    for _ in range(150):
        evaluator()
        sizes.append(resident_bytes())
    # its weights, 90 kB, kept once an evaluation would be 9 MB
    assert max(sizes[50:]) - max(sizes[:50]) < 2 * 2**20


def test_the_model_is_read_and_no_more():
    model = model_of(RARE).train()
    model.block1.eval()
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    seed = torch.get_rng_state()

    def stop():
        raise KeyboardInterrupt

    evaluator = Evaluator(model, batches_of(), 10, Precision(torch.bfloat16), CPU)
    evaluator()
    with pytest.raises(KeyboardInterrupt):
        evaluator(stop)
    assert [m.training for m in model.modules()] == flags
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), seed)


WITH_NORMS = {"arch": "murgolo-improved", "epochs": 2}
BF16 = {"amp": True, "amp_dtype": "bf16"}


@pytest.mark.parametrize("more", [{}, {"ema": 0.9}, BF16], ids=["plain", "ema", "amp"])
def test_training_does_not_depend_on_evaluation(tmp_path, monkeypatch, more):
    once = start(tmp_path, "once", **WITH_NORMS, **more).folder.path
    original = Evaluator.__call__
    monkeypatch.setattr(Evaluator, "__call__", lambda *a: (original(*a), original(*a))[1])
    twice = start(tmp_path, "twice", **WITH_NORMS, **more).folder.path
    assert_same(final_state(once), final_state(twice))


@pytest.mark.parametrize("backend", ["torch", "fused"])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"ema": 0.5},
        BF16 | {"test_flip": True},
        {"val_fraction": 0.25},
        {"val_fraction": 0.25, "restore_best": True, "loss": "softmax-twice"},
    ],
    ids=["plain", "ema", "amp", "held out", "softmax twice"],
)
def test_a_run_ends_with_the_figures_of_its_evaluation(tmp_path, more, backend):
    outcome = start(tmp_path, "run", backend=backend, **WITH_NORMS, **more)
    given = {"threads": 1, "backend": backend}
    found = run.evaluate_run(str(outcome.folder.path), overrides=given)
    summary = outcome.summary
    for name in ("loss", "top1", "top5"):
        assert found[name] == summary[f"test_{name}"]


def test_evaluation_in_a_run_folds_the_averaged_model(tmp_path, monkeypatch):
    made, original = [], loop.new_evaluator

    def noted(setup, step, loader):
        made.append((original(setup, step, loader), step))
        return made[-1][0]

    monkeypatch.setattr(loop, "new_evaluator", noted)
    start(tmp_path, "run", **WITH_NORMS, ema=0.9)
    [(evaluator, step)] = made
    conv = step.ema.model.conv1
    scale = conv.norm.weight / (conv.norm.running_var + conv.norm.eps).sqrt()
    found = evaluator.folded.network.conv1.conv.weight
    torch.testing.assert_close(found, conv.conv.weight.detach() * scale[:, None, None, None])
