"""A run does what its options say: whole runs against training by hand, then each option's way.

hand_run.py holds the training by hand and its cases.
"""

import csv
import json
import time

import numpy as np
import pytest
import torch
from hand_run import CASES, COMMON, HandRun, figures_of, initial_model, tensors_of

from fastcnn.archs import NETWORKS
from fastcnn.config import AugmentConfig, DataConfig, PlaceConfig
from fastcnn.data import Normalization, make_loader
from fastcnn.data.choose import has_dali
from fastcnn.data.draws import epoch_order
from fastcnn.recipes import resolve
from fastcnn.train import run
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.distributed import ALONE
from fastcnn.train.interrupt import Interrupted, StopAtStepEdge
from fastcnn.train.metrics import Metrics
from fastcnn.train.numerics import precision
from fastcnn.train.setup import configure_torch, prepare

LOADERS = ["resident", *(["dali"] if has_dali() else []), "torch"]
CPU = torch.device("cpu")
HERE = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """The run folder and summary of fastcnn, and the same run by hand."""
    options = COMMON | CASES[request.param]
    place = PlaceConfig(output=str(tmp_path_factory.mktemp("wiring")), name="run")
    outcome = run.start(resolve(options), place, ["test"], quiet=True)
    return outcome.folder, outcome.summary, HandRun(options)


def assert_same_weights(state, model, hand):
    """Differences are measured by how far training has moved each tensor."""
    found, expected = tensors_of(state), tensors_of(model.state_dict())
    start = tensors_of(initial_model(hand.options).state_dict())
    for ours, theirs, first in zip(found, expected, start, strict=True):
        assert (ours - theirs).norm() < 1e-3 * (theirs - first).norm()


def figures(loss, top1, top5):
    return pytest.approx([loss, top1, top5], rel=1e-4)


def test_weights(both):
    folder, _, hand = both
    state = checkpoint.load(folder.last)
    assert_same_weights(state["model"], hand.model, hand)
    assert (state["ema"] is None) == (hand.shadow is None)
    if hand.shadow:
        assert_same_weights(state["ema"], hand.shadow, hand)


def test_metrics(both):
    folder, _, hand = both
    with (folder.path / "metrics.csv").open() as file:
        found = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    for ours, theirs in zip(found, hand.rows, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=1e-4)
        assert ours["lr"] == pytest.approx(theirs["lr"], rel=1e-5)


def test_best_checkpoint(both):
    folder, summary, hand = both
    best = checkpoint.load(folder.best)
    assert best["epoch"] == summary["best_epoch"] == hand.best_epoch
    assert_same_weights(best["model"], hand.ends[hand.best_epoch - 1], hand)


def test_summary_and_confusion(both):
    folder, summary, hand = both
    assert json.loads((folder.path / "summary.json").read_text()) == summary
    restored = hand.options["restore_best"]
    end = hand.best_epoch - 1 if restored else -1
    row, test = hand.rows[end], figures_of(hand.ends[end], *hand.test)
    found = [summary["test_loss"], summary["test_top1"], summary["test_top5"]]
    assert found == figures(test.loss, test.top1, test.top5)
    found = [summary["val_loss"], summary["val_top1"], summary["val_top5"]]
    assert found == figures(row["val_loss"], row["val_top1"], row["val_top5"])
    assert summary["best_val_top1"] == pytest.approx(max(row["val_top1"] for row in hand.rows))
    assert summary["tested_model"] == ("best" if restored else "last")
    held = {"val": 12} if hand.options["val_fraction"] else {}
    assert summary["images"] == {"train": len(hand.labels), "test": 30} | held
    with (folder.path / "confusion_matrix.csv").open() as file:
        counts = [list(map(int, row[1:])) for row in list(csv.reader(file))[1:]]
    assert counts == test.confusion


@pytest.mark.parametrize("name", [None, "last", "best"])
def test_evaluation_of_the_finished_run(both, name):
    folder, summary, hand = both
    which = name or summary["tested_model"]
    model = hand.ends[hand.best_epoch - 1 if which == "best" else -1]
    parts = {"val": hand.val, "test": hand.test} if hand.options["val_fraction"] else {}
    for part, images in (parts or {"test": hand.test}).items():
        wanted = figures_of(model, *images)
        found = run.evaluate_run(str(folder.path), None, part, name, HERE)
        found = [found["loss"], found["top1"], found["top5"]]
        assert found == figures(wanted.loss, wanted.top1, wanted.top5)


