"""Which images are used: what is left out, subsets, the validation part; and what is refused."""

import contextlib
import csv
import hashlib
import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from fastcnn.cache import cache_dir, fingerprint
from fastcnn.config import DataConfig, options_by_name
from fastcnn.data.draws import derive_seed
from fastcnn.data.images import Dataset, Files, Images, LeftOut
from fastcnn.data.scan import Scanning
from fastcnn.data.sources.base import Block, Contents
from fastcnn.errors import DataError, UsageError

log = logging.getLogger(__name__)

NAMED_BAD = 3  # unreadable files that an error names
LARGEST_ADVISED = 224  # --image-size that is advised at most: what networks for photographs take
Shaped = tuple[str, tuple[int, int], bool]  # path, height and width, and greyness of an image


@dataclass
class Selection:
    """What the store gets.

    `labels` holds int64 (N,) per split. `blocks` yields (split, positions, pixels), pixels uint8
    (n, H, W, 3), in any order, every position once but for those that are left out; none of images
    that stay in their files. At their end, what a `scanning` of encoded images tells is whole:
    kept: bool (N,) per split, what is not left out. sides: height and width of the images as
    evaluation sees them.
    """

    classes: tuple[str, ...]
    labels: dict[str, np.ndarray]
    blocks: Iterator[Block]
    scanning: Scanning | None = None
    kept: dict[str, np.ndarray] = field(default_factory=dict)
    left_out: LeftOut = LeftOut()
    sides: tuple[int, int] = (0, 0)


def select_images(scanning: Scanning, config: DataConfig) -> Selection:
    """Return the images that are used, examined as their blocks are asked for.

    Then DataError is raised for files that cannot be decoded (all are tried, the first few named)
    unless the options leave them out, for images of different sizes without --image-size, and for a
    class of which nothing is left.
    """
    contents = scanning.contents
    selection = Selection(contents.classes, contents.labels, scanning.blocks)
    if contents.encoded is not None:
        selection.scanning, selection.blocks = scanning, _blocks(scanning, selection, config)
    return selection


def _blocks(scanning: Scanning, selection: Selection, config: DataConfig) -> Iterator[Block]:
    """Yield the images that were kept in memory; choose, and refuse, at the end, so that every
    unreadable file is known."""
    one_size = OneSize(scanning.contents.where, config)
    with contextlib.closing(scanning.chunks) as chunks:
        for chunk in chunks:
            one_size((s.path, r.shape, r.grey) for s, r in chunk if not r.reason)
            good: dict[str, list[tuple[int, np.ndarray]]] = {}
            for image, record in chunk:
                if record.pixels is not None and not (record.grey and config.grayscale == "drop"):
                    good.setdefault(image.split, []).append((image.position, record.pixels))
            for split, pairs in good.items():
                positions, images = zip(*pairs, strict=True)
                # a single one may be too large to be there twice
                pixels = np.stack(images) if len(images) > 1 else images[0][None]
                yield split, list(positions), pixels
    _choose(scanning, selection, config)


def _choose(scanning: Scanning, selection: Selection, config: DataConfig) -> None:
    """Note what is left out. Raises DataError where the options do not allow for that."""
    contents, found = scanning.contents, scanning.found
    where, names = contents.where, contents.names
    bad = tuple((names[at], reason) for at, reason in found.reasons.items())
    unread = tuple(names[at] for at in found.reasons if not found.hashes[at].any())
    readable = np.ones(len(names), dtype=bool)
    readable[list(found.reasons)] = False
    dropped = readable & found.grey & (config.grayscale == "drop")
    selection.left_out = LeftOut(bad, int(dropped.sum()), unread)
    refuse_bad(where, selection.left_out, len(names), config)
    kept = readable & ~dropped
    selection.kept = contents.by_split(kept)
    refuse_lost_classes(where, contents.classes, contents.labels, selection.kept)
    if config.image_size:
        selection.sides = config.image_size, config.image_size
        return
    # images known from before count too
    shapes, at = found.shapes[kept], np.flatnonzero(kept)
    if (shapes != shapes[0]).any():
        sizes = map(tuple, shapes.tolist())
        OneSize(where, config)((names[i], size, False) for i, size in zip(at, sizes, strict=True))
    selection.sides = int(shapes[0, 0]), int(shapes[0, 1])


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


def warn_ignored(contents: Contents) -> None:
    """Say how many files are no images of a class."""
    if contents.ignored:
        noun = "file" if contents.ignored == 1 else "files"
        log.warning(
            "%s: %d %s left out: not images of a class", contents.where, contents.ignored, noun
        )


def checked(dataset: Dataset, where: Path, config: DataConfig) -> Dataset:
    """Return `dataset` if what was left out of it is allowed, and say what that was.

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


def split(dataset: Dataset, config: DataConfig, seed: int) -> Dataset:
    """Draw --train-subset and --test-subset, then hold out --val-fraction of what is left.

    Uniform without replacement; chosen images keep their order. Raises UsageError for a subset
    larger than the set and for a fraction beside a val/ folder, DataError for an empty part.
    """
    if config.val_fraction > 0 and dataset.val is not None:
        raise UsageError("--val-fraction: the data has a val/ folder already; leave one out")
    digest = hashlib.sha256(dataset.digest.encode())
    train = _subset(dataset.train, config.train_subset, "train", seed, digest)
    test = _subset(dataset.test, config.test_subset, "test", seed, digest)
    val = dataset.val
    if config.val_fraction > 0:
        train, val = _hold_out(train, config.val_fraction, seed, digest)
    if train is dataset.train and test is dataset.test:
        return dataset
    return replace(dataset, train=train, test=test, val=val, digest=digest.hexdigest())


def _subset(
    images: Images | Files, count: int | None, name: str, seed: int, digest: "hashlib._Hash"
) -> Images | Files:
    if count is None:
        return images
    if count > len(images):
        raise UsageError(f"--{name}-subset {count}: there are {len(images)} {name} images")
    chosen = np.sort(_permutation(len(images), f"{name} subset", seed)[:count])
    digest.update(name.encode() + chosen.tobytes())
    return images.take(chosen)


def _hold_out(
    images: Images | Files, fraction: float, seed: int, digest: "hashlib._Hash"
) -> tuple[Images | Files, Images | Files]:
    count = round(len(images) * fraction)
    if not 0 < count < len(images):
        raise DataError(
            f"--val-fraction {fraction}: of {len(images)} training images it holds out {count}, "
            "which leaves no image for one of the two"
        )
    order = _permutation(len(images), "validation", seed)
    held, kept = np.sort(order[:count]), np.sort(order[count:])
    digest.update(b"val" + held.tobytes())
    return images.take(kept), images.take(held)


def _permutation(count: int, purpose: str, seed: int) -> np.ndarray:
    return np.random.default_rng(derive_seed(seed, purpose)).permutation(count)
