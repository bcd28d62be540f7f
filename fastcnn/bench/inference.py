"""Inference under several backends: a forward pass a step, in evaluation mode, without gradients.

The batches lie on the device, normalised and in the dtype that the network takes, several sets in
turn. Each backend is checked against the logits of plain torch in fp64. Norms have parameters and
statistics drawn as training might leave them: those of a new network hide a norm that is left out.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastcnn.archs.fold import Folded
from fastcnn.archs.plain import plain
from fastcnn.bench.options import ENGINES
from fastcnn.bench.rivals import correctness, engines
from fastcnn.bench.rivals.baselines import cast_products, compiled
from fastcnn.bench.rivals.check import FIRST_LOSS_SLACK, verdict
from fastcnn.bench.rivals.variants import MODES, OURS, Task, Variant, Workbench
from fastcnn.bench.timing import cache_bytes, sets_and_calls
from fastcnn.train.graph import WARM_UP, Replay, recorder_for

CHECKED = 2  # passes: a graph is captured in the first, and the second replays it on other images
# of a norm's tensor: how it is drawn
DRAWN: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "norm.weight": lambda t, g: t.uniform_(0.5, 1.5, generator=g),
    "norm.bias": lambda t, g: t.normal_(0, 0.3, generator=g),
    "norm.running_mean": lambda t, g: t.normal_(0, 0.3, generator=g),
    "norm.running_var": lambda t, g: t.uniform_(0.5, 2, generator=g),
}


class InferenceBench(Workbench):
    """The weights of a task and its sets of images (batch, 3, H, W), which all backends share."""

    def __init__(self, task: Task):
        super().__init__(task)
        generator = torch.Generator().manual_seed(task.seed)
        for name, tensor in self.weights.items():
            for ending, draw in DRAWN.items():
                if name.endswith(ending):
                    draw(tensor, generator)
        backends = (correctness.EAGER, *task.backends)  # by eager all are judged
        dtypes = {self.half(backend) or torch.float32 for backend in backends}
        batch_bytes = task.batch * 3 * self.size**2 * min(dtype.itemsize for dtype in dtypes)
        wanted, _ = sets_and_calls(batch_bytes, self.device.type, cache_bytes(self.device))
        self.count = max(1, min(wanted, task.images // task.batch))
        self._onnx: bytes | None = None  # for all engines
        self.sets = {dtype: self.first_sets(self.count, dtype) for dtype in dtypes}

    def first_sets(self, count: int, dtype: torch.dtype) -> list[Tensor]:
        """The first sets in `dtype`, channels-last on the device."""
        batches = self.resident_batches(dtype, augment=False)
        return [images for images, _ in itertools.islice(batches, count)]

    def variant(self, backend: str, augment: bool) -> Variant:
        """Return a forward pass under this backend; its images are never augmented."""
        half, model = self.half(backend), self.model(backend).eval()
        if backend in ENGINES:
            return self._engine(backend, model)
        ours = backend in OURS
        network = Folded(model, half).network if ours else cast_products(plain(model), half)
        function = compiled(network, MODES[backend]) if backend in MODES else network
        recorder = recorder_for(self.device, "on") if backend == "graph" else None
        forward = Forward(function, self.sets[half or torch.float32], Replay(recorder, True))
        graphs = (lambda: forward.replay.captured) if recorder else None
        variant = Variant(
            network, forward, lambda: forward.logits.clone(), lambda: variant, graphs=graphs
        )
        return variant

    def _engine(self, backend: str, model: nn.Module) -> Variant:
        """A pass of an engine that runs the exported network."""
        # NCHW, as the exported network declares its input: copied once, before the clock
        sets = [images.contiguous() for images in self.sets[torch.float32]]
        if self._onnx is None:
            self._onnx = engines.onnx_of(model, self.size)
        network = engines.start(backend, self._onnx, tuple(sets[0].shape), self.classes)
        forward = Forward(network, sets, Replay(None))
        variant = Variant(model, forward, lambda: forward.logits.clone(), lambda: variant)
        return variant


class Forward:
    """A forward pass a call, over the sets of images in turn; `logits`: of the last one."""

    def __init__(self, network: Callable[[Tensor], Tensor], sets: list[Tensor], replay: Replay):
        self.network, self.replay = network, replay
        self.logits = torch.empty(0)
        self._sets = itertools.cycle(sets)
        self._labels = torch.zeros(0, dtype=torch.int64, device=sets[0].device)  # none are wanted

    @torch.no_grad()
    def __call__(self) -> None:
        self.replay.feed(next(self._sets), self._labels, self._work)

    def _work(self, images: Tensor, _: Tensor) -> None:
        self.logits = self.network(images)


class LogitsCheck:
    """Whether the logits of the last passes are right; raises what eager itself raises."""

    def __init__(self, bench: InferenceBench):
        self.half = bench.task.half
        self.truth = true_logits(bench)
        self.eager = self.errors(self.run(bench.variant(correctness.EAGER, augment=False)))

    def run(
        self, variant: Variant, after_first: Callable[[], None] | None = None
    ) -> dict[str, Tensor]:
        """Make the passes; return the logits of the last of them."""
        found = []
        for number in range(WARM_UP + CHECKED):
            variant.step()
            if number >= WARM_UP:
                found.append(variant.result())
            if after_first and not number:
                after_first()
        return dict(zip(self.truth, found, strict=True))

    def errors(self, logits: dict[str, Tensor]) -> dict[str, float]:
        return correctness.errors_of(logits, self.truth)

    def why_wrong(self, backend: str, variant: Variant, logits: dict[str, Tensor]) -> str:
        """What is wrong with a variant that has made its passes; "" if nothing is."""
        errors = {correctness.EAGER: self.eager, backend: self.errors(logits)}
        return verdict(backend, variant, errors, FIRST_LOSS_SLACK[self.half], correctness.MOST)


@torch.no_grad()
def true_logits(bench: InferenceBench) -> dict[str, Tensor]:
    """The logits of the passes that are checked, by plain torch in fp64."""
    model = plain(bench.model(correctness.EAGER)).double()
    passes = range(WARM_UP, WARM_UP + CHECKED)
    sets = bench.first_sets(min(bench.count, passes.stop), torch.float64)
    return {f"logits of pass {i + 1}": model(sets[i % bench.count]) for i in passes}
