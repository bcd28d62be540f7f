"""What `fastcnn bench` compares: rivals and ours make the same steps, and a wrong one is seen."""

import math
from types import SimpleNamespace

import pytest
import torch
from graph_twin import CpuTwin

from fastcnn.bench import steps
from fastcnn.bench.rivals import baselines, check, correctness, fastcnn_step, variants
from fastcnn.bench.rivals.variants import Task, Workbench
from fastcnn.bench.steps import Steps
from fastcnn.train import step

TASK = Task("murgolo-improved", 8, "resident", ("eager", "fused"), images=24)
CPU = torch.device("cpu")


@pytest.fixture
def bench(library):
    return Workbench(TASK)


def why_wrong(bench, backend="fused"):
    found = check.Check(bench)
    variant = bench.variant(backend, augment=False)
    return found.why_wrong(backend, variant, found.run(variant))


def test_tasks_travel_as_json():
    task = Task("vgg16", 64, "torch", ("fused",), threads=2, budget_s=3.0)
    assert Task.from_json(task.to_json()) == task


@pytest.mark.parametrize("name", ["cnn-a", "cnn-a+norm", "mao-batchnorm", "murgolo-improved"])
def test_eager_and_fused_are_right(library, name):
    bench = Workbench(Task(name, 8, "resident", ("eager", "fused"), images=24))
    assert why_wrong(bench, "eager") == why_wrong(bench, "fused") == ""


def test_all_loaders_give_the_check_the_same_images(library):
    for backend in ("eager", "fused"):
        task = Task("cnn-a", 8, "torch", (backend,), images=24, workers=0)
        assert why_wrong(Workbench(task), backend) == ""


def test_half_precision_is_judged_by_eagers_own(library):
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("no bf16 on this CPU")
    bench = Workbench(Task("cnn-a+norm", 8, "resident", ("eager",), half="bf16", images=24))
    assert bench.half("eager") is torch.bfloat16
    assert bench.half("eager-fp32") is None
    assert why_wrong(bench, "eager") == why_wrong(bench, "fused") == ""


# an error planted in our step, and where it shows
PLANTED = {
    "a scaled image": ("loader", 1.01, "loss of step 1"),
    "another rate": ("lr", 0.0106, "errs by"),
    "no momentum": ("momentum", 0.0, "errs by"),
    "no smoothing": ("label_smoothing", 0.0, "loss of step 1"),
    "a strong decay": ("weight_decay", 0.5, "errs by"),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_a_wrong_step_is_seen(bench, monkeypatch, planted):
    what, value, says = PLANTED[planted]
    if what == "loader":
        right = fastcnn_step.loader_of

        def wrong_loader(*arguments):
            loader = right(*arguments)
            loader.scale = loader.scale * value
            return loader

        monkeypatch.setattr(variants, "loader_of", wrong_loader)
    else:
        config = fastcnn_step.OptimConfig
        monkeypatch.setattr(
            fastcnn_step, "OptimConfig", lambda **given: config(**given | {what: value})
        )
    assert says in why_wrong(bench)


def test_a_step_of_nans_is_wrong(bench):
    found = check.Check(bench)
    variant = bench.variant("fused", augment=False)
    next(variant.model.parameters()).data.fill_(math.nan)
    assert "errs by nan" in found.why_wrong("fused", variant, found.run(variant))


def test_an_eager_that_errs_judges_nobody(bench, monkeypatch):
    found = check.Check(bench)
    found.eager[check.FIRST_LOSS] = 0.5
    variant = bench.variant("fused", augment=False)
    losses = found.run(variant)
    assert "eager, by which it is judged" in found.why_wrong("fused", variant, losses)


@pytest.mark.full
def test_wrong_variants_are_named_and_not_timed(library, monkeypatch):
    class Broken(baselines.RivalStep):
        def __call__(self, images, labels):
            super().__call__(images, labels)
            raise RuntimeError("of this\nkind")

    def variant(self, backend, augment):
        if backend != "eager-fp32":
            return right(self, backend, augment)
        broken = Broken(self.model(backend), variants.RECIPE, None, None)
        return self._rival(broken, None, augment)

    right = Workbench.variant
    monkeypatch.setattr(Workbench, "variant", variant)
    config = fastcnn_step.OptimConfig
    monkeypatch.setattr(fastcnn_step, "OptimConfig", lambda **given: config(**given | {"lr": 0.02}))
    found = Steps(Task("cnn-a", 8, "resident", ("eager", "eager-fp32", "fused"), images=24))
    assert found.variants == ["eager"]
    assert found.wrong["eager-fp32"] == "RuntimeError: of this kind"
    assert "errs by" in found.wrong["fused"]
    assert found.time("eager") > 0


def test_a_spent_budget_builds_no_more(library):
    found = Steps(Task("cnn-a", 4, "resident", ("eager",), images=8, check=False, budget_s=0.0))
    assert found.variants == []
    assert found.wrong == {"eager": "no time was left"}


def test_a_check_that_fails_stops_all(library, monkeypatch):
    monkeypatch.setattr(check, "true_changes", lambda bench: {}["gone"])
    found = Steps(Task("cnn-a", 4, "resident", ("eager", "fused"), images=8))
    assert found.wrong.keys() == {"eager", "fused"}
    assert "the check of the variants failed: KeyError: 'gone'" in found.wrong["fused"]


@pytest.mark.full
def test_the_backward_keeps_less_when_fused(library):
    found = Steps(Task("cnn-a+norm", 4, "resident", ("eager", "fused"), images=16, check=False))
    kept = {name: facts["kept_bytes"] for name, facts in found.facts.items()}
    assert kept["fused"] < 0.8 * kept["eager"]


# the rivals' own loader


def images(count=12, size=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.25])
    return pixels, torch.arange(count), mean, std


