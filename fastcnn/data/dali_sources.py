"""Where the DALI loader's pixels come from: the packed store, or image files.

A source says what DALI is fed of a batch (`read`), what its pipeline does with that (`graph`), how
the outcome gets into the loader's buffer (`fill`), and which file is to blame when something fails
(`blame`). DALI reads and decodes; it draws nothing at random.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from fastcnn.cache import cache_dir
from fastcnn.config import AugmentConfig
from fastcnn.data import augment as augmentation
from fastcnn.data.decode import BadImageError, decode
from fastcnn.data.draws import generator
from fastcnn.data.files import Files, read_file
from fastcnn.data.geometry import resize_box, whole_boxes
from fastcnn.data.progress import progress_bar
from fastcnn.data.store import Images
from fastcnn.errors import DataError

SLOW_IMAGES = 1000  # more that are converted are announced in a log
Fed = tuple[Any, ...]


def cores() -> int:
    """Cores that this process may use: what DALI gets for its threads."""
    return len(os.sched_getaffinity(0))


class PackedSource:
    """Images of the store, read from their file as they are needed, or from memory.

    The file is read, not the map of it: one that is cut under a running epoch is then an error,
    where touching the map would kill the process (SIGBUS).
    """

    def __init__(self, images: Images) -> None:
        self.pixels = images.pixels
        self.file, self.start = _file_of(self.pixels)

    def begin(self, epoch: int) -> None:
        """Nothing changes from epoch to epoch."""

    def read(self, samples: np.ndarray) -> Fed:
        """Return uint8 (n, H, W, 3). Raises DataError for a file that was cut."""
        if self.file is None:
            return (self.pixels[samples],)
        batch = np.empty((len(samples), *self.pixels.shape[1:]), np.uint8)
        size = batch[0].nbytes
        view = batch.data.cast("B")
        if (np.diff(samples) == 1).all():
            self._read_into(view, int(samples[0]) * size)
        else:
            for i, sample in enumerate(samples.tolist()):
                self._read_into(view[i * size : (i + 1) * size], sample * size)
        return (batch,)

    def _read_into(self, view: memoryview, offset: int) -> None:
        assert self.file is not None
        while len(view):
            try:
                count = os.preadv(self.file.fileno(), [view], self.start + offset)
            except OSError as error:
                raise DataError(f"{self.file.name}: {error.strerror or error}") from error
            if count == 0:
                raise DataError(
                    f"{self.file.name}: cut while it was in use; start again with --resume: "
                    "images are then packed anew"
                )
            view, offset = view[count:], offset + count

    def graph(self, fn: Any, types: Any, feed: Any, on_gpu: bool) -> tuple[Any, ...]:
        (pixels,) = fn.external_source(
            source=feed, num_outputs=1, batch=True, dtype=[types.UINT8], ndim=[3]
        )
        return (pixels.gpu() if on_gpu else pixels,)

    def fill(self, outputs: Any, samples: np.ndarray, pixels: torch.Tensor) -> None:
        pixels.copy_(torch.from_dlpack(outputs[0].as_tensor()), non_blocking=True)

    def blame(self, batches: Iterable[np.ndarray], reason: str) -> DataError:
        return DataError(f"--loader dali: DALI failed: {reason}")


def _file_of(pixels: np.ndarray) -> tuple[BinaryIO | None, int]:
    """Return the open file whose map `pixels` is (a part of), and where in it they begin; None for
    an array in memory. Raises DataError for a file that is gone or shorter than the map."""
    base: Any = pixels
    while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
        base = base.base
    if not isinstance(base, np.memmap) or not pixels.flags.c_contiguous:
        return None, 0
    mapping = base._mmap  # type: ignore[attr-defined]
    # a slice keeps its parent's `offset`: only the addresses tell where it begins
    first = base.offset - base.offset % _granularity()
    start = first + pixels.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    try:
        file = open(str(base.filename), "rb")  # noqa: SIM115 - the source's own while it lives
    except OSError as error:
        raise DataError(f"{base.filename}: {error.strerror}; start again") from error
    if os.fstat(file.fileno()).st_size < start + pixels.nbytes:
        raise DataError(f"{base.filename}: cut since it was opened; start again")
    return file, start


def _granularity() -> int:
    import mmap

    return mmap.ALLOCATIONGRANULARITY


class FileSource:
    """Image files, of which the part that is seen (geometry.py, or a random resized crop) is
    decoded. `crops`: smallest area of a random resized crop, 1 for none."""

    def __init__(self, files: Files, augment: AugmentConfig | None, seed: int) -> None:
        self.files = files = converted(files)
        self.root = os.fsencode(files.root.absolute())
        self.crops = 1.0 if augment is None else augment.resized_crop
        self.seed = seed
        self.boxes = whole_boxes(files.shapes, files.resize).astype(np.int32)
        self.resized = self.crops < 1 or bool((self.boxes[:, 2:] != files.sides).any())

    def begin(self, epoch: int) -> None:
        """Draw the epoch's random resized crops."""
        if self.crops < 1:
            source = generator(self.seed, "resized crop", epoch)
            shapes = torch.from_numpy(self.files.shapes)
            boxes = augmentation.resized_boxes(shapes, self.crops, source)
            self.boxes = boxes.numpy().astype(np.int32)

    def read(self, samples: np.ndarray) -> Fed:
        """Return paths (as bytes in uint8), corners and sides of what is seen, int32 (n, 2).

        Raises DataError for a file that is gone or has another length. DALI finds that too, but
        writes a line of its own about it that names no file.
        """
        paths = [
            os.path.join(self.root, os.fsencode(path))
            for path in self.files.paths[samples].tolist()
        ]
        self._check_lengths(samples, np.array([_length_of(path) for path in paths]))
        boxes = self.boxes[samples]
        fed = [np.frombuffer(path, np.uint8) for path in paths]
        return fed, boxes[:, :2].copy(), boxes[:, 2:].copy()

    def graph(self, fn: Any, types: Any, feed: Any, on_gpu: bool) -> tuple[Any, ...]:
        path, corner, sides = fn.external_source(
            source=feed,
            num_outputs=3,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32],
            ndim=[1, 1, 1],
        )
        # a file that is cut while it is mapped would kill the process
        encoded = fn.io.file.read(path, dont_use_mmap=True)
        device = "mixed" if on_gpu else "cpu"
        pixels = fn.decoders.image_slice(
            encoded, corner, sides, axis_names="HW", device=device, output_type=types.RGB
        )
        if on_gpu:
            # images of that size too: the resized ones lie side by side, decoded ones need not
            pixels = fn.resize(
                pixels,
                size=list(self.files.sides),
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
        return pixels, encoded.shape()

    def fill(self, outputs: Any, samples: np.ndarray, pixels: torch.Tensor) -> None:
        """Raises DataError for a file that has another length than when it was listed."""
        decoded, lengths = outputs
        self._check_lengths(samples, np.asarray(lengths.as_tensor())[:, 0])
        if pixels.is_cuda or not self.resized:
            pixels.copy_(torch.from_dlpack(decoded.as_tensor()), non_blocking=True)
            return
        target = pixels.numpy()
        for i in range(len(samples)):
            image = np.asarray(decoded[i])
            target[i] = resize_box(image, np.array([0, 0, *image.shape[:2]]), self.files.sides)

    def _check_lengths(self, samples: np.ndarray, found: np.ndarray) -> None:
        wrong = np.flatnonzero(found != self.files.lengths[samples])
        if len(wrong):
            sample = samples[wrong[0]]
            raise self._problem(sample) or DataError(
                f"{self._path(sample)}: changed: {self.files.lengths[sample]} bytes when it was "
                f"listed, {found[wrong[0]]} now"
            )

    def blame(self, batches: Iterable[np.ndarray], reason: str) -> DataError:
        """Return the error that names the file for which DALI failed, of those under way.

        DALI rarely says which: they are read again, those first whose length has changed.
        """
        samples = np.concatenate(list(batches)).tolist()
        suspects = sorted(samples, key=self._has_its_length)
        pool = ThreadPoolExecutor(cores())
        try:
            problems = (found for found in pool.map(self._problem, suspects) if found)
            if problem := next(problems, None):
                return problem
        finally:
            pool.shutdown(cancel_futures=True)
        return DataError(
            f"{self._path(samples[0])}, or another of its batch: DALI cannot read it: {reason}"
        )

    def _path(self, sample: int) -> Path:
        return self.files.root / str(self.files.paths[sample])

    def _has_its_length(self, sample: int) -> bool:
        return _length_of(self._path(sample)) == self.files.lengths[sample]

    def _problem(self, sample: int) -> DataError | None:
        try:
            height, width, _ = self.files.read(sample).shape
        except DataError as error:
            return error
        was_height, was_width = self.files.shapes[sample].tolist()
        if (height, width) == (was_height, was_width):
            return None
        return DataError(
            f"{self._path(sample)}: changed: {was_width} x {was_height} pixels when it was "
            f"listed, {width} x {height} now"
        )


def _length_of(path: "str | bytes | Path") -> int:
    """Return the bytes of a file, -1 for one that is gone."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


Source = PackedSource | FileSource


def converted(files: Files) -> Files:
    """Return the files with those that are not `plain` replaced by PNG files in the cache, of the
    same pixels, which DALI reads as decode.py reads the originals.

    They are named after the originals' contents. Raises DataError for a file that cannot be read or
    written.
    """
    odd = np.flatnonzero(~files.plain).tolist()
    if not odd:
        return files
    folder = cache_dir() / "converted"
    folder.mkdir(exist_ok=True)
    names, lengths = files.paths.tolist(), files.lengths.copy()
    announce = len(odd) > SLOW_IMAGES
    with (
        ThreadPoolExecutor(cores()) as pool,
        progress_bar("converting images for DALI", len(odd), announce=announce) as advance,
    ):
        made = pool.map(lambda sample: _convert(files, sample, folder), odd)
        for sample, path in zip(odd, made, strict=True):
            names[sample], lengths[sample] = str(path.absolute()), path.stat().st_size
            advance(1)
    return replace(files, paths=np.array(names), lengths=lengths)


def _convert(files: Files, sample: int, folder: Path) -> Path:
    from PIL import Image

    path = files.root / str(files.paths[sample])
    try:
        data = read_file(path, int(files.lengths[sample]))
        target = folder / f"{hashlib.sha256(data).hexdigest()}.png"
        if not target.exists():
            with tempfile.NamedTemporaryFile(dir=folder, prefix=".tmp-", delete=False) as file:
                Image.fromarray(decode(data).pixels).save(file, "PNG", compress_level=1)
            os.replace(file.name, target)
    except BadImageError as error:
        raise DataError(f"{path}: {error}; it was readable before") from error
    except OSError as error:
        raise DataError(f"cannot convert {path} into {folder}: {error.strerror}") from error
    return target