def test_the_cases_tell_the_models_apart():
    """Averaged from trained, best from last, loss from accuracy: the tests above need them to."""
    hands = [HandRun(COMMON | CASES[name]) for name in ("adam", "adamw", "best")]
    for hand in hands:
        first, last = (figures_of(model, *hand.test).loss for model in hand.ends)
        assert hand.best_epoch == 1
        assert abs(first - last) > 1e-3
        if hand.shadow:
            assert abs(figures_of(hand.model, *hand.test).loss - last) > 1e-3
    first, second = (row["val_top1"] for row in hands[0].rows)
    assert first < second


# What two epochs by hand do not show

SMALL = {
    "arch": "murgolo-base",
    "data": "digits",
    "image_size": 16,
    "train_subset": 46,
    "test_subset": 30,
    "batch_size": 8,
    "eval_batch_size": 12,
    "epochs": 2,
    "device": "cpu",
    "threads": 1,
}


def start(tmp_path, **options):
    place = PlaceConfig(output=str(tmp_path), name="run")
    return run.start(resolve(SMALL | options), place, ["test"], quiet=True)


def test_speed_is_images_by_the_time_of_their_batches(tmp_path, monkeypatch):
    clock, update = [0.0], Metrics.update

    def half_a_second(*arguments):
        clock[0] += 0.5
        update(*arguments)

    monkeypatch.setattr(Metrics, "update", half_a_second)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    outcome = start(tmp_path)
    with (outcome.folder.path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    # 6 batches to train on 46 images, 3 to evaluate 30
    assert [float(row["images_per_s"]) for row in rows] == pytest.approx([46 / 3] * 2, rel=1e-5)
    assert [float(row["seconds"]) for row in rows] == [4.5, 4.5]
    assert outcome.summary["images_per_s"] == pytest.approx(46 / 3)
    assert outcome.summary["train_seconds"] == 9.0
    found = run.evaluate_run(str(outcome.folder.path), overrides=HERE)
    assert (found["images_per_s"], found["seconds"]) == (pytest.approx(20), 1.5)


def test_the_loss_scaler_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "cpu_computes_in", lambda dtype: True)
    looks = iter(range(1, 100))

    def check(self):
        if next(looks) == 4:
            raise Interrupted(15)

    with monkeypatch.context() as patch:
        patch.setattr(StopAtStepEdge, "check", check)
        with pytest.raises(Interrupted):
            start(tmp_path, amp=True, amp_dtype="fp16")
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    state["scale"]["scale"].fill_(64.0)
    state["scale"]["good_steps"].fill_(100)
    checkpoint.save(state, tmp_path / "run" / "last.pt")
    place = PlaceConfig(resume=str(tmp_path / "run"))
    outcome = run.resume(place, {}, ["test"], quiet=True)
    scale = checkpoint.load(outcome.folder.last)["scale"]
    # 12 steps, 4 of them before; no gradient overflows at so small a scale
    assert (scale["scale"].item(), scale["good_steps"].item()) == (64.0, 100 + 12 - 4)
    assert outcome.summary["precision"] == "fp16"


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_chooses_by_timing_unless_deterministic(monkeypatch, deterministic):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    config = resolve({"deterministic": deterministic, "seed": 11})
    configure_torch(config, torch.device("cuda"), ALONE)
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory is not deterministic
    assert torch.initial_seed() == 11


def test_threads_are_those_asked_for(tmp_path):
    outcome = start(tmp_path, threads=3, fast_dev_run=True)
    assert torch.get_num_threads() == 3
    run.evaluate_run(str(outcome.folder.path), overrides=HERE | {"threads": 4})
    assert torch.get_num_threads() == 4


def sizes(loader):
    return [len(labels) for _, labels in loader]