def test_the_rivals_images_without_augmentation():
    pixels, labels, mean, std = images()
    batches = iter(baselines.ResidentImages(pixels, labels, mean, std, 5, torch.float64, False))
    (x, y), (_, second), (again, third) = (next(batches) for _ in range(3))
    want = (pixels[:5].double() / 255 - mean) / std
    torch.testing.assert_close(x, want.permute(0, 3, 1, 2), atol=1e-5, rtol=0)
    assert x.is_contiguous(memory_format=torch.channels_last)
    # whole batches alone, and then from the start
    assert [y.tolist(), second.tolist()] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert torch.equal(third, y)
    assert torch.equal(again, x)


def test_the_rivals_crop_and_flip_are_those_of_padding():
    torch.manual_seed(0)
    pixels, labels, mean, std = images()
    loader = baselines.ResidentImages(pixels, labels, mean, std, 12, torch.float32, True)
    offsets = torch.tensor([[0, 4, -4], [0, -4, 3]]).unsqueeze(2)
    flips = torch.tensor([[False], [False], [True]])
    chosen = torch.tensor([3, 7, 9])
    cropped = loader._cropped(chosen, offsets, flips)
    padded = torch.nn.functional.pad(
        pixels.permute(0, 3, 1, 2).float(), (4, 4, 4, 4), mode="reflect"
    ).permute(0, 2, 3, 1)
    assert torch.equal(cropped[0], pixels[3])
    assert torch.equal(cropped[1].float(), padded[7, 8:16, 0:8])
    assert torch.equal(cropped[2].float(), padded[9, 0:8, 7:15].flip(1))
    x, y = next(iter(loader))
    assert sorted(y.tolist()) == list(range(12))
    assert not torch.equal(x, loader._normalised(pixels[y]))


def test_augmented_variants_train_on_other_images(bench):
    bare = bench.variant("eager", augment=False)
    shown = []
    bare.model.register_forward_pre_hook(lambda _, x: shown.append(x[0].detach().clone()))
    bare.step()
    bare.augmented().step()  # the same model: it need not be compiled again
    assert len(shown) == 2
    assert not torch.equal(*shown)


def test_our_steps_go_on_over_epochs(bench):
    step = fastcnn_step.OurStep(
        bench.model("fused"),
        variants.RECIPE,
        variants.Precision(),
        bench.loader(augment=True),
        CPU,
        graph=False,
        warm_up=1,
    )
    for _ in range(7):  # two epochs of three batches and one more
        step()
    assert step.step.metrics.read().images == 7 * 8


def test_errors_of_small_changes_count_as_rounding():
    truth = {"a": torch.tensor([1e-9]).double(), "b": torch.tensor([1.0]).double()}
    results = {"a": torch.tensor([3e-9]), "b": torch.tensor([1.1])}
    found = correctness.errors_of(results, truth, 0.01)
    assert found["a"] < 1e-6
    assert found["b"] == pytest.approx(0.1)
    slack = {"a": 0.0, "b": 0.2}
    errors = {"eager": dict.fromkeys("ab", 0.0), "fused": found}
    assert "a errs by" in correctness.wrong_ones(errors, slack)["fused"]


def test_launches_by_the_host_and_kernels_on_the_device_are_counted_apart(monkeypatch):
    class Profile:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            host, device = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA
            names = [("aten::cudnn_convolution", host), ("cudaLaunchKernel", host)]
            names += [("cudaGraphLaunch", host), ("cudaMemcpyAsync", host)]
            names += [("cudaStreamSynchronize", host), ("cuLaunchKernelEx", host)]
            names += [("a_kernel", device), ("Memcpy DtoD", device)]
            return [SimpleNamespace(name=n, device_type=d) for n, d in names] * 3

    monkeypatch.setattr(torch.profiler, "profile", lambda **_: Profile())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    made = []
    assert steps.launches_of(lambda: made.append(1)) == {"launches": 4.0, "kernels": 2.0}
    assert len(made) == steps.PROFILED == 3


def test_the_idle_memory_of_graphs_pools_is_counted(monkeypatch):
    def segment(pool, total, allocated):
        return {"segment_pool_id": pool, "total_size": total, "allocated_size": allocated}

    found = [segment((0, 0), 100, 10), segment((0, 1), 50, 20), segment((7, 0), 5, 5)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: found)
    assert steps._idle_in_pools() == 30


def steps_with_graphs(monkeypatch, recorder, **task):
    monkeypatch.setattr(step, "recorder_for", lambda device, mode: recorder)
    return Steps(Task("mao-default", 4, "resident", ("graph",), images=16, **task))


@pytest.mark.full
def test_the_graph_itself_is_checked(library, monkeypatch):
    twin = CpuTwin()
    assert steps_with_graphs(monkeypatch, twin).wrong == {}
    assert twin.captures >= 1


def test_a_graph_whose_replays_do_nothing_is_wrong(library, monkeypatch):
    class Idle(CpuTwin):
        def capture(self, work):
            super().capture(work)
            return lambda: None

    assert "errs by" in steps_with_graphs(monkeypatch, Idle()).wrong["graph"]


def test_a_graph_that_was_not_captured_is_wrong(library, monkeypatch):
    found = steps_with_graphs(monkeypatch, None).wrong["graph"]
    assert found == "none of the steps that were checked was a graph"
