"""What a confusion matrix says of each class: rates, precision, recall, F1, confusions.

A matrix is counts int64 (classes, classes): rows true, columns predicted class. A quotient without
images is 0, as scikit-learn's with zero_division=0.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ClassFigures:
    """precision, recall, f1: float64 (classes,), fractions of 1. support: int64 (classes,), the
    images of a class; predicted: int64 (classes,), the images taken for it."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    support: np.ndarray
    predicted: np.ndarray

    def macro(self) -> dict[str, float]:
        """The means over the classes, each of the same weight, one without images as well."""
        return {name: float(np.average(values)) for name, values in self._quotients().items()}

    def weighted(self) -> dict[str, float]:
        """The means over the classes, weighted by their images."""
        if not self.support.any():
            return dict.fromkeys(self._quotients(), 0.0)
        return {
            name: float(np.average(values, weights=self.support))
            for name, values in self._quotients().items()
        }

    def _quotients(self) -> dict[str, np.ndarray]:
        return {"precision": self.precision, "recall": self.recall, "f1": self.f1}


@dataclass(frozen=True)
class Confusion:
    """`count` images of class `true` were predicted as class `predicted`, `share` of that class."""

    true: int
    predicted: int
    count: int
    share: float


def confusion_counts(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Counts int64 (classes, classes) of labels and predictions, int64 (n,)."""
    pairs = np.bincount(labels * classes + predicted, minlength=classes**2)
    return pairs.reshape(classes, classes)


def rates(counts: np.ndarray) -> np.ndarray:
    """Shares of each true class, float64 (classes, classes); a class without images has zeros."""
    return _divided(counts, counts.sum(1, keepdims=True))


def accuracy(counts: np.ndarray) -> float:
    """Share of all images that were told rightly."""
    return float(_divided(counts.trace(), counts.sum()))


def class_figures(counts: np.ndarray) -> ClassFigures:
    """Precision, recall and F1 of each class (van Rijsbergen 1979); F1 is 2·right/(true +
    predicted)."""
    right, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    return ClassFigures(
        precision=_divided(right, predicted),
        recall=_divided(right, support),
        f1=_divided(2.0 * right, support + predicted),
        support=support,
        predicted=predicted,
    )


def top_confusions(counts: np.ndarray, limit: int | None = None) -> list[Confusion]:
    """The pairs of classes that were confused, the most images first, then the larger share of the
    true class; at most `limit` of them."""
    shares = rates(counts)
    wrong = counts - np.diag(counts.diagonal())
    pairs = [
        Confusion(int(true), int(other), int(counts[true, other]), float(shares[true, other]))
        for true, other in np.argwhere(wrong)
    ]
    pairs.sort(key=lambda pair: (-pair.count, -pair.share, pair.true, pair.predicted))
    return pairs[:limit]


def _divided(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.asarray(part / np.where(whole == 0, 1, whole))
