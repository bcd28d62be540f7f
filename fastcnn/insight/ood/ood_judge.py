"""A threshold on scores of images, and how well it tells those in distribution from others."""

from dataclasses import dataclass

import numpy as np

from fastcnn.errors import UsageError

QUANTILE = 0.05  # of the in-distribution images that a threshold may lose


@dataclass(frozen=True)
class Detection:
    """One score's figures; all but the threshold are fractions of 1.

    An image counts as in-distribution where its score reaches the threshold. accuracy: share of
    all images of both sets that are told rightly, as in murgolo's table 2: each image weighs the
    same, so a set ten times as large weighs ten times as much. balanced_accuracy: the mean of both
    sets' shares. auroc: chance that an in-distribution image scores above one out of distribution,
    ties half. fpr95: share of out-of-distribution images that reach the largest in-distribution
    score that at least 95 % of the in-distribution images reach; nothing is interpolated.
    kept_fit, kept_in, kept_out: share of each set that reaches the threshold.
    """

    threshold: float
    accuracy: float
    balanced_accuracy: float
    auroc: float
    fpr95: float
    kept_fit: float
    kept_in: float
    kept_out: float


def judge(
    fit: np.ndarray, held_in: np.ndarray, held_out: np.ndarray, quantile: float = QUANTILE
) -> Detection:
    """Choose a threshold on the scores `fit`, and judge it on test images in and out of
    distribution.

    Scores: (n,), finite, higher for in-distribution. The threshold is the largest score that at
    most the part `quantile` of `fit` stays below, so that 1 - quantile of it are kept; below it =
    out of distribution. Raises UsageError for a quantile outside [0, 1), ValueError for no scores
    or such as are not finite.
    """
    from sklearn.metrics import roc_auc_score

    check_quantile(quantile)
    sets = {"fit": fit, "held_in": held_in, "held_out": held_out}
    for name, values in sets.items():
        if np.ndim(values) != 1 or len(values) == 0 or not np.isfinite(values).all():
            raise ValueError(f"{name}: expected finite scores (n,), got {np.shape(values)}")
    threshold = _cut(fit, quantile)
    kept = {name: float(np.mean(values >= threshold)) for name, values in sets.items()}
    right = np.concatenate([held_in >= threshold, held_out < threshold])
    inside = np.repeat([1, 0], [len(held_in), len(held_out)])
    return Detection(
        threshold=threshold,
        accuracy=float(right.mean()),
        balanced_accuracy=(kept["held_in"] + 1 - kept["held_out"]) / 2,
        auroc=float(roc_auc_score(inside, np.concatenate([held_in, held_out]))),
        fpr95=float(np.mean(held_out >= _cut(held_in, 0.05))),
        kept_fit=kept["fit"],
        kept_in=kept["held_in"],
        kept_out=kept["held_out"],
    )


def check_quantile(quantile: float) -> None:
    """Raise UsageError for a part that no threshold can lose."""
    if not 0 <= quantile < 1:
        raise UsageError(f"--quantile: expected 0 or more, less than 1, got {quantile}")


def _cut(values: np.ndarray, lost: float) -> float:
    """The largest of `values` that at most the part `lost` of them stays below."""
    return float(np.sort(values)[int(lost * len(values))])
