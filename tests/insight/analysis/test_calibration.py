"""Calibration against torchmetrics and against sums written out."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import multiclass_calibration_error

from fastcnn.insight.analysis.calibration import calibrate


def drawn(seed, images=400, classes=7, scale=2.0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(images, classes)).astype(np.float32) * scale
    labels = np.where(rng.random(images) < 0.4, logits.argmax(1), rng.integers(0, classes, images))
    return logits, labels.astype(np.int64)


def softmax(row):
    exponents = [math.exp(value) for value in row]
    return [value / sum(exponents) for value in exponents]


def by_hand(logits, labels, bins):
    """Sums over images, bin by bin, as Guo et al. write them."""
    rows = [softmax(row) for row in logits.astype(float).tolist()]
    inside = [[] for _ in range(bins)]
    for row, label in zip(rows, labels.tolist(), strict=True):
        confidence = max(row)
        inside[math.ceil(confidence * bins) - 1].append(
            (confidence, row.index(confidence) == label)
        )
    gaps = [
        (len(part), abs(sum(r for _, r in part) - sum(c for c, _ in part)) / len(part))
        for part in inside
        if part
    ]
    brier = [
        sum((p - (k == label)) ** 2 for k, p in enumerate(row))
        for row, label in zip(rows, labels.tolist(), strict=True)
    ]
    return {
        "ece": sum(count * gap for count, gap in gaps) / len(rows),
        "mce": max(gap for _, gap in gaps),
        "brier": sum(brier) / len(rows),
        "counts": [len(part) for part in inside],
    }


@pytest.mark.parametrize("bins", [15, 4])
@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_figures_are_those_of_others(scale, bins):
    logits, labels = drawn(3, scale=scale)
    found = calibrate(logits, labels, bins)
    double, classes = torch.from_numpy(logits).double(), torch.from_numpy(labels)
    for norm, value in (("l1", found.ece), ("max", found.mce)):
        wanted = multiclass_calibration_error(
            double.softmax(1), classes, num_classes=7, n_bins=bins, norm=norm
        )
        assert value == pytest.approx(wanted.item(), abs=1e-6)
    wanted = by_hand(logits, labels, bins)
    for name in ("ece", "mce", "brier"):
        assert getattr(found, name) == pytest.approx(wanted[name], rel=1e-9)
    assert found.counts.tolist() == wanted["counts"]
    assert found.nll == pytest.approx(F.cross_entropy(double, classes).item(), rel=1e-12)
    assert found.accuracy == np.mean(logits.argmax(1) == labels)
    assert found.confidence == pytest.approx(double.softmax(1).amax(1).mean().item(), rel=1e-12)


def test_bins_hold_means_and_empty_ones_none():
    probabilities = np.array([[0.9, 0.1], [0.95, 0.05], [0.3, 0.7], [0.55, 0.45]])
    found = calibrate(np.log(probabilities), np.array([0, 1, 1, 1]), 5)
    assert found.edges.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert found.counts.tolist() == [0, 0, 1, 1, 2]
    np.testing.assert_allclose(found.accuracies, [np.nan, np.nan, 0, 1, 0.5])
    np.testing.assert_allclose(found.confidences, [np.nan, np.nan, 0.55, 0.7, 0.925])
    assert found.ece == pytest.approx((0.55 + 0.3 + 2 * 0.425) / 4)
    assert found.mce == pytest.approx(0.55)


def test_an_edge_belongs_to_the_bin_below_it():
    found = calibrate(np.zeros((3, 2)), np.array([0, 0, 1]), 2)
    assert found.counts.tolist() == [3, 0]
    # certain beyond what fp64 tells from 1
    found = calibrate(np.array([[800.0, 0], [0, 1000]]), np.array([0, 0]), 15)
    assert found.counts.tolist() == [0] * 14 + [2]
    assert (found.ece, found.brier, found.nll) == (0.5, 1.0, 500.0)
