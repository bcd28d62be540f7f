"""What the files of Tiny ImageNet (tiny-imagenet-200) mean; the same for a folder and for a zip.

wnids.txt                   the classes: one WordNet id a line
words.txt                   <wnid> tab <synonym>, <synonym>, …: of many more than the classes
train/<wnid>/images/…       the training images, however many of them
val/images/…                the images that testing takes
val/val_annotations.txt     <file> tab <wnid> tab <box>: their classes
test/images/…               images without labels, left out
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath

from fastcnn.data.decode import EXTENSIONS
from fastcnn.data.sources.base import Contents
from fastcnn.data.sources.layout import listed
from fastcnn.data.sources.paths import check_utf8
from fastcnn.errors import DataError

log = logging.getLogger(__name__)

WNIDS, WORDS, ANNOTATIONS = "wnids.txt", "words.txt", "val/val_annotations.txt"
SHOWN = 40  # characters of an odd line in an error

Read = Callable[[str], bytes]  # the bytes of a file by its path


def tiny_prefix(files: Iterable[str]) -> str | None:
    """Return what stands before wnids.txt and val/val_annotations.txt among `files`: "" or the name
    of the folder around them and a slash; None if this is not Tiny ImageNet."""
    found = set(files)
    for name in found:
        head, mark, tail = name.rpartition(ANNOTATIONS)
        outermost = not head or (head.endswith("/") and head.count("/") == 1)
        if mark and not tail and outermost and head + WNIDS in found:
            return head
    return None


def tiny_layout(where: str, files: Iterable[str], read: Read) -> Contents:
    """Sort files, paths relative to the folder of wnids.txt, into splits and classes.

    Classes stand in the order of their wnids. Raises DataError, which names file and line, for a
    list that holds odd lines, for a wnid that wnids.txt lacks, a class without training images, an
    image without an annotation and an annotation without an image, one class only and no
    validation images.
    """
    wnids = _wnids(where, read(WNIDS))
    labels = {wnid: label for label, wnid in enumerate(sorted(wnids))}
    train: dict[str, list[str]] = {wnid: [] for wnid in labels}
    val: dict[str, str] = {}
    unlabelled = others = 0
    for path in sorted(files):
        check_utf8(where, path)
        parts = PurePosixPath(path).parts
        if any(part.startswith(".") for part in parts):
            continue
        top, image = parts[0], PurePosixPath(path).suffix.lower() in EXTENSIONS
        if top == "train" and image and len(parts) > 2:
            _known(f"{where}/{path}", parts[1], labels)
            train[parts[1]].append(path)
        elif top == "val" and image and len(parts) > 1:
            if val.setdefault(parts[-1], path) != path:
                raise DataError(f"{where}: {val[parts[-1]]} and {path} have one name")
        elif top == "test" and image:
            unlabelled += 1
        elif not (path in (WNIDS, WORDS, ANNOTATIONS) or path.endswith("_boxes.txt")):
            others += 1
    for wnid, line in wnids.items():
        if not train[wnid]:
            raise DataError(
                f"{where}/{WNIDS}, line {line}: no images in train/{wnid}/images; unpack them again"
            )
    tested = _annotated(where, read(ANNOTATIONS), val, labels)
    if unlabelled:
        log.info(
            "%s: %s test images have no labels and are left out; testing takes the validation "
            "images",
            where,
            f"{unlabelled:,}",
        )
    splits = {
        "train": [(path, label) for wnid, label in labels.items() for path in train[wnid]],
        "test": sorted(tested, key=lambda item: (item[1], item[0])),
    }
    words = read(WORDS) if WORDS in files else b""
    return listed(where, _names(where, words, labels), splits, others)


def _wnids(where: str, data: bytes) -> dict[str, int]:
    """Return {wnid: line} in the order of wnids.txt."""
    found: dict[str, int] = {}
    for number, line in _lines(where, WNIDS, data):
        wnid = line.strip()
        if not wnid.isalnum():
            raise DataError(
                f"{where}/{WNIDS}, line {number}: expected one wnid, got '{wnid[:SHOWN]}'"
            )
        if wnid in found:
            raise DataError(
                f"{where}/{WNIDS}, line {number}: {wnid} stands in line {found[wnid]} too"
            )
        found[wnid] = number
    if not found:
        raise DataError(f"{where}/{WNIDS}: empty; unpack it again")
    return found


def _known(place: str, wnid: str, labels: dict[str, int]) -> None:
    if wnid not in labels:
        raise DataError(f"{place}: '{wnid[:SHOWN]}' is not in {WNIDS}")


def _annotated(
    where: str, data: bytes, images: dict[str, str], labels: dict[str, int]
) -> list[tuple[str, int]]:
    """Return (path, label) of the validation images, given as {file name: path}."""
    found: dict[str, int] = {}
    for number, line in _lines(where, ANNOTATIONS, data):
        place = f"{where}/{ANNOTATIONS}, line {number}"
        name, *fields = line.split("\t")
        if not name or not fields:
            raise DataError(
                f"{place}: expected file, tab, wnid, tab, box, got '{line[:SHOWN]}'; unpack it "
                "again"
            )
        _known(place, fields[0].strip(), labels)
        if name in found:
            raise DataError(f"{place}: {name} has a line already")
        if name not in images:
            raise DataError(f"{place}: no {name} in val/images; unpack the images again")
        found[name] = labels[fields[0].strip()]
    for name in sorted(images.keys() - found.keys()):
        raise DataError(f"{where}/{images[name]}: no line for it in {ANNOTATIONS}")
    return [(images[name], label) for name, label in found.items()]


def _names(where: str, data: bytes, labels: dict[str, int]) -> tuple[str, ...]:
    """Return the first synonym of every class, with the wnid behind it where two share one; the
    wnid alone where words.txt has none."""
    words: dict[str, str] = {}
    for number, line in _lines(where, WORDS, data):
        wnid, tab, synonyms = line.partition("\t")
        if not tab:
            raise DataError(
                f"{where}/{WORDS}, line {number}: expected wnid, tab, words, got '{line[:SHOWN]}'"
            )
        words[wnid] = synonyms.split(",")[0].strip()
    names = [words.get(wnid) or wnid for wnid in labels]
    return tuple(
        name if names.count(name) == 1 else f"{name} ({wnid})"
        for wnid, name in zip(labels, names, strict=True)
    )


def _lines(where: str, name: str, data: bytes) -> Iterator[tuple[int, str]]:
    """Yield the lines with their numbers, from 1; empty ones at the end are none."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        bad = data[: error.start].count(b"\n") + 1
        raise DataError(f"{where}/{name}, line {bad}: not UTF-8; unpack it again") from error
    lines = text.rstrip().split("\n") if text.strip() else []
    for number, line in enumerate(lines, 1):
        yield number, line.rstrip("\r")
