"""Every op of fastcnn in plain torch: the oracle that faster versions are judged against.

An op is what follows a convolution or a linear layer: [activation] → normalisation (or bias) →
[+ residual] → [activation] → [max-pool]. An activation is its negative slope: 1 none, 0 ReLU,
0.01 leaky ReLU. Gradients come from autograd.

Sizes: N images, K channels, P x Q pixels. Images are (N, K, P, Q) tensors in channels-last memory
(NHWC); plain torch keeps whatever layout comes in and copies nothing. Activations are bf16, fp16,
fp32 or fp64; parameters and statistics are fp32 (fp64 where the activations are). Everything works
under autocast.

At the end, the optimisers' updates: whole lists of tensors at once, with no wait for the device.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pre_slope: float = 1.0,
    post_slope: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """Return post((pre(x) - mean) / sqrt(var + eps) * weight + bias + residual).

    x, residual, result: (N, K, P, Q) channels-last, or (N, K); one dtype.
    weight, bias, running_mean, running_var: (K,), fp32 (fp64 where x is).
    training: mean and biased variance of pre(x) over all but K; the running statistics move by
    `momentum` towards them (the variance unbiased), in place. Else the running statistics.

    Raises ValueError for one value a channel in training (as torch.nn.BatchNorm2d does) and for a
    residual of another shape. Ioffe and Szegedy 2015, algorithm 1; He et al. 2016, figure 2.
    """
    y = F.batch_norm(
        _activation(x, pre_slope), running_mean, running_var, weight, bias, training, momentum, eps
    )
    # in place: y is a temporary, and a second one costs memory and, on the CPU, page faults
    return _activation(_add(y, residual), post_slope, inplace=True)


def bn_act_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    pre_slope: float = 1.0,
    post_slope: float = 1.0,
    pool: tuple[int, int, int] = (2, 2, 0),
) -> Tensor:
    """Return max-pool(bn_act(x, ...)).

    x: (N, K, P, Q) channels-last; parameters, statistics and errors as for `bn_act`.
    pool: window, stride and padding in pixels; sizes floor: (P + 2 padding - window) // stride + 1.
    result: (N, K, P', Q') channels-last, x's dtype.

    Raises RuntimeError, as torch does, for a window larger than the padded image.
    """
    y = bn_act(
        x, weight, bias, running_mean, running_var, training, momentum, eps, pre_slope, post_slope
    )
    return _max_pool(y, pool)


def bias_act(
    x: Tensor, bias: Tensor | None, slope: float = 1.0, residual: Tensor | None = None
) -> Tensor:
    """Return act(x + bias + residual); no bias: a linear layer has added its own.

    x, residual, result: (N, K, P, Q) channels-last, or (N, K); one dtype. bias: (K,), fp32.
    Raises ValueError for a residual of another shape, RuntimeError for a bias of another length.
    """
    y = x if bias is None else x + _per_channel(bias, x)
    y = _add(y, residual)
    return _activation(y, slope, inplace=y is not x)


def bias_act_pool(
    x: Tensor, bias: Tensor | None, slope: float = 1.0, pool: tuple[int, int, int] = (2, 2, 0)
) -> Tensor:
    """Return max-pool(bias_act(x, bias, slope)).

    x: (N, K, P, Q) channels-last. bias: (K,), fp32, or None. pool: as for `bn_act_pool`.
    result: (N, K, P', Q') channels-last, x's dtype.
    Raises RuntimeError for a bias of another length or a window larger than the padded image.
    """
    return _max_pool(bias_act(x, bias, slope), pool)


def require_same_shape(residual: Tensor, x: Tensor) -> None:
    """Raise ValueError for a residual that would have to be broadcast."""
    if residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {list(x.shape)}, got {list(residual.shape)}")


def _per_channel(bias: Tensor, x: Tensor) -> Tensor:
    # x's dtype, as a bias inside the convolution has under autocast: fp32 would promote the sum
    return bias.to(x.dtype).view(-1, *[1] * (x.dim() - 2))


def _add(y: Tensor, residual: Tensor | None) -> Tensor:
    if residual is None:
        return y
    require_same_shape(residual, y)
    return y + residual


def _activation(x: Tensor, slope: float, inplace: bool = False) -> Tensor:
    if slope == 1:
        return x
    return F.relu(x, inplace) if slope == 0 else F.leaky_relu(x, slope, inplace)


def _max_pool(y: Tensor, pool: tuple[int, int, int]) -> Tensor:
    size, stride, padding = pool
    return F.max_pool2d(y, size, stride, padding)


# the optimisers' updates


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
