"""The training steps that are compared: built, checked against fp64, ready to be timed."""

import gc
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcnn.archs import get_network
from fastcnn.archs.init import initialise
from fastcnn.archs.spec import build
from fastcnn.bench import judge, noise
from fastcnn.bench.ours import OurStep, loader_of
from fastcnn.bench.rivals import Batch, Recipe, ResidentImages, RivalStep
from fastcnn.config import DataConfig
from fastcnn.data import Images, Loader, Normalization
from fastcnn.train.precision import Precision

HALVES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = {  # of torch.compile
    "compile": "default",
    "reduce-overhead": "reduce-overhead",
    "max-autotune": "max-autotune",
    "fused-compile": "default",
}
CHECK_STEPS = 2
RECIPE = Recipe()
# mean error over mean value that a variant may have beyond twice eager's: roundings, and a few
# windows and masks that fall the other way and change the gradients of all layers before them
FIRST_LOSS = "loss of step 1"  # the forward pass alone: nothing has been updated
FIRST_LOSS_SLACK = {"fp32": 1e-5, "bf16": 2**-8, "fp16": 2**-10}
SLACK = {"fp32": 0.02, "bf16": 0.1, "fp16": 0.05}
MOST = {"fp32": 0.2, "bf16": 0.6, "fp16": 0.3}  # that eager itself may err
# of the median change of a tensor: below it, a change is rounding (a bias before a norm)
SMALL_CHANGE = 0.03


@dataclass(frozen=True)
class Task:
    """What is compared. half: fp32, bf16 or fp16; images: how many there are in all; check:
    whether the variants are checked first."""

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

    def __str__(self) -> str:
        return f"{self.network} batch {self.batch} {self.loader}"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Task":
        found = json.loads(text)
        return cls(**found | {"backends": tuple(found["backends"])})


