"""The optimiser of a run: parameter groups with their decay, and torch's fused update."""

from typing import Any

import torch
from torch import nn

from fastcnn.config import OptimConfig


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Split parameters by weight decay.

    Norms and biases (one-dimensional parameters) get none with `exempt_norm_bias`. The weight of a
    layer that carries its own `l2` (the λ of λ·Σw², as in Keras) decays by 2λ in place of
    `weight_decay`, since the gradient of λ·Σw² is 2λ·w. Frozen parameters are in no group.
    """
    own: dict[int, float] = {
        id(parameter): 2 * float(getattr(module, "l2", 0))
        for module in model.modules()
        if getattr(module, "l2", 0)
        for parameter in module.parameters()
        if parameter.ndim > 1
    }
    # keyed by kind as well: a run resumed with another weight decay must find the same groups
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if config.exempt_norm_bias and parameter.ndim == 1:
            key = ("exempt", 0.0)
        elif id(parameter) in own:
            key = ("own", own[id(parameter)])
        else:
            key = ("decayed", config.weight_decay)
        groups.setdefault(key, []).append(parameter)
    return [{"params": params, "weight_decay": decay} for (_, decay), params in groups.items()]


def is_decoupled(config: OptimConfig) -> bool:
    """Whether the decay shrinks the weights directly instead of joining the gradient."""
    return config.decay == "decoupled" or config.optimizer == "adamw"


class DecoupledSGD(torch.optim.SGD):
    """SGD whose weight decay is decoupled: w ← w · (1 − lr·λ) before the step.

    Loshchilov & Hutter (2019), algorithm 1. A step that the loss scaler skips leaves w alone.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group in self.param_groups:
            if group["weight_decay"]:
                loss = group["lr"] * group["weight_decay"]
                found_inf = getattr(self, "found_inf", None)
                shrink = 1 - loss if found_inf is None else 1 - loss * (1 - found_inf)
                torch._foreach_mul_([p for p in group["params"] if p.grad is not None], shrink)
            group["weight_decay"] = 0.0
        try:
            return super().step(closure)
        finally:
            for group, decay in zip(self.param_groups, decays, strict=True):
                group["weight_decay"] = decay


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """SGD, Adam or AdamW in torch's fused implementation."""
    groups = parameter_groups(model, config)
    if config.optimizer != "sgd":
        adam = torch.optim.AdamW if is_decoupled(config) else torch.optim.Adam
        return adam(groups, lr=config.lr, fused=True)
    sgd = DecoupledSGD if is_decoupled(config) else torch.optim.SGD
    nesterov = config.nesterov and config.momentum > 0
    return sgd(groups, lr=config.lr, momentum=config.momentum, nesterov=nesterov, fused=True)


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load moments and step counts; hyperparameters stay those of `optimizer`.

    torch would bring the saved hyperparameters back, over those that a resumed run was given.
    """
    own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, own, strict=True):
        group.update(values)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
