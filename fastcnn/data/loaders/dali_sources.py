"""Where the DALI loader's pixels come from: the packed store, or image files.

A source says what DALI is fed of a batch (`read`), what its pipeline does with that (`graph`) and
how the outcome gets into the loader's buffer (`fill`). DALI decodes; it draws nothing at random.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO

import numpy as np
import torch

from fastcnn.config import AugmentConfig
from fastcnn.data import augment as augmentation
from fastcnn.data.decode import resize_box, whole_boxes
from fastcnn.data.draws import generator
from fastcnn.data.examine import cores
from fastcnn.data.images import Files, Images
from fastcnn.errors import DataError

Fed = tuple[Any, ...]


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

    def read(self, samples: np.ndarray) -> Callable[[], Fed]:
        """Return what reads uint8 (n, H, W, 3). That raises DataError for a file that was cut."""
        return partial(self._read, samples)

    def _read(self, samples: np.ndarray) -> Fed:
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

    def close(self) -> None:
        """Close the file."""
        if self.file is not None:
            self.file.close()

    def name(self, sample: int) -> str:
        """Return what a message calls a sample."""
        return f"image {sample}"


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
    decoded. `crops`: smallest area of a random resized crop, 1 for none.

    DALI gets their bytes, not their paths, and none but those that the scan has decoded: where it
    cannot parse one image of a batch it may kill the process (DALI 2.4: an error leaves the decoder
    while its threads still use what it leaves).
    """

    def __init__(self, files: Files, augment: AugmentConfig | None, seed: int) -> None:
        self.files = files
        self.crops = 1.0 if augment is None else augment.resized_crop
        self.seed = seed
        self.boxes = whole_boxes(files.shapes, files.resize).astype(np.int32)
        self.resized = self.crops < 1 or bool((self.boxes[:, 2:] != files.sides).any())
        self.threads = cores()
        self.pool = ThreadPoolExecutor(self.threads)

    def begin(self, epoch: int) -> None:
        """Draw the epoch's random resized crops."""
        if self.crops < 1:
            source = generator(self.seed, "resized crop", epoch)
            shapes = torch.from_numpy(self.files.shapes)
            boxes = augmentation.resized_boxes(shapes, self.crops, source)
            self.boxes = boxes.numpy().astype(np.int32)

    def read(self, samples: np.ndarray) -> Callable[[], Fed]:
        """Begin to read files, and return what waits for them: their bytes (as uint8), corners and
        sides of what is seen, int32 (n, 2). That raises DataError for a file gone or changed."""
        parts = np.array_split(samples, self.threads)
        reading = [self.pool.submit(_encoded, self.files, part) for part in parts]
        boxes = self.boxes[samples]

        def wait() -> Fed:
            encoded = [data for part in reading for data in part.result()]
            return encoded, boxes[:, :2].copy(), boxes[:, 2:].copy()

        return wait

    def graph(self, fn: Any, types: Any, feed: Any, on_gpu: bool) -> tuple[Any, ...]:
        encoded, corner, sides = fn.external_source(
            source=feed,
            num_outputs=3,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32],
            ndim=[1, 1, 1],
        )
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
        return (pixels,)

    def fill(self, outputs: Any, samples: np.ndarray, pixels: torch.Tensor) -> None:
        decoded = outputs[0]
        if pixels.is_cuda or not self.resized:
            pixels.copy_(torch.from_dlpack(decoded.as_tensor()), non_blocking=True)
            return
        target = pixels.numpy()
        for i in range(len(samples)):
            image = np.asarray(decoded[i])
            target[i] = resize_box(image, np.array([0, 0, *image.shape[:2]]), self.files.sides)

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(cancel_futures=True)

    def name(self, sample: int) -> str:
        """Return a sample's path."""
        return self.files.path(sample)


def _encoded(files: Files, samples: np.ndarray) -> list[np.ndarray]:
    """Return files for DALI; those of which it might make other pixels, decoded, as PPM files."""
    found = []
    for sample in samples.tolist():
        if files.plain[sample]:
            data = files.encoded(sample)
        else:
            pixels = files.read(sample)
            data = b"P6\n%d %d\n255\n" % pixels.shape[1::-1] + pixels.tobytes()
        found.append(np.frombuffer(data, np.uint8))
    return found


Source = PackedSource | FileSource
