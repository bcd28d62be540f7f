"""Whether a network is right as often as its probabilities say."""

from dataclasses import dataclass

import numpy as np

BINS = 15  # as in Guo et al. 2017


@dataclass(frozen=True)
class Calibration:
    """Figures of n images; confidence is the largest probability of an image.

    ece: expected calibration error Σ (n_b / n) |accuracy_b - confidence_b|, mce: the largest of
    those gaps, over bins of equal width, (low, high] (Guo et al. 2017, equations 3 and 5). brier:
    mean Σ_k (p_k - y_k)², 0 to 2 (Brier 1950). nll: mean -log p of the true class, nats.
    confidence: mean over all images. edges: float64 (bins + 1,); counts int64, accuracies and
    confidences float64, (bins,) each: means of a bin, NaN in an empty one.
    """

    ece: float
    mce: float
    brier: float
    nll: float
    accuracy: float
    confidence: float
    edges: np.ndarray
    counts: np.ndarray
    accuracies: np.ndarray
    confidences: np.ndarray


def calibrate(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Calibration:
    """Compare the softmax of finite logits (n, classes) with labels int64 (n,), n > 0; computed in
    fp64. Right is an image whose class has the largest logit, of equal ones the first."""
    scores = logits.astype(np.float64)
    scores = scores - scores.max(1, keepdims=True)
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    probabilities = np.exp(logs)
    every = np.arange(len(labels))
    # of the logits: rounded probabilities can be equal where these are not
    right = logits.argmax(1) == labels
    confidence = probabilities.max(1)
    edges = np.linspace(0, 1, bins + 1)
    place = np.searchsorted(edges, confidence.clip(max=1), side="left") - 1
    counts = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # empty bins
        accuracies = np.bincount(place, right, bins) / counts
        confidences = np.bincount(place, confidence, bins) / counts
    gaps = np.abs(accuracies - confidences)[counts > 0]
    others = probabilities.copy()
    others[every, labels] -= 1
    return Calibration(
        ece=float((gaps * counts[counts > 0]).sum() / len(labels)),
        mce=float(gaps.max()),
        brier=float((others**2).sum(1).mean()),
        nll=float(-logs[every, labels].mean()),
        accuracy=float(right.mean()),
        confidence=float(confidence.mean()),
        edges=edges,
        counts=counts,
        accuracies=accuracies,
        confidences=confidences,
    )
