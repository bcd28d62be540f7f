"""What is left out of the images, and when that is refused: unreadable files, grey images, images
of another size."""

import contextlib
import csv
import io
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fastcnn.cache import cache_dir
from fastcnn.config import DataConfig, options_by_name
from fastcnn.data.store import Dataset, LeftOut, fingerprint
from fastcnn.errors import DataError

log = logging.getLogger(__name__)

NAMED_BAD = 3  # unreadable files that an error names
LARGEST_ADVISED = 224  # --image-size that is advised at most: what networks for photographs take
Shaped = tuple[str, tuple[int, int], bool]  # path, height and width, and greyness of an image


class OneSize:
    """Raises DataError for the first image of another size than the first of all, unless every
    image is resized."""

    def __init__(self, where: Path, config: DataConfig):
        self.where, self.config = where, config
        self.first: tuple[str, tuple[int, int]] | None = None
        self.sizes: Counter[tuple[int, int]] = Counter()

    def __call__(self, images: Iterable[Shaped]) -> None:
        """Look at some more images, whose sizes all count for the advice. Grey ones do not count
        if they are left out."""
        if self.config.image_size:
            return
        odd: tuple[str, tuple[int, int]] | None = None
        for path, shape, grey in images:
            if grey and self.config.grayscale == "drop":
                continue
            self.sizes[shape] += 1
            self.first = self.first or (path, shape)
            if odd is None and shape != self.first[1]:
                odd = path, shape
        if self.first and odd:
            (first, (height, width)), (path, (odd_height, odd_width)) = self.first, odd
            raise DataError(
                f"{self.where}: images of different sizes: {path} has {odd_width} x {odd_height} "
                f"pixels, {first} {width} x {height}; give one size with --image-size, e.g. "
                f"--image-size {advised_side(self.sizes)}"
            )


def advised_side(sizes: Mapping[tuple[int, int], int]) -> int:
    """Return the --image-size to advise for so many images of each height and width: the median of
    their shorter sides, a multiple of 8, within what the option and networks take."""
    sides = np.repeat([min(size) for size in sizes], list(sizes.values()))
    side, lowest = int(np.median(sides)), options_by_name()["image_size"].bounds["low"]
    return max(lowest, min(LARGEST_ADVISED, side - side % 8))


def refuse_bad(where: Path, left_out: LeftOut, images: int, config: DataConfig) -> None:
    """Raise DataError if files cannot be read, unless --on-bad-image skip allows for that many of
    `images`, the number of all."""
    bad = left_out.bad
    if not bad:
        return
    noun, them = ("file", "it") if len(bad) == 1 else ("files", "them")
    found = f"{where}: {len(bad)} unreadable image {noun}"
    if config.on_bad_image == "refuse":
        raise DataError(
            f"{found}: {_named(where, bad)}; replace or remove {them}, or leave {them} out with "
            "--on-bad-image skip"
        )
    if len(bad) > config.bad_limit * images:
        raise DataError(
            f"{found} of {images}, more than --bad-limit {config.bad_limit:g} allows: "
            f"{_named(where, bad)}"
        )


def checked(dataset: Dataset, where: Path, config: DataConfig) -> Dataset:
    """Return `dataset` if what its reader left out is allowed, and say what that was.

    Also for what was packed under another --on-bad-image. Raises DataError as refuse_bad.
    """
    bad, grey = dataset.left_out.bad, dataset.left_out.grey
    parts = (dataset.train, dataset.test, dataset.val or ())
    images = sum(map(len, parts)) + len(bad) + grey
    refuse_bad(where, dataset.left_out, images, config)
    if bad:
        text = "%s: %d of %d images left out, unreadable: %s"
        log.warning(text, where, len(bad), images, _named(where, bad))
    if grey:
        log.info("%s: %d of %d images left out, grey", where, grey, images)
    return dataset


def _named(where: Path, bad: Sequence[tuple[str, str]]) -> str:
    """Name the first few; of more, name a file of the cache folder that lists them all."""
    named = "; ".join(f"{path}: {reason}" for path, reason in bad[:NAMED_BAD])
    if len(bad) <= NAMED_BAD:
        return named
    more = f"{named}; and {len(bad) - NAMED_BAD} more"
    with contextlib.suppress(OSError):
        listed = cache_dir() / f"unreadable-{fingerprint(str(where.resolve()))[:16]}.csv"
        listed.write_text(bad_table(bad), encoding="utf-8")
        return f"{more}, all listed in {listed}"
    return more


def bad_table(bad: Sequence[tuple[str, str]]) -> str:
    """Return unreadable files, path and reason, as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("path", "reason"), *bad])
    return text.getvalue()


def refuse_lost_classes(
    where: Path, classes: Sequence[str], labels: dict[str, np.ndarray], kept: dict[str, np.ndarray]
) -> None:
    """Raise DataError for a class of which a split had images and has none left.

    labels: int64 (N,) per split, of all images; kept: bool (N,), those not left out.
    """
    for split, numbers in labels.items():
        lost = np.setdiff1d(numbers, numbers[kept[split]])
        if len(lost):
            raise DataError(
                f"{where}: class '{classes[int(lost[0])]}' has no {split} images left: all are "
                "unreadable or grey; add some, or remove the class"
            )
