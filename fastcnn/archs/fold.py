"""Batch norm folded into the product before it: a network for inference without those norms.

In evaluation a batch norm is an affine map by channel, with numbers that no image changes. Behind a
convolution or linear layer with nothing in between it is that layer with other weights:

    scale = norm.weight / √(running_var + eps)
    weight' = weight · scale (by filter),  bias' = norm.bias + (bias − running_mean) · scale

So a layer costs its product, its bias and its activation: no read of four vectors by channel beside
every value, no launch that prepares them. In half precision the folded weights are rounded, as
those that train are. A layer with an activation between product and norm keeps its norm. Known as
conv-bn fusion: torch.nn.utils.fusion.fuse_conv_bn_eval.
"""

import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastcnn.archs.layers import ConvNormAct, LinearNormAct, conv_linear_parameters

Layer = ConvNormAct | LinearNormAct


class Folded:
    """`network`: `model` for inference with its norms folded, which `refresh()` brings up to date.

    dtype: of activations and of what convolutions and linear layers multiply with (see
    `conv_linear_parameters`); None: the model's own. Other parameters keep the model's dtype.

    The network is in evaluation mode and without gradients, its weights in the model's memory
    formats. What is neither folded nor rounded it reads from the model's own memory, so that a
    model without such norms costs nothing in its own dtype. No tensor of it ever moves: a CUDA
    graph sees what a refresh writes. The model may be trained and loaded in place, not moved or
    cast.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None):
        # deepcopy takes what its memo holds for copied already
        memo: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
        memo |= {id(p): _constant(p.detach()) for p in model.parameters()}
        self.network = copy.deepcopy(model, memo).eval()
        pairs = list(zip(model.modules(), self.network.modules(), strict=True))
        self._folds = [_fold_layer(layer, twin, dtype) for layer, twin in pairs if folds(layer)]
        self._copies, self._originals = self._rounded(dtype) if dtype else ([], [])
        self.refresh()

    def _rounded(self, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        """Give the network copies in `dtype` of the weights that no norm is folded into."""
        own = {t.data_ptr() for fold in self._folds for t in (fold.new_weight, fold.new_bias)}
        rest = [p for p in conv_linear_parameters(self.network) if p.data_ptr() not in own]
        originals = [parameter.detach() for parameter in rest]
        for parameter, original in zip(rest, originals, strict=True):
            parameter.data = original.to(dtype)
        return [parameter.detach() for parameter in rest], originals

    @torch.no_grad()
    def refresh(self) -> None:
        """Fold and round the model's weights as they are now, in place.

        A launch for each folded layer and about twenty for all of them, and the host waits for
        none. Computed in fp64, then rounded once (to a half dtype by torch, by way of fp32). A NaN
        among the statistics goes on into the weights.
        """
        if self._copies:
            torch._foreach_copy_(self._copies, self._originals)
        if not self._folds:
            return
        # one vector of all layers' channels
        scale, shift, bias, mean, variance, eps = (
            torch.cat(parts).double()
            for parts in zip(*[fold.vectors for fold in self._folds], strict=True)
        )
        scale /= (variance + eps).sqrt()
        shift += (bias - mean) * scale
        sizes = [len(fold.new_bias) for fold in self._folds]
        torch._foreach_copy_([fold.new_bias for fold in self._folds], shift.split(sizes))
        for fold, factors in zip(self._folds, scale.split(sizes), strict=True):
            by_filter = factors.view(-1, *[1] * (fold.weight.dim() - 1))
            torch.mul(fold.weight, by_filter, out=fold.new_weight)


def fold(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Return `Folded(model, dtype).network` with a memory of its own.

    Its state dict has the names of a network without those norms: conv1.conv.weight,
    conv1.conv.bias, and so on.
    """
    return copy.deepcopy(Folded(model, dtype).network)


def folds(module: nn.Module) -> bool:
    """Whether this is a layer whose norm follows its product directly."""
    return isinstance(module, Layer) and module.norm is not None and module.pre_slope == 1


class _Fold(NamedTuple):
    """A folded layer's old weight and the vectors by channel (norm's weight and bias, product's
    bias, running mean and variance, eps), and what they become."""

    weight: Tensor
    vectors: tuple[Tensor, ...]
    new_weight: Tensor
    new_bias: Tensor


def _fold_layer(layer: Any, twin: Any, dtype: torch.dtype | None) -> _Fold:
    """Take the norm out of `twin`, a copy of `layer`; what it gets in its place is yet unset."""
    product, own, norm = _product(layer), _product(twin), layer.norm
    own.weight = _constant(torch.empty_like(product.weight, dtype=dtype))
    # see conv_linear_parameters: after a convolution the op adds the bias
    like = own.weight if isinstance(own, nn.Linear) else norm.bias
    own.bias = _constant(torch.empty_like(norm.bias, dtype=like.dtype))
    twin.norm = None
    mean, variance = norm.running_mean, norm.running_var
    bias = torch.zeros_like(mean) if product.bias is None else product.bias.detach()
    eps = torch.full_like(variance, norm.eps, dtype=torch.float64)
    vectors = (norm.weight.detach(), norm.bias.detach(), bias, mean, variance, eps)
    return _Fold(product.weight.detach(), vectors, own.weight.detach(), own.bias.detach())


def _product(layer: Any) -> Any:
    """The nn.Conv2d or nn.Linear of a layer."""
    return layer.conv if isinstance(layer, ConvNormAct) else layer.linear


def _constant(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
