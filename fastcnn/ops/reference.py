"""Every op of fastcnn in plain torch: the oracle that faster versions are judged against.

An op is what follows a convolution or a linear layer: [activation] → normalisation (or bias) →
[+ residual] → [activation] → [max-pool]. An activation is its negative slope: 1 none, 0 ReLU,
0.01 leaky ReLU. Gradients come from autograd.

Sizes: N images, K channels, P x Q pixels. Images are (N, K, P, Q) tensors in channels-last memory
(NHWC); plain torch keeps whatever layout comes in and copies nothing. Activations are bf16, fp16,
fp32 or fp64; parameters and statistics are fp32 (fp64 where the activations are). Everything works
under autocast.
"""

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
