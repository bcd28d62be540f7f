"""From the paths of image files to splits and classes; the same for a folder and for a tar.

    train/<class>/…, with test/ or val/ or both    val/ beside test/ is for validation, alone it
                                                   is the test set; in capitals too
    <class>/…                                      a fixed part of every class becomes the test set

A single folder around either layout is looked through. Hidden files are left out.
"""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np

from fastcnn.data.decode import EXTENSIONS
from fastcnn.data.draws import derive_seed
from fastcnn.data.sources.base import SPLITS, Contents, check_labels
from fastcnn.data.sources.paths import check_utf8
from fastcnn.errors import DataError

TEST_SPLIT_SEED = 0  # class folders are split alike in every run, whatever its seed

Parts = tuple[str, ...]
Classes = dict[str, list[str]]  # class name → paths of its images, both sorted


def listed(
    where: str, classes: Parts, splits: dict[str, list[tuple[str, int]]], ignored: int
) -> Contents:
    """Return what lies below `where`, not readable yet, from (path, label) of the images per split.

    Raises DataError for fewer than two classes and for an empty split.
    """
    labels = {
        split: np.array([label for _, label in items], dtype=np.int64)
        for split, items in splits.items()
    }
    try:
        check_labels(classes, labels)
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    paths = {split: [path for path, _ in items] for split, items in splits.items()}
    return Contents(Path(where), classes, labels, paths=paths, ignored=ignored)


def normal_name(name: str) -> str:
    """A relative path as pathlib writes it, in less time: an archive may hold millions."""
    return "/".join(part for part in name.split("/") if part not in ("", ".")) or "."


def find_layout(
    where: str, files: Iterable[str], folders: Iterable[str], test_fraction: float
) -> Contents:
    """Sort the files below the root `where` into splits and classes.

    `folders` are those that exist, maybe empty. Raises DataError for a name that is not UTF-8, no
    images, one class only, a class without images, train/ without its test images, folders that
    look like splits under other names, and splits with different classes.
    """
    seen, kept = _visible(where, files), _visible(where, folders)
    if not seen:
        raise DataError(f"{where}: no files; expected folders of images, one a class")
    root = _outer(seen, kept)
    depth = len(root)
    tops = {path[depth] for path in kept if len(path) > depth}
    tops |= {path[depth] for path in seen if len(path) > depth + 1}
    splits = _splits(where, root, tops, seen, kept, test_fraction)
    classes = _common_classes(where, splits)
    numbered = {
        split: [(path, label) for label, name in enumerate(classes) for path in found[name]]
        for split, found in splits.items()
    }
    ignored = len(seen) - sum(map(len, numbered.values()))
    return listed(where, classes, numbered, ignored)


def _visible(where: str, paths: Iterable[str]) -> list[Parts]:
    visible: list[Parts] = []
    for path in paths:
        parts = PurePosixPath(path).parts
        if parts and not any(part.startswith(".") for part in parts):
            check_utf8(where, path)
            visible.append(parts)
    return visible


def _outer(files: list[Parts], folders: list[Parts]) -> Parts:
    """Return the folders around the layout: single ones with at least two levels inside."""
    outer: Parts = ()
    while True:
        depth = len(outer)
        tops = {path[depth] for path in files + folders if len(path) > depth}
        named = any(top.lower() in SPLITS for top in tops)
        if len(tops) > 1 or named or any(len(path) < depth + 3 for path in files):
            return outer
        outer += tuple(tops)


def _splits(
    where: str,
    root: Parts,
    tops: set[str],
    files: list[Parts],
    folders: list[Parts],
    test_fraction: float,
) -> dict[str, Classes]:
    """Return the images by split and class."""

    def below(*inner: str) -> Classes:
        return _by_class("/".join((where, *inner)), (*root, *inner), files, folders)

    named = _split_folders(where, tops)
    tests = [named[split] for split in ("test", "val") if split in named]
    if "train" not in named:
        if tests:
            raise DataError(f"{where}: has {tests[0]}/ but no train/")
        _refuse_misnamed_splits(where, root, tops, files, folders)
        return _stratified(where, below(), test_fraction)
    train = named["train"]
    if tests:
        sources = dict(zip(("test", "val"), tests, strict=False))
        return {"train": below(train), **{to: below(source) for to, source in sources.items()}}
    if others := tops - {train}:
        raise DataError(
            f"{where}: has {train}/ and {min(others)}/; call the test images' folder test/ or, if "
            f"{train} is a class, rename it"
        )
    return _stratified(where, below(train), test_fraction)


