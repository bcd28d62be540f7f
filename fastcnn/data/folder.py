"""A folder of images (layouts: listing.py), decoded once into the store or left in its files."""

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from fastcnn.config import DataConfig
from fastcnn.data.choose import choose
from fastcnn.data.decode import EXTENSIONS, BadImageError, decode, no_warnings
from fastcnn.data.examine import Record, Source, View, examine_all, read_whole
from fastcnn.data.files import Files, Stamp
from fastcnn.data.left_out import OneSize, checked, refuse_bad, refuse_lost_classes
from fastcnn.data.listing import Layout, find_layout
from fastcnn.data.scan import Scan, scan
from fastcnn.data.store import (
    SLOW_IMAGES,
    Account,
    Block,
    Contents,
    Dataset,
    LeftOut,
    digest_of_files,
    fingerprint,
    log,
    pack,
)
from fastcnn.errors import DataError

MOST_VISITS = 16  # of one folder, by links: folders that link to each other would have no end


def load_folder(path: Path, config: DataConfig, device: torch.device) -> Dataset:
    """Read an image folder. Raises DataError for whatever listing.py and load_layout refuse."""
    files, folders = list_folder(path)
    layout = find_layout(str(path), files, folders, config.test_fraction)
    warn_ignored(path, layout)
    return load_layout(path, files, layout, config, device)


def load_layout(
    path: Path,
    files: dict[str, Stamp],
    layout: Layout,
    config: DataConfig,
    device: torch.device,
) -> Dataset:
    """Return the images of `layout` below the folder `path`, packed or in their files, whichever
    suits the options and `device`. `files`: the stamp of every file by its path below it.

    Raises DataError for files that cannot be decoded (all are tried, the first few named) unless
    the options leave them out, for images of different sizes without --image-size, and for a class
    of which nothing is left.
    """
    items = [(s, item, label) for s, found in layout.splits.items() for item, label in found]
    sides = _sides_of_first(path, files, (item for _, item, _ in items), config)
    choice = choose(config, len(items), sides, True, device)
    resolved = path.resolve()
    name = path.name or resolved.name
    if choice.store == "files":
        dataset = _left_in_files(name, path, files, layout, config)
    else:
        used = [[split, item, label, files[item]] for split, item, label in items]
        # unpacked archives and copies may agree in names, sizes and times: the path tells them
        # apart
        key = fingerprint("folder", str(resolved), used, layout.classes, image_key(config))
        contents = partial(_contents, path, files, layout, config)
        dataset = pack(name, key, contents, partial(_readable_now, path, files))
    return replace(checked(dataset, path, config), loader=choice.loader, why=choice.why)


def _readable_now(root: Path, files: dict[str, Stamp], left_out: LeftOut) -> bool:
    """Return whether bytes can be read that could not be read when a folder was packed: under the
    same stamp, as after a fault of a network's disk. The scan tries such files again too."""
    for path in left_out.unread:
        with contextlib.suppress(BadImageError):
            read_whole(root / path, files[path][0])
            return True
    return False


def image_key(config: DataConfig) -> list[Any]:
    """The options that decide what is packed of encoded images, for a fingerprint.

    --on-bad-image is none of them: of the same files the same ones are unreadable.
    """
    view = View.of(config)
    return [view.side, view.resize, config.grayscale]


