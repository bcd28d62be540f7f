"""What is observed is what `fastcnn eval` evaluates, image by image."""

import numpy as np
import pytest
import torch
from image_files import write_folder
from small_runs import start

from fastcnn.errors import DataError, NumbersError, UsageError
from fastcnn.insight.analysis.predict_split import observe, open_tested
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.checkpoints.load_run import evaluation_data, load_trained
from fastcnn.train.run import evaluate_run

CPU = torch.device("cpu")
ONE = {"threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    options = {"val_fraction": 0.25, "epochs": 1}
    return start(tmp_path_factory.mktemp("observe"), **options).folder.path


def looked_at(run, data=None, split="test", weights=None, **options):
    trained, device = open_tested(str(run), weights, ONE | options)
    return observe(trained, device, data, split, ONE | options)


@torch.no_grad()
def by_hand(path, split="test", flip=False):
    """Logits of the network as it is, norms and all, and the labels."""
    trained = load_trained(path, CPU, "torch")
    _, images = evaluation_data(trained, None, split, {}, CPU)
    pixels = torch.from_numpy(images.pixels_of(np.arange(len(images))))
    x = trained.normalization.apply(pixels).permute(0, 3, 1, 2)
    logits = trained.model(x)
    if flip:
        logits = (logits + trained.model(x.flip(3))) / 2
    return logits.numpy(), images.labels


@pytest.mark.parametrize("split", ["test", "val", "train"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_logits_are_those_of_the_network(folder, split, backend, library):
    found = looked_at(folder, split=split, backend=backend)
    logits, labels = by_hand(folder / "last.pt", split)
    assert (found.logits.dtype, found.labels.dtype) == (np.float32, np.int64)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.labels, labels)
    count = {"test": 40, "val": 16, "train": 48}[split]
    assert (len(found.labels), found.split) == (count, split)
    np.testing.assert_array_equal(found.images.labels, labels)
    assert found.words == (
        "network: murgolo-improved, last.pt, fp32 on cpu",
        f"images: {count} {split} images of digits",
    )


def test_figures_are_those_of_eval(folder):
    found = looked_at(folder)
    wanted = evaluate_run(str(folder), overrides=ONE)
    assert np.mean(found.predicted == found.labels) == pytest.approx(wanted["top1"])
    own = found.probabilities[np.arange(40), found.labels]
    assert -np.log(own).mean() == pytest.approx(wanted["loss"], rel=1e-5)
    assert found.probabilities.dtype == np.float64
    np.testing.assert_allclose(found.probabilities.sum(1), 1)


def test_a_run_that_tests_both_ways_is_seen_both_ways(folder):
    found = looked_at(folder, test_flip=True)
    logits, _ = by_hand(folder / "last.pt", flip=True)
    np.testing.assert_allclose(found.logits, logits, rtol=1e-4, atol=1e-4)
    assert not np.allclose(logits, by_hand(folder / "last.pt")[0], atol=1e-3)
    assert found.words[1].endswith("digits, each seen both ways")


def test_half_precision_is_asked_for_as_in_eval(folder):
    found = looked_at(folder, amp=True)
    wanted = evaluate_run(str(folder), overrides=ONE | {"amp": True})
    assert f", {wanted['precision']} on cpu" in found.words[0]
    assert np.mean(found.predicted == found.labels) == pytest.approx(wanted["top1"])


def test_other_data_and_another_checkpoint_are_looked_at(folder, tmp_path):
    state = torch.load(folder / "last.pt")
    state["network"]["classes"] = [*map(str, range(8)), "ant", "bee"]
    checkpoint.save(state, tmp_path / "last.pt")
    names = state["network"]["classes"]
    data = write_folder(tmp_path / "others", classes=names, count=2, side=20)
    found = looked_at(tmp_path / "last.pt", str(data))
    assert (found.dataset.name, len(found.labels)) == ("others", 20)
    files = looked_at(tmp_path / "last.pt", str(data), store="files", loader="torch", workers=0)
    np.testing.assert_allclose(files.logits, found.logits, rtol=1e-4, atol=1e-4)
    with pytest.raises(DataError, match="digits has 10 classes"):
        looked_at(tmp_path / "last.pt", "digits")


def test_broken_weights_and_splits_that_are_not_there_are_refused(folder, tmp_path):
    state = torch.load(folder / "last.pt")
    (state["ema"] or state["model"])["fc2.linear.bias"][3] = float("inf")
    checkpoint.save(state, tmp_path / "last.pt")
    with pytest.raises(NumbersError, match="a logit is not finite"):
        looked_at(tmp_path / "last.pt")
    with pytest.raises(UsageError, match="--weights"):
        looked_at(tmp_path / "last.pt", weights="best")
