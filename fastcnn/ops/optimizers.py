"""The update of all parameters of a group in one call: SGD and Adam(W), with half-precision copies
of the weights and their running average; and the look at all gradients that decides on it.

Whatever changes from step to step (learning rate, step, loss scale, whether to skip) is a tensor
on the parameters' device, so that a call never waits for it and may be captured in a CUDA graph.
The functions have the names and arguments of `fastcnn.ops.reference`; csrc/bindings_update.cpp
registers their kernels. There is no gradient.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastcnn.ops.loading import define, ready, schemas

_ops = torch.ops.fastcnn

define(
    "sgd_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] copies, "
    "Tensor(d!)[] averages, Tensor rates, Tensor? factor, Tensor? found_inf, float decay, "
    "bool decoupled, float momentum, bool nesterov) -> ()",
)
define(
    "adam_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] copies, Tensor(e!)[] averages, Tensor rates, Tensor steps, Tensor? factor, "
    "Tensor? found_inf, float decay, bool decoupled, float beta1, float beta2, float eps) -> ()",
)
define("find_nonfinite_", "(Tensor[] grads, Tensor(a!) found_inf) -> ()")


@torch.library.register_fake("fastcnn::sgd_", lib=schemas)
def _(*arguments: Any) -> None:
    return None


@torch.library.register_fake("fastcnn::adam_", lib=schemas)
def _(*arguments: Any) -> None:
    return None


@torch.library.register_fake("fastcnn::find_nonfinite_", lib=schemas)
def _(*arguments: Any) -> None:
    return None


def _count_versions(*lists: list[Tensor]) -> None:
    # a backward that still wants the old weights is an error then, as after torch's optimisers
    torch.autograd.graph.increment_version(list(chain(*lists)))


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

    params: any shapes, fp32, or fp64 on the CPU, in memory without gaps (channels-last as well).
    Each list beside it is as long and its tensors have the shape and strides of their parameter:
    grads, one dtype of fp32, bf16, fp16 (CUDA), or fp64 beside fp64; momenta, of params' dtype, []
    without momentum; copies, bf16 or fp16 (CUDA), or []; averages, of params' dtype, or [].
    rates: fp32 (2,). factor: fp32 (), or None for 1. found_inf: fp32 (), or None; where it is not
    0, params, momenta and copies stay and the averages still move. All on params' device.

    One kernel launch for up to 64 tensors. Same bits for the same input. Raises RuntimeError for
    what does not fit, BuildError without a library. Sutskever et al. 2013, section 2, as in
    torch.optim.SGD; decoupled decay: Loshchilov and Hutter 2019, algorithm 1.
    """
    ready()
    with torch.no_grad():
        _ops.sgd_(
            *(params, grads, momenta, copies, averages, rates, factor, found_inf),
            *(decay, decoupled, momentum, nesterov),
        )
    _count_versions(params, momenta, copies, averages)


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
    1, counted by the caller. All else, and errors, as for `sgd_`; found_inf keeps m and v as well.
    Kingma and Ba 2015, algorithm 1; Loshchilov and Hutter 2019, algorithm 2.
    """
    ready()
    with torch.no_grad():
        _ops.adam_(
            *(params, grads, exp_avgs, exp_avg_sqs, copies, averages),
            *(rates, steps, factor, found_inf, decay, decoupled, beta1, beta2, eps),
        )
    _count_versions(params, exp_avgs, exp_avg_sqs, copies, averages)


def find_nonfinite_(grads: list[Tensor], found_inf: Tensor) -> None:
    """Set found_inf to 1 where any value of grads is inf or NaN; else it stays as it is.

    grads: any shapes in memory without gaps, and any mixture of fp32, bf16, fp16, and fp64 on the
    CPU. found_inf: fp32 (), as the updates take it. All on one device.

    One kernel launch for up to 128 tensors. Raises RuntimeError for what does not fit, BuildError
    without a library.
    """
    ready()
    with torch.no_grad():
        _ops.find_nonfinite_(grads, found_inf)
    _count_versions([found_inf])
