"""A process with one setting of the allocator, which times single steps as it is told.

    python benchmarks/step_process.py plain|tuned '<task as JSON>'

bench_step.py starts two of these, since what glibc's mallopt sets cannot be unset, and lets them
take turns. "tuned" is how the command `fastcnn` sets up its own process, "plain" how Python starts.
The process says on one line which variants it has and which are wrong; then it takes the name of a
variant a line and answers with the seconds of one step.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

from fastcnn.train import host

if TYPE_CHECKING:
    from torch import Tensor, nn

SETS = 4  # batches in turn
SLACK = 1e-4  # mean error of the logits over their mean, beyond twice eager's
EXACT_SLACK = 1e-8  # the same of gradients in fp64

Step = Callable[[], Any]


@dataclass(frozen=True)
class Task:
    """What is timed, fp32: the training step of a network for a batch, or, without a network, the
    op batch norm + ReLU + 2x2 pool, forward and backward, on x of `shape`."""

    network: str = ""
    batch: int = 0
    shape: tuple[int, ...] = ()
    compiled: bool = True
    threads: int = 0

    def __str__(self) -> str:
        if self.network:
            return f"{self.network} batch {self.batch}"
        return "bn_act_pool " + "x".join(map(str, self.shape))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Task:
        found = json.loads(text)
        return cls(**found | {"shape": tuple(found["shape"])})


def op_steps(task: Task) -> tuple[dict[str, Step], dict[str, str]]:
    """Return a step of each variant of the op, and what is wrong with those left out."""
    import torch
    from bench_ops import check, variants_of
    from layer_cases import Case, Inputs, make_inputs

    case = Case("bn_act_pool", task.shape, post_slope=0.0, pool=(2, 2, 0))
    variants = variants_of(case, task.compiled)
    cpu = torch.device("cpu")
    wrong = check(case, variants, torch.float32, cpu)
    sets = cycle([make_inputs(case, torch.float32, cpu, seed) for seed in range(SETS)])

    def step(function: Callable[[dict[str, Tensor]], Tensor], inputs: Inputs) -> None:
        torch.autograd.grad(function(inputs.tensors), inputs.differentiable, inputs.dy)

    steps = {n: lambda f=f: step(f, next(sets)) for n, f in variants.items() if n not in wrong}
    return steps, wrong


def training_steps(task: Task) -> tuple[dict[str, Step], dict[str, str]]:
    """Return a training step of each variant of the network, and what is wrong with those left
    out: loss, backward and SGD with Nesterov momentum on random images."""
    import torch
    from layer_cases import network_of
    from torch.nn import functional as F

    from fastcnn.archs.spec import build

    network = network_of(task.network)
    size = network.image_sizes[0]
    models = {"fused": build(network, size, network.classes, "fused")}
    models["eager"] = build(network, size, network.classes, "torch")
    models["eager"].load_state_dict(models["fused"].state_dict())
    batches = [_batch(task.batch, size, network.classes, seed) for seed in range(SETS)]
    wrong = _wrong_models(models, batches[0])
    if task.compiled:
        copied = build(network, size, network.classes, "torch")
        copied.load_state_dict(models["eager"].state_dict())
        models["compile"] = torch.compile(copied, dynamic=False)

    def steps_of(model: nn.Module) -> Step:
        optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9, nesterov=True, fused=True)
        turns = cycle(batches)

        def step() -> None:
            images, labels = next(turns)
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    return {n: steps_of(m) for n, m in models.items() if n not in wrong}, wrong


def _batch(batch: int, size: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, size, size, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return images.contiguous(memory_format=torch.channels_last), labels


def _wrong_models(models: dict[str, nn.Module], batch: tuple[Tensor, Tensor]) -> dict[str, str]:
    """Return the models that are wrong, and how.

    Their logits, and the fp64 gradients of the fused one, are compared with those of torch in fp64.
    Gradients in fp32 prove less: a mask that a rounding turns in one layer changes all before it.
    """
    from bench_ops import errors_of, wrong_ones

    images, labels = batch
    exact = _results(models["eager"], images.double(), labels)
    logits = {"logits": exact["logits"]}
    errors = {n: errors_of(_results(m, images, labels), logits) for n, m in models.items()}
    wrong = wrong_ones(errors, SLACK)
    for name, error in errors_of(_results(models["fused"], images.double(), labels), exact).items():
        if not error <= EXACT_SLACK:
            wrong.setdefault("fused", f"{name} errs by {error:.3g} in fp64")
    return wrong


def _results(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Return the logits and every gradient of a copy of the model in the dtype of the images."""
    import copy

    from torch.nn import functional as F

    model = copy.deepcopy(model).to(images.dtype)
    for layer in model:
        if hasattr(layer, "dropout"):  # whose draws depend on the dtype
            layer.dropout = 0.0
    logits = model(images)
    F.cross_entropy(logits, labels).backward()
    return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters()}}


def main(setting: str, task: Task) -> None:
    if setting == "tuned":
        host.share_the_cores()  # before torch is imported
    import torch

    if setting == "tuned":
        host.tune_process()
    if task.threads:
        torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    # the answers alone go where they are read
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    steps, wrong = training_steps(task) if task.network else op_steps(task)
    print(json.dumps({"variants": list(steps), "wrong": wrong}), file=answers, flush=True)
    for line in sys.stdin:
        step = steps[line.strip()]
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Task.from_json(sys.argv[2]))
