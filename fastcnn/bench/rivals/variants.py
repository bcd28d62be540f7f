"""The training steps that are compared, all from the same images and initial weights."""

import gc
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.archs import get_network
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.bench.rivals import noise
from fastcnn.bench.rivals.baselines import Batch, Recipe, ResidentImages, RivalStep
from fastcnn.bench.rivals.fastcnn_step import OurStep, loader_of
from fastcnn.config import DataConfig
from fastcnn.data import Images, Loader, Normalization
from fastcnn.train.graph import WARM_UP
from fastcnn.train.numerics.precision import Precision

HALVES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = {  # of torch.compile
    "compile": "default",
    "reduce-overhead": "reduce-overhead",
    "max-autotune": "max-autotune",
    "fused-compile": "default",
}
OURS = ("fused", "graph", "fused-compile")
RECIPE = Recipe()


@dataclass(frozen=True)
class Task:
    """What is compared. half: fp32, bf16 or fp16; images: how many there are in all; check:
    whether the variants are checked first; budget_s: seconds after which no more are built;
    inference: forward passes in place of training steps."""

    network: str
    batch: int
    loader: str
    backends: tuple[str, ...]
    device: str = "cpu"
    half: str = "fp32"
    threads: int | None = None
    workers: int = 2
    seed: int = 0
    images: int = 0
    check: bool = True
    budget_s: float | None = None
    inference: bool = False

    def __str__(self) -> str:
        images = "inference" if self.inference else self.loader
        return f"{self.network} batch {self.batch} {images}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        found = json.loads(text)
        return cls(**found | {"backends": tuple(found["backends"])})


@dataclass
class Variant:
    """A model and what is timed of it, `step`. result: what the steps leave to be checked, the sum
    of all images' losses so far, or the last logits; augmented: the variant to be timed, where this
    one takes the bare images; held: bytes of the images that it keeps on the device for itself,
    where the rivals share theirs; graphs: how many it has captured, for one that is to be a CUDA
    graph."""

    model: nn.Module
    step: Callable[[], None]
    result: Callable[[], Any]
    augmented: "Callable[[], Variant]"
    held: int = 0
    graphs: Callable[[], int] | None = None


class Workbench:
    """The images and the initial weights of a task, from which each variant starts."""

    def __init__(self, task: Task):
        self.task = task
        self.device = torch.device(task.device)
        self.network = get_network(task.network)
        self.size, self.classes = self.network.image_sizes[0], self.network.classes
        self.images: Images = noise.images(task.images, self.size, self.classes, task.seed)
        self.normalization = Normalization.fit(self.images, "zscore")
        first = build(self.network, self.size, self.classes, "torch")
        initialise(first, "he", torch.Generator().manual_seed(task.seed))
        self.weights = first.state_dict()
        self._resident: tuple[Tensor, ...] = ()

    def half(self, backend: str) -> torch.dtype | None:
        return None if backend == "eager-fp32" else HALVES[self.task.half]

    def model(self, backend: str) -> nn.Module:
        """The network with the initial weights. Without dropout: its draws differ between the
        variants, and a step of theirs could not be compared."""
        ops = "fused" if backend in OURS else "torch"
        model = build(self.network, self.size, self.classes, ops)
        model.load_state_dict(self.weights)
        for layer in model.modules():
            if hasattr(layer, "dropout"):
                setattr(layer, "dropout", 0.0)  # noqa: B010 - which nn.Module's stub forbids
        return model.to(self.device)

    def variant(self, backend: str, augment: bool) -> Variant:
        """Return a step under this backend, of augmented images or of the bare ones in order."""
        half, model = self.half(backend), self.model(backend)
        if backend in ("fused", "graph"):
            precision = Precision(half)
            loader = self.loader(augment, dtype=half)
            # the check makes few steps, and they must not all be those before the capture
            warm_up = WARM_UP if augment else 1
            graph = backend == "graph"
            ours = OurStep(model, RECIPE, precision, loader, self.device, graph, warm_up)
            again = partial(self.variant, backend, augment=True)
            pixels = getattr(loader, "pixels", None)
            held = pixels.nbytes if pixels is not None else 0
            graphs = (lambda: ours.graphs) if graph else None
            return Variant(model, ours, lambda: ours.loss_sum, again, held, graphs)
        rival = RivalStep(model, RECIPE, half, MODES.get(backend))
        return self._rival(rival, half, augment)

    def _rival(self, rival: RivalStep, half: torch.dtype | None, augment: bool) -> Variant:
        batches = self.batches(half or torch.float32, augment)
        return Variant(
            rival.model,
            lambda: rival(*next(batches)),
            lambda: rival.sums[0].item(),
            lambda: self._rival(rival, half, augment=True),  # it need not be compiled again
        )

    def batches(self, dtype: torch.dtype, augment: bool) -> Iterator[Batch]:
        """The batches of a rival, without end."""
        if self.task.loader != "resident":
            loader = self.loader(augment)
            return itertools.chain.from_iterable(itertools.repeat(loader))
        return self.resident_batches(dtype, augment)

    def resident_batches(self, dtype: torch.dtype, augment: bool) -> Iterator[Batch]:
        if not self._resident:  # once on the device, for all rivals
            normal = self.normalization
            found = [torch.from_numpy(array) for array in (self.images.pixels, self.images.labels)]
            found += [torch.tensor(normal.mean), torch.tensor(normal.std)]
            self._resident = tuple(t.to(self.device) for t in found)
        pixels, labels, mean, std = self._resident
        return iter(ResidentImages(pixels, labels, mean, std, self.task.batch, dtype, augment))

    def loader(self, augment: bool, kind: str = "", dtype: torch.dtype | None = None) -> Loader:
        """A loader of fastcnn's; kind: another than the task's; dtype: of its images, else fp32."""
        task = self.task
        name: Any = kind or task.loader
        data = DataConfig(loader=name, batch_size=task.batch, workers=task.workers)
        return loader_of(
            self.images,
            data,
            self.normalization,
            self.device,
            task.seed,
            augment,
            dtype or torch.float32,
        )


def release(device: torch.device) -> None:
    """Give back what a variant that is gone has held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
