"""scikit-learn's handwritten digits: 1,797 grey images of 8x8, there without a download."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastcnn.data.decode import resize
from fastcnn.data.sources.base import Contents
from fastcnn.data.sources.layout import stratum
from fastcnn.errors import UsageError
from fastcnn.text import first_line

CLASSES = tuple("0123456789")
TEST_FRACTION = 0.2  # fixed, so that figures compare


@dataclass(frozen=True)
class Digits:
    """The digits as RGB of `side` pixels a side, for they have no size of their own; four fifths of
    each class to train. Raises UsageError where scikit-learn is missing or broken."""

    side: int
    name: str = "digits"
    where: Path = Path("digits")
    in_files: bool = False

    def identity(self, seen: list[Any]) -> list[Any]:
        return ["digits", self.side]

    def contents(self) -> Contents:
        return _contents(self.side)


def _contents(side: int) -> Contents:
    try:
        from sklearn import datasets
    except Exception as error:  # a broken package raises anything
        raise UsageError(
            f"--data digits: scikit-learn cannot be imported ({first_line(error)}); "
            "pip install scikit-learn"
        ) from error
    grey, labels = datasets.load_digits(return_X_y=True)
    pixels = np.rint(grey.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8).repeat(3, axis=3)
    held = np.concatenate(
        [
            np.flatnonzero(labels == label)[stratum((labels == label).sum(), TEST_FRACTION, name)]
            for label, name in enumerate(CLASSES)
        ]
    )
    parts = {"train": np.setdiff1d(np.arange(len(labels)), held), "test": np.sort(held)}
    return Contents(
        Path("digits"),
        CLASSES,
        {split: labels[chosen].astype(np.int64) for split, chosen in parts.items()},
        blocks=(
            (split, range(len(chosen)), resize(pixels[chosen], side))
            for split, chosen in parts.items()
        ),
    )
