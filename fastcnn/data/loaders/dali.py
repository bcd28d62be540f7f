"""The DALI loader: NVIDIA DALI decodes ahead of the step, for images too many for memory.

DALI's own threads (as many as the process has cores) are two batches ahead while the step runs, and
as many threads read the files of a third one. It delivers uint8 images of one size, on a GPU
decoded and resized there; on a CPU they are resized here (geometry.py), at a twentieth of the time
that DALI takes. Crop, flip, cutout, normalisation and cast are the one kernel of the other loaders
on the device, so that all agree.

Order and position are ours: DALI is told which samples come next. It never repeats or pads one.
"""

import contextlib
import re
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fastcnn.config import AugmentConfig
from fastcnn.data.choose import import_dali
from fastcnn.data.examine import cores
from fastcnn.data.images import Files, Images
from fastcnn.data.loaders.base import LoaderOptions
from fastcnn.data.loaders.dali_sources import Fed, FileSource, PackedSource, Source
from fastcnn.data.loaders.on_device import DeviceLoader
from fastcnn.data.loaders.upload import upload
from fastcnn.data.normalize import Normalization
from fastcnn.errors import DataError, UsageError

AHEAD = 2  # batches that DALI works on while the step runs


class DaliLoader(DeviceLoader):
    """See loaders.make_loader. Raises UsageError where DALI is missing or cannot use the device;
    while it runs, DataError that names a file which is gone or changed."""

    def __init__(
        self,
        images: Images | Files,
        augment: AugmentConfig | None,
        normalization: Normalization,
        options: LoaderOptions,
    ) -> None:
        largest, device = min(options.batch_size, len(images)), options.device
        in_kernel = augment
        if isinstance(images, Files) and augment is not None:
            in_kernel = replace(augment, resized_crop=1.0)  # DALI cuts it out of the file's image
        super().__init__(
            torch.zeros((largest, *images.sides, 3), dtype=torch.uint8, device=device),
            torch.zeros(largest, dtype=torch.int64, device=device),
            in_kernel,
            normalization,
            options,
            gathered=True,
            samples=len(images),
        )
        self.all_labels = torch.tensor(images.labels)
        self.source = (
            FileSource(images, augment, options.seed)
            if isinstance(images, Files)
            else PackedSource(images)
        )
        weakref.finalize(self, self.source.close)  # DALI keeps it for longer, in a cycle
        self.stream = Stream(self.source, largest, device)

    def begin(self) -> list[int]:
        sizes = super().begin()
        order = self.epoch_samples().numpy()
        ends = self.position + np.cumsum(sizes, dtype=np.int64)
        self.source.begin(self.epoch)
        self.stream.start(
            order[end - size : end] for size, end in zip(sizes, ends.tolist(), strict=True)
        )
        return sizes

    def stage(self, count: int) -> None:
        """Move the next batch from DALI's memory to the buffers, on the current stream."""
        with self.stream.next_batch() as (samples, outputs):
            self.source.fill(outputs, samples, self.pixels[:count])
            upload(self.labels[:count], self.all_labels[torch.from_numpy(samples)])


class Feed:
    """What DALI calls for its next batch, which is being read already. under_way: the samples of
    those that it has been given and that were not taken yet, oldest first."""

    def __init__(self, read: Callable[[np.ndarray], Callable[[], Fed]]) -> None:
        self.read = read
        self.under_way: deque[np.ndarray] = deque()
        self.begin(())

    def begin(self, batches: Iterable[np.ndarray]) -> None:
        """Go on with `batches`, samples each."""
        self.batches = iter(batches)
        self._read_ahead()

    def _read_ahead(self) -> None:
        samples = next(self.batches, None)
        self.ahead = None if samples is None else (samples, self.read(samples))

    def __call__(self) -> Fed:
        if self.ahead is None:
            raise StopIteration
        samples, wait = self.ahead
        fed = wait()
        self._read_ahead()
        self.under_way.append(samples)
        return fed


