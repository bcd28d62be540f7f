"""Where a step first meets a number that is not finite: looked for once it has ended a run."""

from typing import Any

import torch
from torch import Tensor

from fastcnn.ops import Pending
from fastcnn.train.step import TrainStep


def first_not_finite(step: TrainStep, loader: Any, epoch: int, position: int) -> str:
    """Take step `position` of `epoch` (both 0-based) once more, without its update, and tell what
    is the first value in it that is not finite: "the output of conv3".

    Weights, order and augmentation are what they were, but dropout draws anew: where nothing is
    found again, "the loss or a gradient". The iteration before must have ended.
    """
    loader.load_state_dict({"epoch": epoch, "position": position * loader.step_images})
    images, labels = next(iter(loader))
    found = [] if _finite(images) else ["an image"]
    hooks = [
        module.register_forward_hook(_noting(f"the output of {name}", found))
        for name, module in step.network.named_modules()
        if name
    ]
    try:
        loss, _ = step.forward(images, labels, position)
    finally:
        for hook in hooks:
            hook.remove()
    if not _finite(loss):
        found.append("the loss")
    # ranks go on together, since a synchronised norm waits for all of them; what only another one
    # has seen, that one tells
    (met,) = step.ranks.all_reduce_max(len(found) > 0)
    if not met and (gradient := _gradient(step, loss)):
        found.append(gradient)
    return found[0] if found else "the loss or a gradient"


def _gradient(step: TrainStep, loss: Tensor) -> str:
    """The gradient that comes first on the way back, which is the last parameter's."""
    scaled = loss * step.scale.scale[0] if step.scale else loss
    gradients = torch.autograd.grad(scaled, step.optimizer.leaves)
    names = {id(parameter): name for name, parameter in step.network.named_parameters()}
    bad = {
        names[id(leaf)]
        for leaf, gradient in zip(step.optimizer.leaves, gradients, strict=True)
        if not _finite(gradient)
    }
    last = [name for name in names.values() if name in bad][-1:]
    return f"the gradient of {last[0]}" if last else ""


def _noting(text: str, found: list[str]) -> Any:
    def hook(module: Any, inputs: Any, output: Tensor | Pending) -> None:
        values = output.applied() if isinstance(output, Pending) else output
        if not _finite(values):
            found.append(text)

    return hook


def _finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
