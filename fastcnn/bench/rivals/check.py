"""Whether a variant's steps are right: a few of them against fp64, before anything is timed.

Each starts from the same weights and makes the same steps on the same bare images as plain torch in
fp64 does. Its losses, and the change of each weight and running statistic, may err twice as much as
those of eager torch in the same precision, and some slack more.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcnn.bench.rivals import correctness
from fastcnn.bench.rivals.variants import RECIPE, Variant, Workbench

STEPS = 2
# mean error over mean value that a variant may have beyond twice eager's: roundings, and a few
# windows and masks that fall the other way and change the gradients of all layers before them. In
# fp32 F(4x4, 3x3) rounds more than torch's convolution: 0.031 was seen by test_bench_check.py
# (cnn-a+norm, 8 images, CPU, 2026-12-01)
SLACK = {"fp32": 0.05, "bf16": 0.1, "fp16": 0.05}
FIRST_LOSS = "loss of step 1"  # the forward pass alone: nothing has been updated
FIRST_LOSS_SLACK = {"fp32": 1e-5, "bf16": 2**-8, "fp16": 2**-10}
MOST = {"fp32": 0.2, "bf16": 0.6, "fp16": 0.3}  # that eager itself may err
# of the median change of a tensor: below it, a change is rounding (a bias before a norm)
SMALL_CHANGE = 0.03


class Check:
    """The true steps of a task and eager's errors; raises what eager itself raises."""

    def __init__(self, bench: Workbench):
        self.bench, self.half = bench, bench.task.half
        self.truth = true_changes(bench)
        means = [t.abs().mean() for t in self.truth.values() if t.dim()]
        self.small = SMALL_CHANGE * torch.stack(means).median().item()
        eager = bench.variant(correctness.EAGER, augment=False)
        self.eager = self.errors(eager, self.run(eager))

    def run(self, variant: Variant, after_first: Callable[[], None] | None = None) -> list[float]:
        """Make the steps; return the loss of each."""
        sums = [0.0]
        for _ in range(STEPS):
            variant.step()
            sums.append(variant.result())
            if after_first and len(sums) == 2:
                after_first()
        return [(b - a) / self.bench.task.batch for a, b in itertools.pairwise(sums)]

    def errors(self, variant: Variant, losses: list[float]) -> dict[str, float]:
        """The variant's errors after its steps, by tensor."""
        return correctness.errors_of(
            changes(self.bench, variant.model, losses), self.truth, self.small
        )

    def why_wrong(self, backend: str, variant: Variant, losses: list[float]) -> str:
        """What is wrong with a variant that has made its steps; "" if nothing is."""
        slack = dict.fromkeys(self.truth, SLACK[self.half])
        slack[FIRST_LOSS] = FIRST_LOSS_SLACK[self.half]
        errors = {correctness.EAGER: self.eager, backend: self.errors(variant, losses)}
        return verdict(backend, variant, errors, slack, MOST[self.half])


def verdict(
    backend: str,
    variant: Variant,
    errors: dict[str, dict[str, float]],
    slack: float | dict[str, float],
    most: float,
) -> str:
    """What is wrong with a variant, by its errors beside eager's (`correctness.wrong_ones`)."""
    if variant.graphs and not variant.graphs():
        return "none of the steps that were checked was a graph"
    wrong = correctness.wrong_ones(errors, slack, most)
    if correctness.EAGER in wrong:
        return f"eager, by which it is judged: {wrong[correctness.EAGER]}"
    return wrong.get(backend, "")


def changes(bench: Workbench, model: nn.Module, losses: list[float]) -> dict[str, Tensor]:
    """The losses of the steps, and how far each weight and running statistic has moved."""
    state = {n: t for n, t in model.state_dict().items() if t.is_floating_point()}
    moved = {n: t.detach().cpu().double() - bench.weights[n].double() for n, t in state.items()}
    return {f"loss of step {i}": torch.tensor(v).double() for i, v in enumerate(losses, 1)} | moved


def true_changes(bench: Workbench) -> dict[str, Tensor]:
    """The same steps in fp64, by plain torch: SGD with Nesterov momentum as in torch.optim.SGD."""
    model = bench.model(correctness.EAGER).double()
    parameters = list(model.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    batches, losses = bench.resident_batches(torch.float64, augment=False), []
    for _ in range(STEPS):
        images, labels = next(batches)
        loss = F.cross_entropy(model(images), labels, label_smoothing=RECIPE.label_smoothing)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, gradient, momentum in zip(parameters, gradients, momenta, strict=True):
                decayed = gradient + RECIPE.weight_decay * (p.ndim > 1) * p
                momentum.mul_(RECIPE.momentum).add_(decayed)
                p.sub_(RECIPE.lr * (decayed + RECIPE.momentum * momentum))
        losses.append(loss.item())
    return changes(bench, model, losses)
