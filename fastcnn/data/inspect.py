"""What `fastcnn data` finds out about images: check (every file is decoded), pack and show.

Each returns plain values, fit for JSON, and has a function that puts them into lines of text.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fastcnn.cache import cache_dir
from fastcnn.config import DataConfig
from fastcnn.data import load_dataset
from fastcnn.data.draws import derive_seed
from fastcnn.data.examine import View
from fastcnn.data.images import Dataset
from fastcnn.data.normalize import Normalization
from fastcnn.data.scan import scan_images
from fastcnn.data.select import advised_side
from fastcnn.data.sources import Archive, Contents, Folder, open_source
from fastcnn.data.store import is_packed

DIGITS_SIDE = 32  # of the digits, which have no size of their own
SIZES_SHOWN = 5  # of the commonest sizes of images, in the text
CLASSES_SHOWN = 20  # with more, the text names the extremes alone
UNEVEN = 10  # times as many images in one class as in another are worth a line


def check(config: DataConfig) -> dict[str, Any]:
    """Decode every image that `config.data` names and return what was found.

    `unreadable` lists {path, reason}; `classes` holds {class: {split: images}}; `sizes` is
    [{width, height, images}], the commonest first; `path` is the folder or archive. Of a
    data set with a name alone, which was checked when it was packed, `path`, `grey` and `odd` are
    None. Raises DataError for a layout that training would refuse too.
    """
    source = open_source(config, DIGITS_SIDE, partial(is_packed, config))
    if not isinstance(source, Folder | Archive):
        dataset = load_dataset(config, DIGITS_SIDE)
        sizes = Counter({dataset.train.sides: sum(len(part) for _, part in parts_of(dataset))})
        return _report(config, "data set by name", packed_counts(dataset), sizes, 0)
    contents = source.contents()
    found = scan_images(contents, View.of(config), keep_pixels=False).finish()
    readable = np.ones(len(found.grey), dtype=bool)
    readable[list(found.reasons)] = False
    sizes = Counter(map(tuple, found.shapes[readable].tolist()))
    counts = _counted(contents.classes, contents.labels)
    report = _report(config, source.kind, counts, sizes, contents.ignored)
    report["path"] = str(source.where)
    names = contents.names
    report["grey"] = int(found.grey.sum())
    report["odd"] = int((readable & ~found.plain).sum())
    report["unreadable"] = [
        {"path": names[i], "reason": reason} for i, reason in sorted(found.reasons.items())
    ]
    report["test_fraction"] = config.test_fraction if _is_split_by_fraction(contents) else None
    return report | {"advice": _advice(report, sizes, config)}


def _is_split_by_fraction(contents: Contents) -> bool:
    """Return whether the same folders hold training and test images."""
    train, test = (
        {path.rpartition("/")[0] for path in contents.paths[split]} for split in ("train", "test")
    )
    return not train.isdisjoint(test)


def packed_counts(dataset: Dataset) -> dict[str, dict[str, int]]:
    return _counted(dataset.classes, {name: part.labels for name, part in parts_of(dataset)})


def parts_of(dataset: Dataset) -> Iterator[tuple[str, Any]]:
    """Yield name and images of every split there is."""
    for name in ("train", "val", "test"):
        if (part := getattr(dataset, name)) is not None:
            yield name, part


def _counted(classes: tuple[str, ...], labels: dict[str, np.ndarray]) -> dict[str, dict[str, int]]:
    """Return {class: {split: images}} of int64 (N,) labels per split."""
    counts = {
        split: np.bincount(labels[split], minlength=len(classes)).tolist()
        for split in ("train", "val", "test")
        if split in labels
    }
    return {
        name: {split: counts[split][label] for split in counts}
        for label, name in enumerate(classes)
    }


def _report(
    config: DataConfig,
    kind: str,
    classes: dict[str, dict[str, int]],
    sizes: Counter[tuple[int, int]],
    ignored: int,
) -> dict[str, Any]:
    return {
        "data": config.data,
        "path": None,
        "kind": kind,
        "images": sum(sum(counts.values()) for counts in classes.values()),
        "ignored_files": ignored,
        "splits": {split: _spread(classes, split) for split in next(iter(classes.values()))},
        "test_fraction": None,
        "sizes": [
            {"width": width, "height": height, "images": images}
            for (height, width), images in sorted(sizes.items(), key=lambda item: (-item[1], item))
        ],
        "grey": None,
        "odd": None,
        "unreadable": [],
        "advice": [],
        "classes": classes,
    }


def _spread(classes: dict[str, dict[str, int]], split: str) -> dict[str, Any]:
    counts = {name: of_class[split] for name, of_class in classes.items()}
    fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
    return {
        "images": sum(counts.values()),
        "min": counts[fewest],
        "median": median(counts.values()),
        "max": counts[most],
        "fewest": fewest,
        "most": most,
    }


def _advice(
    report: dict[str, Any], sizes: Counter[tuple[int, int]], config: DataConfig
) -> list[str]:
    advice = []
    if bad := len(report["unreadable"]):
        part = bad / report["images"]
        skip = f"--on-bad-image skip{f' --bad-limit {_above(part)}' if part > 0.05 else ''}"
        advice.append(f"replace or remove what is unreadable, or leave it out with {skip}")
    if len(report["sizes"]) > 1 and config.image_size is None:
        side = advised_side(sizes)
        advice.append(f"the images have {len(report['sizes']):,} sizes: give --image-size {side}")
        if any(size["width"] != size["height"] for size in report["sizes"]):
            advice.append("--resize crop keeps the proportions of images that are not square")
    if report["grey"] and config.grayscale == "rgb":
        advice.append("grey images count as RGB; --grayscale drop leaves them out")
    train = report["splits"]["train"]
    if train["max"] > UNEVEN * train["min"]:
        advice.append(
            f"uneven classes: {train['most']} has {train['max']:,} training images, "
            f"{train['fewest']} {train['min']:,}"
        )
    return advice


def _above(part: float) -> float:
    """Return the next hundredth above a part of all images."""
    return min(1.0, (int(part * 100) + 1) / 100)


def check_text(report: dict[str, Any]) -> str:
    """What check found, in lines."""
    classes = report["classes"]
    lines = [
        f"{_place(report)}: {report['kind']}, {len(classes):,} classes, {_images(report['images'])}"
    ]
    lines += [_split_line(split, spread) for split, spread in report["splits"].items()]
    if report["test_fraction"] is not None:
        lines.append(f"  split by --test-fraction {report['test_fraction']:g}: there is no test/")
    if len(classes) <= CLASSES_SHOWN:
        lines += ["classes:", *(_class_line(name, counts) for name, counts in classes.items())]
    lines += _size_lines(report["sizes"])
    if report["ignored_files"]:
        lines.append(f"no images of a class: {_files(report['ignored_files'])}, left out")
    if report["grey"]:
        lines.append(f"grey: {_files(report['grey'])}")
    if report["odd"]:
        lines.append(f"transparent, or neither JPEG, PNG, BMP nor PPM: {_files(report['odd'])}")
    lines.append(f"unreadable: {_files(len(report['unreadable']))}")
    lines += [f"  {bad['path']}: {bad['reason']}" for bad in report["unreadable"]]
    return "\n".join(lines + [f"advice: {line}" for line in report["advice"]])


def unreadable_line(report: dict[str, Any]) -> str:
    """The error that ends a check which found unreadable files."""
    bad = len(report["unreadable"])
    return f"{_place(report)}: {_files(bad)} of {report['images']:,} cannot be read"


def _place(report: dict[str, Any]) -> str:
    """The folder or archive as errors and warnings of training name it, or the name of the data."""
    return str(report["path"] or report["data"])


def _files(count: int) -> str:
    return f"{count:,} file" if count == 1 else f"{count:,} files"


def _images(count: int) -> str:
    return f"{count:,} image" if count == 1 else f"{count:,} images"


def _split_line(split: str, spread: dict[str, Any]) -> str:
    line = f"  {split}: {_images(spread['images'])}, "
    if spread["min"] == spread["max"]:
        return f"{line}{spread['min']:,} a class"
    return (
        f"{line}{spread['min']:,} to {spread['max']:,} a class, median {spread['median']:,g} "
        f"(fewest: {spread['fewest']}, most: {spread['most']})"
    )


def _class_line(name: str, counts: dict[str, int]) -> str:
    return f"  {name}: " + ", ".join(f"{split} {count:,}" for split, count in counts.items())


def _size_lines(sizes: list[dict[str, int]]) -> list[str]:
    images = sum(size["images"] for size in sizes)
    lines = ["sizes, width x height:"] + [
        f"  {size['width']} x {size['height']}: {_images(size['images'])} "
        f"({size['images'] / images:.1%})"
        for size in sizes[:SIZES_SHOWN]
    ]
    if len(sizes) > SIZES_SHOWN:
        widths = [size["width"] for size in sizes]
        heights = [size["height"] for size in sizes]
        lines.append(
            f"  {len(sizes) - SIZES_SHOWN:,} more, {min(widths)} x {min(heights)} to "
            f"{max(widths)} x {max(heights)}"
        )
    return lines if sizes else []


def pack(config: DataConfig) -> dict[str, Any]:
    """Pack the images into the cache, unless they are there, and say where and at what rate.

    `seconds` and `images_per_s` are None for images that were packed before. Raises DataError as
    training would, for unreadable files for example.
    """
    before = {entry.name for entry in cache_dir().iterdir()}
    start = time.perf_counter()
    dataset = load_dataset(replace(config, store="packed"), DIGITS_SIDE)
    seconds = time.perf_counter() - start
    entry = _entry_of(dataset.train)
    counts = {name: len(part) for name, part in parts_of(dataset)}
    new = entry.name not in before
    height, width = dataset.train.sides
    return {
        "data": config.data,
        "entry": str(entry),
        "packed_at": datetime.fromtimestamp((entry / "meta.json").stat().st_mtime).isoformat(
            " ", "seconds"
        ),
        "bytes": sum(file.stat().st_size for file in entry.iterdir()),
        "images": counts,
        "width": width,
        "height": height,
        "new": new,
        "seconds": round(seconds, 3) if new else None,
        "images_per_s": round(sum(counts.values()) / seconds) if new else None,
        "unreadable": [{"path": path, "reason": text} for path, text in dataset.left_out.bad],
        "grey_dropped": dataset.left_out.grey,
    }


def _entry_of(images: Any) -> Path:
    """Return the folder of the cache that packed images are mapped from."""
    return Path(images.pixels.filename).parent


def pack_text(report: dict[str, Any]) -> str:
    """What pack did, in lines."""
    images = report["images"]
    counts = ", ".join(f"{name} {count:,}" for name, count in images.items())
    what = f"{_images(sum(images.values()))} ({counts}) of {report['width']} x {report['height']}"
    if report["new"]:
        rate = f"{report['seconds']:.1f} s, {report['images_per_s']:,} images/s"
        how = f"packed {what} pixels in {rate}"
    else:
        how = f"{what} pixels are packed already, since {report['packed_at']}"
    lines = [f"{report['data']}: {how}", f"  {report['entry']}: {report['bytes']:,} bytes"]
    if report["unreadable"]:
        lines.append(f"  left out, unreadable: {_files(len(report['unreadable']))}")
    if report["grey_dropped"]:
        lines.append(f"  left out, grey: {_files(report['grey_dropped'])}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Samples:
    """Training images drawn for a picture: pixels uint8 (n, H, W, 3), labels int64 (n,) rising."""

    pixels: np.ndarray
    labels: np.ndarray


def show(config: DataConfig, samples: int, seed: int) -> tuple[dict[str, Any], Samples]:
    """Return the counts of every class, the training images' channel mean and std in [0, 1], as
    the normalisation takes them, and `samples` of those images. Raises DataError as training."""
    dataset = load_dataset(config, DIGITS_SIDE)
    fitted = Normalization.fit(dataset.train, "zscore")
    chosen = draw_samples(dataset.train.labels, samples, seed)
    drawn = Samples(dataset.train.pixels_of(chosen), dataset.train.labels[chosen])
    height, width = dataset.train.sides
    report = {
        "data": config.data,
        "name": dataset.name,
        "width": width,
        "height": height,
        "images": {name: len(part) for name, part in parts_of(dataset)},
        "mean": list(fitted.mean),
        "std": list(fitted.std),
        "classes": packed_counts(dataset),
    }
    return report, drawn


def draw_samples(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Return int64 positions of at most `count` images, in the order of their labels int64 (N,).

    Classes have one image each before any has two, in an order drawn by the seed as the images are.
    """
    rng = np.random.default_rng(derive_seed(seed, "samples"))
    order = rng.permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], labels[by_class])
    turn = np.arange(len(labels)) - starts  # how many of its class come before it
    drawn = rng.permutation(int(labels.max()) + 1)[labels[by_class]]
    chosen = by_class[np.lexsort((drawn, turn))[:count]]
    return chosen[np.argsort(labels[chosen], kind="stable")]


def show_text(report: dict[str, Any]) -> str:
    """What show found and drew, in lines."""
    counts = ", ".join(f"{name} {count:,}" for name, count in report["images"].items())
    lines = [
        f"{report['data']}: {len(report['classes']):,} classes, {counts} images of "
        f"{report['width']} x {report['height']} pixels"
    ]
    for name in ("mean", "std"):
        values = " ".join(f"{value:.4f}" for value in report[name])
        lines.append(f"  {name} of red, green, blue: {values}")
    return "\n".join(lines + [f"  {path}" for path in report["figures"]])