@pytest.mark.parametrize("loader", LOADERS)
def test_sizes_reach_the_loaders(loader):
    plain = prepare(resolve(SMALL | {"loader": loader, "workers": 0}))
    assert type(plain.train_loader).__name__ == f"{loader.capitalize()}Loader"
    assert sizes(plain.train_loader) == [8, 8, 8, 8, 8, 6]
    assert sizes(plain.val_loader) == [12, 12, 6]
    assert plain.test_loader is None
    options = {"loader": loader, "workers": 1, "val_fraction": 0.3, "drop_last": True}
    held = prepare(resolve(SMALL | options | {"eval_batch_size": 10, "test_subset": 25}))
    assert held.train_loader.batch_size == 8
    assert (held.train_loader.samples, len(held.train_loader)) == (32, 4)
    assert (held.val_loader.samples, len(held.val_loader)) == (14, 2)
    assert (held.test_loader.samples, len(held.test_loader)) == (25, 3)
    assert held.val_loader.batch_size == held.test_loader.batch_size == 10
    assert loader != "torch" or held.train_loader.loader.num_workers == 1
    dropped = prepare(resolve(SMALL | {"loader": loader, "workers": 0, "drop_last": True}))
    assert sizes(dropped.train_loader) == [8, 8, 8, 8, 8]
    assert sizes(dropped.val_loader) == [12, 12, 6]


def test_evaluation_takes_the_sizes_given_to_it(tmp_path, monkeypatch):
    folder, batches, evaluate = start(tmp_path, epochs=1).folder, [], run.evaluate

    def recorded(model, loader, *arguments, **options):
        batches.append(sizes(loader))
        return evaluate(model, loader, *arguments, **options)

    monkeypatch.setattr(run, "evaluate", recorded)
    for options in ({}, {"eval_batch_size": 9}, {"test_subset": 13}):
        run.evaluate_run(str(folder.path), overrides=HERE | options)
    assert batches == [[12, 12, 6], [9, 9, 9, 3], [12, 1]]


NO_AUGMENTATION = {"crop_padding": 0, "flip": "none"}
AUGMENTATIONS = [
    {"crop_padding": 3, "crop_mode": "zero"},
    {"crop_padding": 3, "crop_mode": "reflect"},
    {"flip": "random"},
    {"flip": "alternating"},
    {"rotation": 30.0},
    {"shift": 0.3},
    {"cutout": 5},
    {"resized_crop": 0.4},
    {"color_jitter": 0.6},
]


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("augmentation", AUGMENTATIONS, ids="-".join)
def test_augmentation_reaches_the_training_images_and_no_others(loader, augmentation):
    options = NO_AUGMENTATION | augmentation
    common = {"loader": loader, "workers": 0, "normalize": "centered", "seed": 5}
    setup = prepare(resolve(SMALL | common | options))
    arguments = {"batch_size": 8, "device": CPU, "seed": 5, "shuffle": True, "drop_last": False}
    plain, wanted = (
        make_loader(
            setup.dataset.train,
            DataConfig(loader=loader, workers=0),
            AugmentConfig(**chosen),
            Normalization.fit(setup.dataset.train, "centered"),
            **arguments,
        )
        for chosen in (NO_AUGMENTATION, options)
    )
    found, wanted, plain = (
        torch.cat([x for x, _ in batches]) for batches in (setup.train_loader, wanted, plain)
    )
    assert torch.equal(found, wanted)
    assert not torch.equal(found, plain)
    pixels = torch.from_numpy(setup.dataset.test.pixels.copy()).permute(0, 3, 1, 2)
    shown = torch.cat([x for x, _ in setup.val_loader])
    torch.testing.assert_close(shown, pixels / 255 - 0.5)


@pytest.mark.parametrize("loader", LOADERS)
def test_without_shuffling_all_epochs_have_one_mixed_order(loader):
    """A folder's images come class by class: as stored, the last batches would be of one class."""
    plain = {"loader": loader, "workers": 0, "crop_padding": 0, "flip": "none", "shuffle": False}

    def orders(**options):
        setup = prepare(resolve(SMALL | plain | options))
        rows = {x.tobytes(): i for i, x in enumerate(setup.dataset.train.pixels)}
        mean, std = (
            torch.tensor(v) * 255 for v in (setup.normalization.mean, setup.normalization.std)
        )
        epochs = []
        for _ in range(2):
            images = torch.cat([x for x, _ in setup.train_loader]).permute(0, 2, 3, 1)
            pixels = (images * std + mean).round().byte().numpy()
            epochs.append([rows[x.tobytes()] for x in pixels])
        return epochs

    one, two = orders(seed=3)
    assert one == two
    assert one != sorted(one)
    assert sorted(one) == sorted(orders(seed=3, shuffle=True)[0])
    assert orders(seed=4)[0] != one
    mixed = orders(seed=3, shuffle=True)
    assert mixed[0] != mixed[1]


