"""The optimisers' updates in plain torch: the oracle of `sgd_`, `adam_` and `find_nonfinite_`.

Whole lists of tensors at once, with no wait for the device.
"""

import math

import torch
from torch import Tensor


@torch.no_grad()
def sgd_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    copies: list[Tensor],
    averages: list[Tensor],
    rates: Tensor,
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    decay: float,
    decoupled: bool,
    momentum: float,
    nesterov: bool,
) -> None:
    """Take a step of SGD in place; with lr = rates[0] and g = factor · grad:

    g ← g + decay · w, or, decoupled, w ← w · (1 - lr · decay);
    buf ← momentum · buf + g;  w ← w - lr · (g + momentum · buf if nesterov else buf);
    copy ← rounded(w);  average ← average + rates[1] · (w - average).

    params: fp32 or fp64. grads: one dtype. momenta: of params' dtype, [] without momentum.
    copies: half precision, or []. averages: of params' dtype, or []. rates: fp32 (2,).
    factor: fp32 (), or None for 1. found_inf: fp32 (), or None; where it is not 0, params, momenta
    and copies stay and the averages still move.
    """
    if not params:
        return
    old = _kept(found_inf, params, momenta, copies)
    lr = rates[0].to(params[0].dtype)
    step = _decayed_gradients(params, grads, lr, factor, decay, decoupled)
    if momentum:
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, step)
        if nesterov:
            torch._foreach_add_(step, momenta, alpha=momentum)
        else:
            torch._foreach_copy_(step, momenta)
    torch._foreach_mul_(step, lr)
    torch._foreach_sub_(params, step)
    _follow(params, copies, averages, rates, found_inf, old)


@torch.no_grad()
def adam_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor],
    averages: list[Tensor],
    rates: Tensor,
    steps: Tensor,
    factor: Tensor | None = None,
    found_inf: Tensor | None = None,
    *,
    decay: float,
    decoupled: bool,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Take a step of Adam, or AdamW if decoupled, in place; lr, g, copies, averages as in `sgd_`:

    m ← beta1 · m + (1 - beta1) · g;  v ← beta2 · v + (1 - beta2) · g²;
    w ← w - lr / (1 - beta1^t) · m / (sqrt(v) / sqrt(1 - beta2^t) + eps).

    exp_avgs (m), exp_avg_sqs (v): of params' dtype. steps: fp32 (), the number t of this step, from
    1. All else as for `sgd_`.
    """
    if not params:
        return
    old = _kept(found_inf, params, exp_avgs, exp_avg_sqs, copies)
    dtype = params[0].dtype
    lr = rates[0].to(dtype)
    g = _decayed_gradients(params, grads, lr, factor, decay, decoupled)
    torch._foreach_lerp_(exp_avgs, g, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, g, g, 1 - beta2)
    rest1, rest2 = _bias_correction(beta1, steps), _bias_correction(beta2, steps)
    divisor = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(divisor, rest2.sqrt().to(dtype))
    torch._foreach_add_(divisor, eps)
    step = torch._foreach_div(exp_avgs, divisor)
    torch._foreach_mul_(step, (rates[0] / rest1).to(dtype))
    torch._foreach_sub_(params, step)
    _follow(params, copies, averages, rates, found_inf, old)


def _bias_correction(beta: float, steps: Tensor) -> Tensor:
    """1 - beta^steps without cancellation, fp64."""
    if beta == 0:
        return torch.ones_like(steps, dtype=torch.float64)
    return -torch.expm1(steps.double() * math.log(beta))


def _decayed_gradients(
    params: list[Tensor],
    grads: list[Tensor],
    lr: Tensor,
    factor: Tensor | None,
    decay: float,
    decoupled: bool,
) -> list[Tensor]:
    """Apply the decay, decoupled to params or else to the gradients, which are returned anew."""
    g = [torch.empty_like(param) for param in params]
    torch._foreach_copy_(g, grads)
    if factor is not None:
        torch._foreach_mul_(g, factor.to(lr.dtype))
    if decay and decoupled:
        torch._foreach_mul_(params, 1 - lr * decay)
    elif decay:
        torch._foreach_add_(g, params, alpha=decay)
    return g


def _kept(found_inf: Tensor | None, *lists: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of a tensor and what it is now, which `_follow` brings back if found_inf says so."""
    return [] if found_inf is None else [(t, t.clone()) for some in lists for t in some]


def _follow(
    params: list[Tensor],
    copies: list[Tensor],
    averages: list[Tensor],
    rates: Tensor,
    found_inf: Tensor | None,
    old: list[tuple[Tensor, Tensor]],
) -> None:
    """Bring copies and averages up to the new weights, or what was kept back."""
    if copies:
        torch._foreach_copy_(copies, params)
    if found_inf is not None:
        skip = found_inf != 0
        for now, before in old:
            torch.where(skip, before, now, out=now)
    if averages:
        distance = torch._foreach_sub(params, averages)
        torch._foreach_mul_(distance, rates[1].to(params[0].dtype))
        torch._foreach_add_(averages, distance)


@torch.no_grad()
def find_nonfinite_(grads: list[Tensor], found_inf: Tensor) -> None:
    """Set found_inf, fp32 (), to 1 where any value of grads is inf or NaN; else it stays as it is.

    grads: any mixture of dtypes. By their largest magnitudes, which CUDA has for every dtype, other
    than torch._amp_foreach_non_finite_check_and_unscale_, which has no bf16 there.
    """
    for dtype in {grad.dtype for grad in grads}:
        own = [grad for grad in grads if grad.dtype == dtype and grad.numel()]
        if own:
            largest = torch.stack(torch._foreach_norm(own, math.inf))
            found_inf.masked_fill_(~largest.isfinite().all(), 1)