def _split_folders(where: str, tops: set[str]) -> dict[str, str]:
    """Return the folder of every split that has one, whatever its case."""
    found: dict[str, str] = {}
    for name in sorted(tops):
        split = name.lower()
        if split not in SPLITS:
            continue
        if split in found:
            raise DataError(f"{where}: has {found[split]}/ and {name}/; keep one of them")
        found[split] = name
    return found


def _refuse_misnamed_splits(
    where: str, root: Parts, tops: set[str], files: list[Parts], folders: list[Parts]
) -> None:
    """Refuse training/ and testing/, whose folders would count as two classes: all hold the same
    two or more folders, and no image lies beside those. (One alone, as in Tiny ImageNet's
    <class>/images/, is no split's: a split has two classes.)"""
    depth = len(root)
    inner: dict[str, set[str]] = {top: set() for top in tops}
    for path in files:
        if len(path) == depth + 2 and PurePosixPath(path[-1]).suffix.lower() in EXTENSIONS:
            return
    holders = [path for path in folders if len(path) > depth + 1]
    for path in holders + [path[:-1] for path in files if len(path) > depth + 2]:
        inner[path[depth]].add(path[depth + 1])
    shared = next(iter(inner.values()), set())
    if len(tops) > 1 and len(shared) > 1 and all(names == shared for names in inner.values()):
        raise DataError(
            f"{where}: {_some(tops, '/')} all hold the same folders ({_some(shared)}), as splits "
            "do, not classes; expected train/ with test/ or val/"
        )


def _some(names: set[str], end: str = "") -> str:
    shown = [f"{name}{end}" for name in sorted(names)[:3]]
    return ", ".join(shown + ["…"] * (len(names) > 3))


def _by_class(where: str, root: Parts, files: list[Parts], folders: list[Parts]) -> Classes:
    depth = len(root)
    names = {path[depth] for path in folders if path[:depth] == root and len(path) > depth}
    found: Classes = {}
    others: dict[str, str] = {}
    for path in files:
        if path[:depth] != root or len(path) < depth + 2:
            continue
        names.add(path[depth])
        if PurePosixPath(path[-1]).suffix.lower() in EXTENSIONS:
            found.setdefault(path[depth], []).append("/".join(path))
        else:
            others.setdefault(path[depth], path[-1])
    if not names:
        raise DataError(f"{where}: no class folders; expected folders of images, one a class")
    for name in sorted(names - found.keys()):
        seen = f"; {others[name]} has no image's extension" if name in others else ""
        raise DataError(f"{where}/{name}: no images{seen}; add some or remove the folder")
    return {name: sorted(found[name]) for name in sorted(found)}


def _common_classes(where: str, splits: dict[str, Classes]) -> Parts:
    classes = splits["train"]
    for split, found in splits.items():
        for name in sorted(classes.keys() ^ found.keys()):
            held, lacked = ("train", split) if name in classes else (split, "train")
            raise DataError(f"{where}: class '{name}' is in the {held} images, not in {lacked}")
    return tuple(classes)


def _stratified(where: str, found: Classes, fraction: float) -> dict[str, Classes]:
    """Split every class: at least one image for training and, of two or more, one for testing."""
    train: Classes = {}
    test: Classes = {}
    for name, paths in found.items():
        if len(paths) < 2:
            raise DataError(f"{where}/{name}: one image; two are needed, to train and to test")
        held = set(stratum(len(paths), fraction, name).tolist())
        train[name] = [path for i, path in enumerate(paths) if i not in held]
        test[name] = [path for i, path in enumerate(paths) if i in held]
    return {"train": train, "test": test}


def stratum(count: int, fraction: float, name: str) -> np.ndarray:
    """Return which of a class's `count` images are test images: round(count · fraction) of them,
    at least 1 and at most count - 1, drawn by a fixed seed."""
    held = min(max(round(count * fraction), 1), count - 1)
    rng = np.random.default_rng(derive_seed(TEST_SPLIT_SEED, f"test images of {name}"))
    return np.sort(rng.permutation(count)[:held])
