"""The optimiser of a run: parameters grouped by their decay, and one fused update of a group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.config import OptimConfig
from fastcnn.ops.backend import ops_for
from fastcnn.train.checkpoints.checkpoint import copy_checked_

BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam: Kingma and Ba 2015, and torch


class Optimizer:
    """SGD or Adam on fp32 weights, with their half-precision copies and averages.

    One launch for all parameters of a kind (weight decay; with or without a copy) does what torch's
    optimiser, autocast's casts and the averaging do in several passes. `halves`: the copies that
    the network computes with, by their originals, whose gradients are read instead. `averages`: the
    tensors that trail the weights, in the order of model.parameters(). Nothing is read back to the
    host.
    """

    def __init__(
        self,
        model: nn.Module,
        config: OptimConfig,
        halves: Mapping[nn.Parameter, nn.Parameter] | None = None,
        averages: Sequence[Tensor] = (),
        backend: str = "auto",
    ):
        self.config = config
        self.decoupled = is_decoupled(config)
        self.names = {id(p): name for name, p in model.named_parameters()}
        averaged = dict(zip(map(id, model.parameters()), averages, strict=bool(averages)))
        first = next(model.parameters())
        # whose gradients come in the dtype of the copies
        computing = next(iter(halves.values()), first) if halves else first
        self._ops = ops_for(backend, computing.detach(), first)
        self.steps = torch.zeros((), device=first.device)
        self.groups = [
            Group(
                params,
                [(halves or {}).get(p, p) for p in params],
                [halves[p].detach() for p in params] if halves and params[0] in halves else [],
                [averaged[id(p)] for p in params] if averages else [],
                {name: [torch.zeros_like(p) for p in params] for name in self._state_names()},
                decay,
            )
            for params, decay in grouped(model, config, halves or {})
        ]
        self.leaves = [leaf for group in self.groups for leaf in group.leaves]

    def _state_names(self) -> tuple[str, ...]:
        if self.config.optimizer != "sgd":
            return ("exp_avg", "exp_avg_sq")
        return ("momentum",) if self.config.momentum else ()

    @torch.no_grad()
    def step(
        self,
        gradients: Sequence[Tensor],
        rates: Tensor,
        factor: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Update the weights by `gradients`, one for each of `leaves`.

        rates fp32 (2,): learning rate and weight of the averages' move. factor fp32 (): multiplies
        the gradients. found_inf fp32 (): not 0: this step is skipped.
        """
        if self.config.optimizer != "sgd":
            self.steps += 1 if found_inf is None else 1 - found_inf
        rest = iter(self.aligned(gradients))
        for group in self.groups:
            own = [next(rest) for _ in group.leaves]
            self._update(group, own, rates, factor, found_inf)

    @torch.no_grad()
    def aligned(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients in their leaves' memory layout, copies where they are not."""
        return [_strides_of(*pair) for pair in zip(self.leaves, gradients, strict=True)]

    def _update(self, group: "Group", gradients: list[Tensor], rates: Tensor, *scale: Any) -> None:
        config, params = self.config, [p.detach() for p in group.params]
        decay = {"decay": group.decay, "decoupled": self.decoupled}
        if config.optimizer == "sgd":
            momenta = group.state.get("momentum", [])
            nesterov = config.nesterov and config.momentum > 0
            self._ops.sgd_(
                params, gradients, momenta, group.copies, group.averages, rates, *scale,
                **decay, momentum=config.momentum, nesterov=nesterov,
            )  # fmt: skip
            return
        self._ops.adam_(
            params, gradients, group.state["exp_avg"], group.state["exp_avg_sq"], group.copies,
            group.averages, rates, self.steps, *scale, **decay, beta1=BETAS[0], beta2=BETAS[1],
            eps=EPS,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return the moments by parameter's name, and the number of Adam's steps."""
        state: dict[str, dict[str, Tensor]] = {}
        for group in self.groups:
            for kind, tensors in group.state.items():
                named = zip(group.params, tensors, strict=True)
                state.setdefault(kind, {}).update({self.names[id(p)]: t for p, t in named})
        return {"state": state, "steps": self.steps}

    @torch.no_grad()
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take up moments; hyperparameters stay those of this optimiser.

        Raises ValueError where the saved state is that of other parameters or another optimiser.
        """
        own = self.state_dict()["state"]
        names = {kind: tensors.keys() for kind, tensors in own.items()}
        if {kind: tensors.keys() for kind, tensors in saved["state"].items()} != names:
            raise ValueError("the optimiser's state is that of another network or optimiser")
        for kind, tensors in own.items():
            for name, tensor in tensors.items():
                copy_checked_(tensor, saved["state"][kind][name])
        copy_checked_(self.steps, saved["steps"])


@dataclass(frozen=True)
class Group:
    """Parameters that one launch updates, and what lies beside them, in the same order.

    leaves: what the network computes with and has the gradient of: a copy or the parameter itself.
    """

    params: list[nn.Parameter]
    leaves: list[nn.Parameter]
    copies: list[Tensor]
    averages: list[Tensor]
    state: dict[str, list[Tensor]]
    decay: float


def grouped(
    model: nn.Module, config: OptimConfig, halves: Mapping[nn.Parameter, nn.Parameter]
) -> list[tuple[list[nn.Parameter], float]]:
    """Split the parameters that are trained, and not frozen, by weight decay and by whether they
    have a copy."""
    own_decay = layer_decays(model)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decay = own_decay.get(parameter, config.weight_decay)
            if config.exempt_norm_bias and parameter.ndim == 1:
                decay = 0.0
            groups.setdefault((decay, parameter in halves), []).append(parameter)
    return [(params, decay) for (decay, _), params in groups.items()]


def layer_decays(model: nn.Module) -> dict[nn.Parameter, float]:
    """The decay of weights whose layer carries an `l2` of its own: the λ of λ·Σw², as in Keras,
    in place of `weight_decay`; its gradient is 2λ·w."""
    return {
        parameter: 2 * float(getattr(module, "l2", 0))
        for module in model.modules()
        if getattr(module, "l2", 0)
        for parameter in module.parameters()
        if parameter.ndim > 1
    }


def is_decoupled(config: OptimConfig) -> bool:
    """Whether the decay shrinks the weights directly instead of joining the gradient."""
    return config.decay == "decoupled" or config.optimizer == "adamw"


def _strides_of(leaf: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in the leaf's memory layout, which the library that computed it may not keep."""
    pairs = zip(leaf.shape, leaf.stride(), gradient.stride(), strict=True)
    if all(size == 1 or own == its for size, own, its in pairs):
        return gradient
    return torch.empty_like(leaf).copy_(gradient)
