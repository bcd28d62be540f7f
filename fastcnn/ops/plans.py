"""Which implementation a convolution layer gets: the vendor's convolution with the ops that follow
it, or the fused convolution of this library.

Which of them is faster depends on the GPU, the shapes and the libraries, so a layer is measured the
first time that it is met, and what was found is kept in memory and in the cache folder. Layers
without such kernels (CPU, fp32, fp64) are the vendor's without being measured, and so are all in
torch's deterministic mode: a plan that depends on timings can differ between two runs.
"""

from typing import Literal, NamedTuple

from torch import Tensor

Choice = Literal["vendor", "fused"]
Mode = Literal["auto", "fused", "vendor"]
Kind = Literal["bn", "bias", "bias-pool", "inference", "inference-pool"]
MODES: tuple[Mode, ...] = ("auto", "fused", "vendor")
KINDS: tuple[Kind, ...] = ("bn", "bias", "bias-pool", "inference", "inference-pool")


class Plan(NamedTuple):
    """Who computes what of a convolution. forward "vendor": everything is the vendor's."""

    forward: Choice
    data_gradient: Choice
    weight_gradient: Choice


VENDOR = Plan("vendor", "vendor", "vendor")
FUSED = Plan("fused", "fused", "fused")

_mode: Mode = "auto"


def set_mode(mode: Mode) -> None:
    """Decide for this process: "auto" by measurement, "fused" wherever there are such kernels,
    "vendor" nowhere. Raises ValueError for another word."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(MODES)}, got {mode!r}")
    _mode = mode


def may_defer(x: Tensor) -> bool:
    """Whether a layer may leave its normalisation and activation of x to the next convolution."""
    return False


def plan_for(
    x: Tensor,
    filter: Tensor,
    stride: int,
    pads: tuple[int, int, int, int],
    kind: Kind,
    pending: bool,
    training: bool,
    wants_data_gradient: bool = True,
    with_bias: bool = False,
) -> Plan:
    """Return who computes a convolution layer.

    x: (N, C, H, W), of a pending input the tensor in it; filter: (K, C, R, S); neither is read.
    pads: top, bottom, left, right, in pixels.
    kind: what follows the product: "bn" statistics (and then an op that is the same under every
    plan), "bias" nothing or such an op, "bias-pool" bias, activation and 2x2 pool in the product's
    own kernel; "inference", "inference-pool": `conv_affine_act` without or with its pool.
    pending: the input is still to be normalised or activated. training: gradients are wanted, and
    statistics are the batch's. wants_data_gradient: not for images. with_bias: the convolution adds
    a bias itself.
    """
    return VENDOR
