"""Whether a variant computes what it should: its errors against fp64, beside those of eager torch.

A variant that is wrong must not be timed.
"""

import math

from torch import Tensor

from fastcnn.errors import FastcnnError

EAGER = "eager"  # the variant that the others are judged by
MOST = 0.1  # that eager itself may err, beyond what a variant may


def errors_of(
    results: dict[str, Tensor], truth: dict[str, Tensor], floor: float = 1e-30
) -> dict[str, float]:
    """Return the mean error of every tensor over its mean value, or over `floor` where that is
    larger; NaN where one holds a NaN or has another shape.

    A mean, since a window whose largest values differ by less than a rounding may choose another
    of them: a few large errors, which a maximum or a sum of squares would show alone.
    """
    found = {}
    for name, true in truth.items():
        if results[name].shape != true.shape:
            found[name] = math.nan
            continue
        error = (results[name].double() - true).abs().mean()
        found[name] = (error / true.abs().mean().clamp(min=floor)).item()
    return found


def wrong_ones(
    errors: dict[str, dict[str, float]], slack: float | dict[str, float], most: float = MOST
) -> dict[str, str]:
    """Return the variants that must not be timed, each with what is wrong.

    One is right if no tensor errs more than twice as much as eager's, plus slack (one for all, or
    by tensor); eager itself, if none errs by more than `most`.
    """
    wrong: dict[str, str] = {}
    for variant, found in errors.items():
        for name, error in found.items():
            extra = slack if isinstance(slack, float) else slack[name]
            limit = most if variant == EAGER else 2 * errors[EAGER][name] + extra
            if not error <= limit:  # a NaN is not
                wrong.setdefault(variant, f"{name} errs by {error:.3g}, allowed is {limit:.3g}")
    return wrong


def reason_of(error: Exception) -> str:
    """An exception in a line, for the row of a variant that failed."""
    kind = "" if isinstance(error, FastcnnError) else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:300]