class Stream:
    """A pipeline and the batches under way in it; built anew after whatever went wrong in it.

    Without a cycle of references: it goes, with DALI's threads, when the loader does.
    """

    def __init__(self, source: Source, batch_size: int, device: torch.device):
        self.source, self.batch_size, self.device = source, batch_size, device
        self.feed = Feed(source.read)
        self.pipeline = self._built()

    def start(self, batches: Iterable[np.ndarray]) -> None:
        """Let DALI begin with `batches`, samples each; what is left of earlier ones is dropped."""
        self._drain()
        if self.pipeline is None:
            self.feed = Feed(self.source.read)
            self.pipeline = self._built()
        self.feed.begin(batches)
        self.pipeline.reset()
        with self._or_none(), self._blaming():
            self.pipeline.schedule_run()  # the first of an epoch fills DALI's queue

    @contextlib.contextmanager
    def next_batch(self) -> Iterator[tuple[np.ndarray, Any]]:
        """Give (samples, DALI's outputs) to the block; after it DALI goes on with another batch.

        On a GPU the outputs belong to the current stream, and so does their memory, which DALI has
        back when that stream is done with it; the host waits for neither.
        """
        on_gpu = self.device.type == "cuda"
        with self._or_none():
            with self._blaming():
                current = torch.cuda.current_stream(self.device) if on_gpu else None
                outputs = self.pipeline.share_outputs(cuda_stream=current)
            yield self.feed.under_way.popleft(), outputs
            with self._blaming():
                self.pipeline.release_outputs()
                self.pipeline.schedule_run()

    def _drain(self) -> None:
        """Take what is left of an iteration that was given up, so that the next one can begin."""
        self.feed.begin(())
        if self.pipeline is None or not self.feed.under_way:
            return
        with contextlib.suppress(RuntimeError), self._or_none():
            self.pipeline.schedule_run()
            while self.feed.under_way:
                self.pipeline.share_outputs()
                self.pipeline.release_outputs()
                self.feed.under_way.popleft()

    @contextlib.contextmanager
    def _or_none(self) -> Iterator[None]:
        """Drop a pipeline in which something went wrong: DALI's own errors are the end of it."""
        try:
            yield
        except BaseException:
            self.pipeline = None
            raise

    @contextlib.contextmanager
    def _blaming(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            oldest = self.feed.under_way[0] if self.feed.under_way else np.empty(0, np.int64)
            raise failure(error, self.source.name, oldest) from error

    def _built(self) -> Any:
        pipeline_class, fn, types = import_dali()
        on_gpu = self.device.type == "cuda"
        index = None
        if on_gpu:
            index = self.device.index
            index = torch.cuda.current_device() if index is None else index
        try:
            pipeline = pipeline_class(
                batch_size=self.batch_size,
                num_threads=cores(),
                device_id=index,
                prefetch_queue_depth=AHEAD,
            )
            with pipeline:
                pipeline.set_outputs(*self.source.graph(fn, types, self.feed, on_gpu))
            pipeline.build()
        except RuntimeError as error:
            raise UsageError(
                f"--loader dali: DALI cannot work on {self.device}: {reason_of(error)}; take "
                "--loader resident or --loader torch"
            ) from error
        return pipeline


def reason_of(error: RuntimeError) -> str:
    """Return the line of DALI's message that says what happened, without its traceback."""
    text = str(error).rpartition("encountered:")[2]
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in lines if line), type(error).__name__)


def failure(error: RuntimeError, name: Callable[[int], str], samples: np.ndarray) -> DataError:
    """Return what DALI's error about a batch says; `name`: of the sample that it may count out."""
    found = re.search(r"sample #(\d+)", str(error))
    place = int(found[1]) if found else len(samples)
    what = f"{name(int(samples[place]))}: " if place < len(samples) else ""
    return DataError(f"{what}--loader dali: DALI failed: {reason_of(error)}")
