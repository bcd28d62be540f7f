"""What a layer computes, in few fused kernels for CPU and CUDA tensors: convolutions with what
follows them (convolution.py), what follows a product of torch's own (norm_act.py); and what
surrounds a step: the augmentation of a batch (augmentation.py) and the optimisers' updates
(optimizers.py).

The public functions have the names, arguments and results of `fastcnn.ops.reference`, the same in
plain torch. They work on channels-last memory (NHWC) alone: another layout is an error, never a
silent copy. Activations are fp32, bf16, fp64 (CPU) or fp32, bf16, fp16 (CUDA); parameters and
statistics are fp32 (fp64 where the activations are). Under autocast an op computes in the dtype of
its x and casts nothing, but a convolution takes autocast's dtype as torch's does. There is no
second derivative, no forward-mode one and no rule for the transforms of torch.func: each is an
error.

The files hold one block an op of the library: schema, shapes for tracing, gradient. csrc/bindings*
register the kernels. `load()` builds the library if need be; the first call of a public function
does it as well, but not inside torch.compile.
"""

from fastcnn.ops.augmentation import augment
from fastcnn.ops.convolution import Pending, conv_bias_act, conv_bn_act
from fastcnn.ops.loading import DTYPES, has_kernels, load, supports
from fastcnn.ops.norm_act import bias_act, bias_act_pool, bn_act, bn_act_pool
from fastcnn.ops.optimizers import adam_, find_nonfinite_, sgd_

__all__ = [
    "DTYPES",
    "OP_NAMES",
    "Pending",
    "adam_",
    "augment",
    "bias_act",
    "bias_act_pool",
    "bn_act",
    "bn_act_pool",
    "conv_bias_act",
    "conv_bn_act",
    "find_nonfinite_",
    "has_kernels",
    "load",
    "sgd_",
    "supports",
]

OP_NAMES = (
    "bn_stats",
    "bn_act",
    "bn_act_backward",
    "bn_act_backward_sums",
    "bn_act_backward_apply",
    "bn_act_pool",
    "bn_act_pool_backward",
    "bn_act_pool_backward_sums",
    "bn_act_pool_backward_apply",
    "bias_act",
    "bias_act_backward",
    "bias_act_pool",
    "bias_act_pool_backward",
    "conv",
    "conv_bias_act_pool",
    "conv_affine_act",
    "conv_data_gradient",
    "conv_weight_gradient",
    "bn_stats_merge",
    "augment",
    "sgd_",
    "adam_",
    "find_nonfinite_",
)