@dataclass
class Variant:
    """A model in training; step: one optimisation step; losses: the sum of all images' so far."""

    model: nn.Module
    step: Callable[[], None]
    losses: Callable[[], float]


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
        ops = "fused" if backend in ("fused", "graph", "fused-compile") else "torch"
        model = build(self.network, self.size, self.classes, ops)
        model.load_state_dict(self.weights)
        for layer in model.modules():
            if hasattr(layer, "dropout"):
                setattr(layer, "dropout", 0.0)  # noqa: B010 - which nn.Module's stub forbids
        return model.to(self.device)

    def variant(self, backend: str, augment: bool = True) -> Variant:
        """Return a step under this backend, of augmented images or of the bare ones in order."""
        half, model = self.half(backend), self.model(backend)
        if backend in ("fused", "graph"):
            precision = Precision(self.device.type, half)
            loader = self.loader(augment)
            ours = OurStep(model, RECIPE, precision, loader, self.device, backend == "graph")
            return Variant(model, ours, lambda: ours.loss_sum)
        rival = RivalStep(model, RECIPE, half, MODES.get(backend))
        batches = self.batches(half or torch.float32, augment)
        return Variant(model, lambda: rival(*next(batches)), lambda: rival.sums[0].item())

    def batches(self, dtype: torch.dtype, augment: bool) -> Iterator[Batch]:
        """The batches of a rival, without end."""
        if self.task.loader == "torch":
            loader = self.loader(augment)
            return itertools.chain.from_iterable(itertools.repeat(loader))
        return self._resident_batches(dtype, augment)

    def _resident_batches(self, dtype: torch.dtype, augment: bool) -> Iterator[Batch]:
        if not self._resident:  # once on the device, for all rivals
            normal = self.normalization
            found = [torch.from_numpy(array) for array in (self.images.pixels, self.images.labels)]
            found += [torch.tensor(normal.mean), torch.tensor(normal.std)]
            self._resident = tuple(t.to(self.device) for t in found)
        pixels, labels, mean, std = self._resident
        return iter(ResidentImages(pixels, labels, mean, std, self.task.batch, dtype, augment))

    def loader(self, augment: bool, kind: str = "") -> Loader:
        """A loader of fastcnn's; kind: another than the task's."""
        task = self.task
        name: Any = kind or task.loader
        data = DataConfig(loader=name, batch_size=task.batch, workers=task.workers)
        return loader_of(self.images, data, self.normalization, self.device, task.seed, augment)

    # the check

    def wrong_ones(self, backends: tuple[str, ...]) -> dict[str, str]:
        """Run a few steps of each backend on the same batches; return those that failed or whose
        losses, weights and running statistics are not those of fp64, and why."""
        truth = self._true_changes()
        small = small_change(truth)
        errors: dict[str, dict[str, float]] = {}
        failed: dict[str, str] = {}
        for backend in dict.fromkeys((judge.EAGER, *backends)):
            try:
                errors[backend] = self._errors(backend, truth, small)
            except Exception as error:  # no compiler, too little memory: the others go on
                failed[backend] = judge.reason_of(error)
            release(self.device)
        if judge.EAGER not in errors:
            why = f"eager failed, and nothing could be compared with it: {failed[judge.EAGER]}"
            return dict.fromkeys(backends, why)
        half = self.task.half
        slack = dict.fromkeys(truth, SLACK[half]) | {FIRST_LOSS: FIRST_LOSS_SLACK[half]}
        wrong = failed | judge.wrong_ones(errors, slack, MOST[half])
        if judge.EAGER in wrong and judge.EAGER not in failed:
            return dict.fromkeys(backends, f"eager, by which it is judged: {wrong[judge.EAGER]}")
        return {backend: wrong[backend] for backend in backends if backend in wrong}

    def _errors(self, backend: str, truth: dict[str, Tensor], small: float) -> dict[str, float]:
        variant = self.variant(backend, augment=False)
        sums = [0.0]
        for _ in range(CHECK_STEPS):
            variant.step()
            sums.append(variant.losses())
        losses = [(b - a) / self.task.batch for a, b in itertools.pairwise(sums)]
        return judge.errors_of(self._changes(variant.model, losses), truth, small)

    def _true_changes(self) -> dict[str, Tensor]:
        """The same steps in fp64, by plain torch."""
        model = self.model("eager").double()
        decays = [RECIPE.weight_decay * (p.ndim > 1) for p in model.parameters()]
        momenta = [torch.zeros_like(p) for p in model.parameters()]
        losses, plain = [], self._resident_batches(torch.float64, augment=False)
        for _ in range(CHECK_STEPS):
            images, labels = next(plain)
            smoothing = RECIPE.label_smoothing
            loss = F.cross_entropy(model(images.double()), labels, label_smoothing=smoothing)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            with torch.no_grad():
                for p, g, m, decay in zip(
                    model.parameters(), gradients, momenta, decays, strict=True
                ):
                    g = g + decay * p
                    m.mul_(RECIPE.momentum).add_(g)
                    p.sub_(RECIPE.lr * (g + RECIPE.momentum * m))
            losses.append(loss.item())
        return self._changes(model, losses)

    def _changes(self, model: nn.Module, losses: list[float]) -> dict[str, Tensor]:
        """The losses of the steps, and how far each weight and running statistic has moved."""
        state = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
        moved = {n: t.detach().cpu().double() - self.weights[n].double() for n, t in state.items()}
        numbered = {f"loss of step {i}": torch.tensor(v).double() for i, v in enumerate(losses, 1)}
        return numbered | moved


def small_change(changes: dict[str, Tensor]) -> float:
    """Below it, a change of a tensor counts as that much: its own may be rounding alone."""
    means = [t.abs().mean() for t in changes.values() if t.dim()]
    return SMALL_CHANGE * torch.stack(means).median().item()


def release(device: torch.device) -> None:
    """Give back what a variant that is gone has held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
