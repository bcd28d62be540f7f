"""Out-of-distribution detection: scores against networks written by hand, figures by counting."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import write_folder
from small_runs import fixed_validation, start
from test_fold import draw_norms
from torch import nn
from torch.nn import functional as F

from fastcnn.archs import get_network
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.config import Config, DataConfig, ModelConfig
from fastcnn.data import Normalization, load_dataset
from fastcnn.errors import CheckpointError, DataError, NumbersError, UsageError
from fastcnn.insight.ood import ood
from fastcnn.insight.ood.ood import judge
from fastcnn.insight.ood.ood_scores import ENERGY, PROBABILITY, scores
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.checkpoints import load_run as trained_models
from fastcnn.train.checkpoints.load_run import TrainedModel, evaluation_data, load_trained

CPU = torch.device("cpu")
NORMALIZATION = Normalization("unit", (0.5, 0.5, 0.5), (1.0, 1.0, 1.0))


def trained_like(arch, size, backend="torch"):
    """A network with weights, norms and biases as none starts with."""
    model = build(get_network(arch), size, 10, backend)
    initialise(model, "torch", torch.Generator().manual_seed(1))
    draw_norms(model)
    config = Config(model=ModelConfig(arch=arch))
    classes = tuple("0123456789")
    return TrainedModel(model.eval(), config, classes, size, NORMALIZATION, {}, Path("last.pt"))


def images_of(size, count=7):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))


def batches_of(images, size=3):
    return [(part, torch.zeros(len(part), dtype=torch.int64)) for part in images.split(size)]


def murgolo():
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2, bias=False),
        *(nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(32, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10)),
    )


def mao():
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 5), nn.LeakyReLU(), nn.BatchNorm2d(64), nn.MaxPool2d(2)),
        *(nn.Conv2d(64, 128, 3), nn.LeakyReLU(), nn.BatchNorm2d(128), nn.MaxPool2d(2)),
        *(nn.Conv2d(128, 256, 3), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(1024, 512), nn.LeakyReLU(), nn.BatchNorm1d(512), nn.Dropout(0.3)),
        nn.Linear(512, 10),
    )


def run_sequential(plain, state, images):
    """Means behind every activation, and logits, of a network with our weights in its order."""
    own = plain.state_dict()
    plain.load_state_dict(dict(zip(own, state.values(), strict=True)))
    means, x = [], images
    for module in plain.double().eval():
        x = module(x)
        if isinstance(module, nn.ReLU | nn.LeakyReLU):
            means.append(x.mean(tuple(range(1, x.dim()))))
    return means, x


def run_resnet(state, images):
    """ResNet-18 as formulas, of the weights by their names."""
    state = {name: tensor.double() for name, tensor in state.items()}
    means = []

    def conv(x, name, stride=1):
        weight = state[f"{name}.conv.weight"]
        norm = [state[f"{name}.norm.{part}"] for part in ("running_mean", "running_var")]
        affine = [state[f"{name}.norm.{part}"] for part in ("weight", "bias")]
        x = F.conv2d(x, weight, None, stride, weight.shape[2] // 2)
        return F.batch_norm(x, *norm, *affine)

    def relu(x):
        x = x.clamp(min=0)
        means.append(x.mean((1, 2, 3)))
        return x

    x = relu(conv(images, "conv1"))
    for number in range(1, 9):
        name, stride = f"block{number}", 2 if number in (3, 5, 7) else 1
        shortcut = conv(x, f"{name}.projection", stride) if stride == 2 else x
        inner = relu(conv(x, f"{name}.conv1", stride))
        x = relu(conv(inner, f"{name}.conv2") + shortcut)
    logits = x.mean((2, 3)) @ state["fc1.linear.weight"].T + state["fc1.linear.bias"]
    return means, logits


MURGOLO_NAMES = ["ReLU-3", "ReLU-6", "ReLU-9", "ReLU-13"]
NETWORKS = {
    "murgolo-improved": (32, lambda *a: run_sequential(murgolo(), *a), MURGOLO_NAMES),
    "mao-batchnorm": (
        32,
        lambda *a: run_sequential(mao(), *a),
        ["LeakyReLU-2", "LeakyReLU-6", "LeakyReLU-13"],
    ),
    "resnet18": (8, run_resnet, None),
}


@pytest.mark.parametrize("backend", ["torch", "fused"])
@pytest.mark.parametrize("arch", NETWORKS)
@torch.no_grad()
def test_scores_are_those_of_a_network_written_by_hand(arch, backend, library):
    size, by_hand, names = NETWORKS[arch]
    trained, images = trained_like(arch, size, backend), images_of(size)
    found = scores(trained, batches_of(images), CPU)
    means, logits = by_hand(trained.model.state_dict(), images.double())
    assert names is None or list(found.activations) == names
    assert len(found.activations) == len(means)
    exponents = logits.exp()
    wanted = [*means, exponents.amax(1) / exponents.sum(1), exponents.sum(1).log()]
    named = found.by_name()
    assert list(named)[-2:] == [PROBABILITY, ENERGY]
    assert len(found) == len(images)
    for values, true in zip(named.values(), wanted, strict=True):
        assert values.dtype == np.float64
        np.testing.assert_allclose(values, true.numpy(), rtol=2e-5, atol=1e-6)


def test_resnet_activations_are_named_as_in_its_table():
    names = list(scores(trained_like("resnet18", 8), batches_of(images_of(8)), CPU).activations)
    assert names[:5] == ["ReLU-3", "ReLU-6", "ReLU-10", "ReLU-13", "ReLU-17"]
    assert len(names) == 17


def test_the_network_is_read_and_no_more():
    trained, batches = trained_like("murgolo-improved", 16), batches_of(images_of(16))
    wanted = scores(trained, batches, CPU)
    trained.model.train()
    state = {name: tensor.clone() for name, tensor in trained.model.state_dict().items()}
    found = scores(trained, batches, CPU)
    for name, values in found.by_name().items():
        np.testing.assert_array_equal(values, wanted.by_name()[name])
    assert all(module.training for module in trained.model.modules())
    assert all(torch.equal(t, state[n]) for n, t in trained.model.state_dict().items())


def test_broken_weights_are_refused():
    trained = trained_like("murgolo-improved", 16)
    trained.model.fc2.linear.bias.data[3] = float("nan")
    with pytest.raises(NumbersError, match="max softmax is not finite"):
        scores(trained, batches_of(images_of(16)), CPU)


def auroc_by_counting(inside, outside):
    pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
    return sum(pairs) / len(pairs)


def fpr95_by_counting(inside, outside):
    rates = [
        sum(b >= t for b in outside) / len(outside)
        for t in {*inside, *outside}
        if 100 * sum(a >= t for a in inside) >= 95 * len(inside)
    ]
    return min(rates)


# few values, so that ties are the rule
few = st.lists(st.integers(-3, 8), min_size=1, max_size=45).map(lambda v: np.array(v, float))


@settings(max_examples=60, deadline=None)
@given(few, few, few, st.sampled_from([0, 5, 10, 25, 99]))
def test_figures_are_those_of_counting(fit, inside, outside, percent):
    found = judge(fit, inside, outside, percent / 100)
    assert found.auroc == pytest.approx(auroc_by_counting(inside, outside))
    assert found.fpr95 == pytest.approx(fpr95_by_counting(inside, outside))
    allowed = [t for t in fit if 100 * sum(f < t for f in fit) <= percent * len(fit)]
    assert found.threshold == max(allowed)
    told = sum(a >= found.threshold for a in inside), sum(b < found.threshold for b in outside)
    shares = told[0] / len(inside), told[1] / len(outside)
    assert found.accuracy == pytest.approx(sum(told) / (len(inside) + len(outside)))
    assert found.balanced_accuracy == pytest.approx(sum(shares) / 2)
    assert (found.kept_in, found.kept_out) == pytest.approx((shares[0], 1 - shares[1]))
    assert found.kept_fit == pytest.approx(np.mean(fit >= found.threshold))


@settings(max_examples=25, deadline=None)
@given(few, few, few, few, few)
def test_test_images_do_not_move_the_threshold(fit, inside, outside, more_in, more_out):
    first, second = judge(fit, inside, outside), judge(fit, more_in, more_out)
    assert (first.threshold, first.kept_fit) == (second.threshold, second.kept_fit)


def test_five_percent_are_lost_of_any_number_of_images():
    for count in (1, 19, 20, 21, 40, 60, 180, 360, 1000, 5000):
        found = judge(np.arange(float(count)), np.ones(1), np.zeros(1))
        assert found.threshold == count // 20


def test_sets_apart_are_told_without_error():
    fit, inside, outside = np.linspace(5, 6, 40), np.linspace(5.1, 6, 30), np.linspace(1, 4, 70)
    found = judge(fit, inside, outside)
    assert (found.accuracy, found.balanced_accuracy, found.auroc, found.fpr95) == (1, 1, 1, 0)
    assert (found.kept_in, found.kept_out) == (1, 0)


def test_foreign_images_that_score_higher_are_not_told():
    found = judge(np.arange(20.0), np.arange(20.0), np.full(10, 30.0))
    assert (found.auroc, found.fpr95, found.kept_out) == (0, 1, 1)


@pytest.mark.parametrize("values", [[], [1.0, np.nan], [[1.0]], [np.inf]])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_scores_that_are_none_are_refused(place, values):
    sets = [np.ones(3), np.ones(3), np.ones(3)]
    sets[place] = np.array(values)
    with pytest.raises(ValueError, match=f"^{('fit', 'held_in', 'held_out')[place]}: expected"):
        judge(*sets)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run without validation images."""
    return start(tmp_path_factory.mktemp("ood"), epochs=1).folder.path


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Image folders of noise, of other classes and another size."""
    root = tmp_path_factory.mktemp("others")
    few, many = ({"count": count, "side": 12} for count in (3, 9))
    return [str(write_folder(root / "few", **few)), str(write_folder(root / "many", **many))]


def detect(run, data, overrides=None, **options):
    # more threads would wait for each other on busy cores
    return ood.detect(run, data, overrides={"threads": 1} | (overrides or {}), **options)


@torch.no_grad()
def energies(trained, images):
    pixels = torch.from_numpy(images.pixels_of(np.arange(len(images))))
    x = trained.normalization.apply(pixels).permute(0, 3, 1, 2)
    return trained.model(x).double().logsumexp(1).numpy()


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_a_run_is_judged_on_its_own_images_and_all_of_the_others(folder, others):
    found = detect(folder, others[1])
    trained = load_trained(folder / "last.pt", CPU, "torch")
    own, test = evaluation_data(trained, None, "test", {}, CPU)
    other = load_dataset(DataConfig(data=others[1], image_size=32), 32)
    assert (len(test), len(other.test)) == (40, 18)
    fit, held_in, held_out = found.sets
    assert_close(found.fit.energy, energies(trained, own.test.take(fit.places)))
    assert_close(found.held_in.energy, energies(trained, test.take(held_in.places)))
    assert_close(found.held_out.energy, energies(trained, other.test))
    # of test images, each is judged or has a part in the thresholds
    assert sorted([*fit.places, *held_in.places]) == [*range(40)]
    assert (len(fit), len(held_in), len(held_out)) == (20, 20, 18)
    assert (fit.split, held_in.split) == ("test", "test")
    assert list(fit.places) == sorted(fit.places) != [*range(20)]
    assert held_in.classes == [own.classes[label] for label in test.labels[held_in.places]]
    assert list(found.rows) == [*MURGOLO_NAMES, PROBABILITY, ENERGY]
    for name, row in found.rows.items():
        sets = (found.fit, found.held_in, found.held_out)
        assert row == judge(*(part.by_name()[name] for part in sets))
    assert found.words == (
        "network: murgolo-improved, last.pt, fp32",
        "thresholds: keep 95% of 20 of 40 test images of digits, not judged on (none were held "
        "out for validation)",
        "in distribution: 20 of 40 test images of digits",
        f"out of distribution: 18 of 18 test images of {other.name}",
    )


def test_thresholds_are_the_same_whatever_the_other_data(folder, others):
    first, second = (detect(folder, other, quantile=0.2) for other in others)
    for name, row in first.rows.items():
        assert row.threshold == second.rows[name].threshold
        assert row.kept_fit == second.rows[name].kept_fit
        ranked = np.sort(first.fit.by_name()[name])
        assert row.threshold == ranked[4]  # of 20
    assert "keep 80%" in first.words[1]
    assert len(second.held_out) == 3 * len(first.held_out)


STATES = ("best", "last")


@pytest.mark.parametrize("tested", STATES)
def test_thresholds_come_from_validation_images_and_the_tested_model(
    tmp_path, monkeypatch, others, tested
):
    fixed_validation(monkeypatch, [0.9, 0.1])
    options = {"val_fraction": 0.25, "restore_best": tested == "best", "lr": 0.01}
    run = start(tmp_path, **options).folder.path
    found = detect(run, others[0])
    trained = load_trained(run / f"{tested}.pt", CPU, "torch")
    own, _ = evaluation_data(trained, None, "test", {}, CPU)
    assert_close(found.fit.energy, energies(trained, own.val))
    assert found.words[0] == f"network: murgolo-improved, {tested}.pt, fp32"
    assert found.words[1] == "thresholds: keep 95% of 16 of 16 validation images of digits"
    assert len(found.held_in) == 40
    states = [load_trained(run / f"{n}.pt", CPU, "torch").model.fc2.linear.bias for n in STATES]
    assert not torch.equal(*states)


def test_a_limit_draws_from_every_set(folder, others):
    found, whole = detect(folder, others[1], limit=7), detect(folder, others[1])
    for part, all_ in ((found.fit, whole.fit), (found.held_out, whole.held_out)):
        assert len(part) == 7
        nearest = np.abs(part.energy[:, None] - all_.energy).argmin(1)
        assert_close(part.energy, all_.energy[nearest])
        # in their order, and not the first ones, which are of one class
        assert sorted(nearest) == list(nearest) != list(range(7))
    assert len(found.held_in) == 7
    assert found.words[3].startswith("out of distribution: 7 of 18 test images")


def test_a_checkpoint_may_be_chosen(folder, others, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    state = torch.load(run / "best.pt")
    state["model"]["fc2.linear.bias"] += 3.0
    checkpoint.save(state, run / "best.pt")
    last, best = (detect(run, others[0], weights=name) for name in ("last", "best"))
    np.testing.assert_allclose(best.held_out.energy, last.held_out.energy + 3, rtol=1e-4)
    assert best.words[0] == "network: murgolo-improved, best.pt, fp32"
    assert detect(run, others[0]).words == last.words


def test_a_score_may_be_chosen(folder, others):
    found = detect(folder, others[0])
    largest = max(row.auroc for row in found.rows.values())
    assert found.rows[found.best].auroc == largest
    assert found.shown == found.best
    for name in (ENERGY, PROBABILITY, "ReLU-9"):
        assert detect(folder, others[0], score=name).shown == name
    assert "did you mean 'ReLU-9'" in refused(UsageError, str(folder), others[0], score="relu-9")


def test_data_in_distribution_may_be_others(folder, others):
    found = detect(folder, "digits", in_data=others[1])
    trained = load_trained(folder / "last.pt", CPU, "torch")
    inside = load_dataset(DataConfig(data=others[1], image_size=32), 32).test
    fit, held_in, held_out = found.sets
    assert sorted([*fit.places, *held_in.places]) == [*range(18)]
    assert_close(found.fit.energy, energies(trained, inside.take(fit.places)))
    assert_close(found.held_in.energy, energies(trained, inside.take(held_in.places)))
    assert len(held_out) == len(load_dataset(DataConfig(data="digits"), 32).test)
    text = refused(UsageError, str(folder), others[1], in_data=others[1])
    assert text == f"--out {others[1]}: the images of --in {others[1]}; give other data"
    assert refused(UsageError, str(folder), "digits", in_data="cifar100").startswith(
        "--in cifar100:"
    )
    assert refused(UsageError, str(folder), "cifar100").startswith("--out cifar100:")


def test_validation_images_in_distribution_choose_the_threshold(folder, tmp_path):
    data = str(write_folder(tmp_path / "three", ("train", "val", "test"), count=4))
    found = detect(folder, "digits", in_data=data)
    assert (found.sets[0].split, found.sets[1].split) == ("val", "test")
    assert (len(found.fit), len(found.held_in)) == (8, 8)
    assert found.words[1] == "thresholds: keep 95% of 8 of 8 validation images of three"


def test_a_single_image_is_too_few(others, tmp_path):
    run = start(tmp_path, epochs=1, test_subset=1).folder.path
    assert "1 test image and no validation images" in refused(DataError, str(run), others[0])


def test_options_of_which_images_hold_for_the_other_data_alone(folder, tmp_path):
    data = str(write_folder(tmp_path / "whole", ("",), count=10))
    assert len(detect(folder, data).held_out) == 4
    options = {"test_fraction": 0.5, "val_fraction": 0.5, "data_dir": "/nowhere", "image_size": 16}
    found = detect(folder, data, overrides=options)
    assert len(found.held_out) == 10
    whole = detect(folder, data)
    for name in ("fit", "held_in"):
        assert_close(getattr(found, name).energy, getattr(whole, name).energy)


def test_options_of_reading_hold_for_all(folder, others, monkeypatch):
    seen, original = [], ood.evaluation_loader

    def noted(images, config, loader, *rest):
        seen.append((config.data.eval_batch_size, config.data.workers, loader))
        return original(images, config, loader, *rest)

    monkeypatch.setattr(ood, "evaluation_loader", noted)
    first = detect(folder, others[0])
    options = {"eval_batch_size": 5, "workers": 0, "loader": "torch"}
    second = detect(folder, others[0], overrides=options)
    assert seen == [(16, 2, "resident")] * 3 + [(5, 0, "torch")] * 3
    for name in ("fit", "held_in", "held_out"):
        assert_close(getattr(first, name).energy, getattr(second, name).energy)


def test_place_and_loader_of_the_own_images_are_not_those_of_others():
    own = DataConfig(data="cifar10", data_dir="here", loader="torch", store="files", resize="crop")
    other = trained_models.other_data(own, "tiny-imagenet", 32, {})
    assert other == DataConfig(data="tiny-imagenet", image_size=32, resize="crop")
    given = trained_models.other_data(
        own, "tiny-imagenet", 32, {"data_dir": "there", "loader": "dali"}
    )
    assert (given.data_dir, given.loader) == ("there", "dali")
    # found where the run's own are, to be refused
    assert trained_models.other_data(own, "cifar10", 32, {}).data_dir == "here"


def test_images_changed_since_training_are_told(folder, others, tmp_path, caplog):
    detect(folder, others[0])
    assert not caplog.records
    changed = shutil.copytree(folder, tmp_path / "run")
    state = torch.load(changed / "last.pt")
    state["data"]["digest"] = "0" * 64
    checkpoint.save(state, changed / "last.pt")
    detect(changed, others[0])
    assert "digits has changed since training" in caplog.text


def refused(kind, *arguments, **options):
    with pytest.raises(kind) as caught:
        detect(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_errors_are_one_line(folder, others, tmp_path):
    assert "not a run folder" in refused(CheckpointError, str(tmp_path / "no"), others[0])
    assert "run's own images" in refused(UsageError, str(folder), "digits")
    assert "did you mean 'cifar10'" in refused(UsageError, str(folder), "cifar100")
    assert "no such file" in refused(DataError, str(folder), str(tmp_path / "no" / "data"))
    bare = write_folder(tmp_path / "bare", ("train",))
    (bare / "test").mkdir()
    assert str(bare) in refused(DataError, str(folder), str(bare))
    assert "limit: expected 1" in refused(UsageError, str(folder), others[0], limit=0)
    with pytest.raises(UsageError, match="quantile"):
        detect(tmp_path / "no", others[0], quantile=2)
    for quantile in (-0.1, 1.0):
        assert "quantile: expected" in refused(
            UsageError, str(folder), others[0], quantile=quantile
        )


def test_the_own_folder_is_recognised_by_its_contents(others, tmp_path):
    run = start(
        tmp_path, data=others[1], image_size=32, train_subset=16, test_subset=8, epochs=1
    ).folder.path
    moved = shutil.copytree(others[1], tmp_path / "moved")
    for view in ({}, {"resize": "crop"}, {"resize": "crop", "grayscale": "drop"}):
        assert "run's own images" in refused(UsageError, str(run), str(moved), overrides=view)


def test_an_unfinished_run_is_refused(folder, others, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    assert json.loads((run / "summary.json").read_text())["tested_model"] == "last"
    (run / "summary.json").unlink()
    assert "is not finished" in refused(CheckpointError, str(run), others[0])