def list_folder(path: Path) -> tuple[dict[str, Stamp], list[str]]:
    """Return {file's relative path: stamp} and the relative paths of folders.

    Links are followed, but not back into a folder above. Raises DataError where the listing fails,
    and where links lead to one folder more than MOST_VISITS times.
    """
    files: dict[str, Stamp] = {}
    folders: list[str] = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    visits: Counter[tuple[int, int]] = Counter()
    try:
        while waiting:
            inner, above = waiting.pop()
            here = os.stat(path / inner)
            identity = (here.st_dev, here.st_ino)
            if identity in above:
                continue
            visits[identity] += 1
            if visits[identity] > MOST_VISITS:
                real = os.path.realpath(path / inner)
                raise DataError(
                    f"{path}: links lead to {real} more than {MOST_VISITS} times; remove some"
                )
            for entry in os.scandir(path / inner):
                if entry.name.startswith("."):
                    continue
                relative = f"{inner}/{entry.name}" if inner else entry.name
                status = _status(entry)
                if stat.S_ISDIR(status.st_mode):
                    folders.append(relative)
                    waiting.append((relative, above | {identity}))
                elif stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                    files[relative] = (status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    except OSError as error:
        raise DataError(f"cannot list {error.filename}: {error.strerror}") from error
    return files, folders


def _status(entry: "os.DirEntry[str]") -> os.stat_result:
    """Follow a link; of a broken link to an image return its own status, so that decoding names it
    among the unreadable files. Any other broken link may stand for a class: that is an error."""
    try:
        return entry.stat()
    except OSError as error:
        own = entry.stat(follow_symlinks=False)
        if not stat.S_ISLNK(own.st_mode):
            raise
        if PurePath(entry.name).suffix.lower() in EXTENSIONS:
            return own
        raise DataError(
            f"{entry.path}: broken link ({error.strerror}); mend or remove it"
        ) from error


def warn_ignored(path: Path, layout: Layout) -> None:
    if layout.ignored:
        noun = "file" if layout.ignored == 1 else "files"
        log.warning("%s: %d %s left out: not images of a class", path, layout.ignored, noun)


def _sides_of_first(
    root: Path, files: dict[str, Stamp], paths: Iterable[str], config: DataConfig
) -> tuple[int, int]:
    """Return height and width of a batch's images: --image-size, or those of the first image that
    can be read; (1, 1) if none can, which is refused later, by name."""
    if config.image_size:
        return config.image_size, config.image_size
    with no_warnings():
        for path in paths:
            with contextlib.suppress(BadImageError):
                data = read_whole(root / path, files[path][0])
                height, width, _ = decode(data).pixels.shape
                return height, width
    return 1, 1


def _left_in_files(
    name: str, root: Path, files: dict[str, Stamp], layout: Layout, config: DataConfig
) -> Dataset:
    """Scan the images of `layout` and leave them where they are."""
    view, labels = View.of(config), layout.labels
    names = [path for found in layout.splits.values() for path, _ in found]
    known = scan(root, names, files, view, OneSize(root, config))
    chosen, left_out = _chosen(root, names, layout, labels, known, config)
    sides = _common_sides(root, names, known, np.concatenate(list(chosen.values())), config)
    whole = Files(
        root=root,
        paths=np.array(names),
        labels=np.concatenate(list(labels.values())),
        stamps=np.array([files[path] for path in names], dtype=np.int64),
        hashes=known.hashes,
        shapes=known.shapes,
        sums=known.sums,
        plain=known.plain,
        sides=sides,
        resize=view.resize,
    )
    parts = {split: whole.take(at) for split, at in chosen.items()}
    digest = digest_of_files(
        layout.classes,
        {split: part.labels for split, part in parts.items()},
        {split: known.hashes[at] for split, at in chosen.items()},
        sides,
        view.resize,
    )
    train, test, val = parts["train"], parts["test"], parts.get("val")
    return Dataset(name, layout.classes, train, test, val, digest, left_out)


def _chosen(
    root: Path,
    names: list[str],
    layout: Layout,
    labels: dict[str, np.ndarray],
    known: Scan,
    config: DataConfig,
) -> tuple[dict[str, np.ndarray], LeftOut]:
    """Return the positions among `names` of the images to use, per split, and what is left out.

    Raises DataError where the options do not allow for that.
    """
    bad = tuple((names[at], known.reasons[at]) for at in sorted(known.reasons))
    readable = np.ones(len(names), dtype=bool)
    readable[list(known.reasons)] = False
    dropped = readable & known.grey & (config.grayscale == "drop")
    left_out = LeftOut(bad, int(dropped.sum()))
    refuse_bad(root, left_out, len(names), config)
    ends = np.cumsum([len(numbers) for numbers in labels.values()])[:-1]
    places = dict(zip(labels, np.split(np.arange(len(names)), ends), strict=True))
    kept = {split: (readable & ~dropped)[at] for split, at in places.items()}
    refuse_lost_classes(root, layout.classes, labels, kept)
    return {split: at[kept[split]] for split, at in places.items()}, left_out


def _common_sides(
    root: Path, names: list[str], known: Scan, chosen: np.ndarray, config: DataConfig
) -> tuple[int, int]:
    """Return height and width of a batch's images; raises DataError for different sizes."""
    if config.image_size:
        return config.image_size, config.image_size
    shapes = known.shapes[chosen]
    if (shapes != shapes[0]).any():
        rows = zip(chosen.tolist(), shapes.tolist(), strict=True)
        OneSize(root, config)((names[at], (height, width), False) for at, (height, width) in rows)
    return int(shapes[0, 0]), int(shapes[0, 1])


def _contents(root: Path, files: dict[str, Stamp], layout: Layout, config: DataConfig) -> Contents:
    sources = (
        Source(split, position, path, partial(read_whole, root / path, files[path][0]))
        for split, items in layout.splits.items()
        for position, (path, _) in enumerate(items)
    )
    mean_bytes = sum(size for size, _, _ in files.values()) / len(files)
    return decoded_contents(root, layout, sources, config, mean_bytes)


def decoded_contents(
    root: Path,
    layout: Layout,
    sources: Iterable[Source],
    config: DataConfig,
    mean_bytes: float,
) -> Contents:
    """Return the images of `sources` for the store, decoded as it asks for them, in threads where
    files are large enough (`mean_bytes` each) to gain by it.

    What the options leave out is in no block. Of an archive, put the Dataset that the store
    returns through left_out.checked.
    """
    labels = layout.labels
    account = Account(
        hashes={split: np.zeros((len(found), 32), np.uint8) for split, found in labels.items()},
        kept={split: np.ones(len(found), dtype=bool) for split, found in labels.items()},
        view=View.of(config).resize,
    )
    records = examine_all(sources, View.of(config), mean_bytes, keep_pixels=True)
    blocks = _blocks(root, layout, labels, records, config, account)
    slow = sum(map(len, labels.values())) > SLOW_IMAGES
    return Contents(layout.classes, labels, blocks, slow, account)


def _blocks(
    root: Path,
    layout: Layout,
    labels: dict[str, np.ndarray],
    chunks: Iterator[list[tuple[Source, Record]]],
    config: DataConfig,
    account: Account,
) -> Iterator[Block]:
    """Yield the images and note in `account` what is left out; refuse that at the end, so that
    every unreadable file is known."""
    one_size, bad, unread, grey = OneSize(root, config), [], [], 0
    for chunk in chunks:
        good: dict[str, list[tuple[int, np.ndarray]]] = {}
        one_size((s.path, r.shape, r.grey) for s, r in chunk if not r.reason)
        for source, record in chunk:
            split, position = source.split, source.position
            if record.pixels is None or (record.grey and config.grayscale == "drop"):
                account.kept[split][position] = False
                grey += record.pixels is not None
                if record.reason:
                    bad.append((source.path, record.reason))
                if record.reason and not record.sha256:
                    unread.append(source.path)
                continue
            account.hashes[split][position] = np.frombuffer(record.sha256, np.uint8)
            good.setdefault(split, []).append((position, record.pixels))
        for split, pairs in good.items():
            positions, images = zip(*pairs, strict=True)
            # a single one may be too large to be there twice
            pixels = np.stack(images) if len(images) > 1 else images[0][None]
            yield split, list(positions), pixels
    account.left_out = LeftOut(tuple(bad), grey, tuple(unread))
    refuse_bad(root, account.left_out, sum(map(len, labels.values())), config)
    refuse_lost_classes(root, layout.classes, labels, account.kept)