@pytest.mark.full
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("mode", "numpy_mode"), [("zero", "constant"), ("reflect", "reflect")])
def test_crops_are_windows_of_the_padded_image(loader, mode, numpy_mode):
    options = {"loader": loader, "workers": 0, "normalize": "unit", "shuffle": False}
    crop = {"crop_padding": 3, "crop_mode": mode, "flip": "none"}
    setup = prepare(resolve(SMALL | options | crop))
    found = torch.cat([x for x, _ in setup.train_loader])
    order = epoch_order(setup.config.run.seed, 0, len(found), True)
    for image, pixels in zip(found, setup.dataset.train.pixels[order], strict=True):
        padded = np.pad(pixels, ((3, 3), (3, 3), (0, 0)), numpy_mode)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (16, 16), (0, 1))
        cropped = (image * 255).round().byte().numpy()
        assert (windows == cropped).all((2, 3, 4)).any()


# The reports' recipes: numbers from shared/reports/README.md, whatever the report leaves out is off

OFF = {
    "crop_padding": 0,
    "flip": "none",
    "rotation": 0.0,
    "shift": 0.0,
    "cutout": 0,
    "resized_crop": 1.0,
    "color_jitter": 0.0,
    "label_smoothing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "clip_grad": 0.0,
    "ema": 0.0,
    "warmup_epochs": 0.0,
    "early_stop": 0,
    "drop_last": False,
    "decay": "auto",
    "exempt_norm_bias": False,
    "schedule": "constant",
    "nesterov": False,
    "val_fraction": 0.0,
    "restore_best": False,
    "shuffle": True,
    "train_subset": None,
    "test_subset": None,
}


def sgd(lr, momentum, weight_decay=0.0):
    return {"optimizer": "sgd", "lr": lr, "momentum": momentum, "weight_decay": weight_decay}


def adam(lr, weight_decay=0.0):
    return {"optimizer": "adam", "lr": lr, "weight_decay": weight_decay}


def batches(batch_size, epochs, normalize, init):
    return {"batch_size": batch_size, "epochs": epochs, "normalize": normalize, "init": init}


MARIE = adam(1e-3, 5e-4) | batches(100, 50, "unit", "torch") | {"val_fraction": 0.3}
MURGOLO = {"val_fraction": 0.1, "best_metric": "val_loss"}
BASE = MURGOLO | sgd(1e-3, 0.9) | batches(128, 10, "zscore", "xavier")
STEPS = {"schedule": "step", "gamma": 0.1, "step_epochs": 16}
IMPROVED = (
    MURGOLO
    | sgd(2e-4, 0.9, 4e-3)
    | batches(128, 20, "zscore", "xavier")
    | {"restore_best": True}
    | STEPS
)
MAO = sgd(1e-3, 0.0) | batches(64, 300, "centered", "torch") | {"shuffle": False}
LATE = {"schedule": "inverse-time", "time_decay": 1e-6}
VGG = (
    sgd(0.1, 0.9, 5e-4)
    | batches(128, 100, "zscore", "he")
    | {"nesterov": True, "schedule": "step", "gamma": 0.5, "step_epochs": 20}
    | {"rotation": 15.0, "shift": 0.1, "flip": "random"}
)
PRINTED = {
    "marie2019": MARIE,
    "mao2022": MAO,
    "bohnstedt2019": VGG,
    "murgolo-base": BASE,
    "murgolo-improved": IMPROVED,
    "murgolo-no-scheduler": IMPROVED | {"schedule": "constant"},
    "murgolo-no-l2": IMPROVED | {"weight_decay": 0.0},
    "murgolo-no-batchnorm": IMPROVED,
    "murgolo-no-dropout": IMPROVED,
    "tiny-a": sgd(0.01, 0.0) | batches(128, 20, "unit", "uniform"),
    "tiny-b": adam(1e-3) | batches(128, 20, "unit", "uniform"),
    "tiny-c": adam(1e-3) | batches(128, 20, "unit", "uniform"),
    "tiny-d": adam(1e-3) | batches(128, 20, "unit", "he"),
    "tiny-e": adam(1e-2) | batches(128, 60, "mean-image", "he") | LATE,
    "tiny-f": adam(1e-3) | batches(128, 100, "mean-image", "he") | LATE,
}


@pytest.mark.parametrize("name", [name for name in NETWORKS if NETWORKS[name].report])
def test_a_reports_recipe_is_what_it_prints(name):
    found = resolve({"arch": name, "recipe": "report"}).flat()
    printed = OFF | (PRINTED.get(name) or PRINTED[NETWORKS[name].report])
    assert {option: found[option] for option in printed} == printed
