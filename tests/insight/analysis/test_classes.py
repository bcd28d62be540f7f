"""Figures of the classes against scikit-learn's, on many matrices."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    precision_recall_fscore_support,
)

from fastcnn.insight.analysis.classes import (
    Confusion,
    accuracy,
    class_figures,
    confusion_counts,
    rates,
    top_confusions,
)


def drawn(seed, classes, images):
    """Labels and predictions, some classes without either."""
    rng = np.random.default_rng(seed)
    weights = rng.random(classes) * (rng.random(classes) > 0.3) + 1e-12
    labels = rng.choice(classes, images, p=weights / weights.sum())
    return labels, np.where(rng.random(images) < 0.5, labels, rng.integers(0, classes, images))


def figures_of_sklearn(labels, predicted, classes, average=None):
    return precision_recall_fscore_support(
        labels, predicted, labels=range(classes), average=average, zero_division=0
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 25), st.integers(1, 300))
def test_figures_are_exactly_those_of_scikit_learn(seed, classes, images):
    labels, predicted = drawn(seed, classes, images)
    counts = confusion_counts(labels, predicted, classes)
    np.testing.assert_array_equal(
        counts, confusion_matrix(labels, predicted, labels=range(classes))
    )
    found = class_figures(counts)
    wanted = figures_of_sklearn(labels, predicted, classes)
    for values, true in zip(
        (found.precision, found.recall, found.f1, found.support), wanted, strict=True
    ):
        np.testing.assert_array_equal(values, true)
    for means, average in ((found.macro(), "macro"), (found.weighted(), "weighted")):
        precision, recall, f1, _ = figures_of_sklearn(labels, predicted, classes, average)
        assert (means["precision"], means["recall"], means["f1"]) == (precision, recall, f1)
    assert accuracy(counts) == accuracy_score(labels, predicted)
    normalised = confusion_matrix(labels, predicted, labels=range(classes), normalize="true")
    np.testing.assert_array_equal(rates(counts), normalised)


def test_a_matrix_without_images_has_zeros():
    found = class_figures(np.zeros((3, 3), np.int64))
    assert found.f1.tolist() == found.precision.tolist() == found.recall.tolist() == [0, 0, 0]
    assert found.macro() == found.weighted() == {"precision": 0, "recall": 0, "f1": 0}
    assert accuracy(np.zeros((3, 3), np.int64)) == 0
    assert top_confusions(np.zeros((3, 3), np.int64)) == []


COUNTS = np.array([[5, 2, 0, 3], [3, 1, 0, 2], [0, 0, 4, 0], [0, 3, 1, 90]])


def test_confusions_come_by_images_then_by_their_share():
    found = top_confusions(COUNTS)
    assert found == [
        Confusion(1, 0, 3, 3 / 6),
        Confusion(0, 3, 3, 3 / 10),
        Confusion(3, 1, 3, 3 / 94),
        Confusion(1, 3, 2, 2 / 6),
        Confusion(0, 1, 2, 2 / 10),
        Confusion(3, 2, 1, 1 / 94),
    ]
    assert top_confusions(COUNTS, 2) == found[:2]


@pytest.mark.parametrize("seed", range(3))
def test_confusions_are_all_wrong_images(seed):
    labels, predicted = drawn(seed, 7, 200)
    found = top_confusions(confusion_counts(labels, predicted, 7))
    assert sum(pair.count for pair in found) == (labels != predicted).sum()
    for pair in found:
        chosen = labels == pair.true
        assert pair.count == (predicted[chosen] == pair.predicted).sum()
        assert pair.share == pair.count / chosen.sum()
