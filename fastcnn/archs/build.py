"""From the records of a network to the module that computes it."""

import itertools

import torch
from torch import nn

from fastcnn.archs.layers import ConvNormAct, make
from fastcnn.archs.spec import Network, walk


def build(network: Network, image_size: int, classes: int, backend: str = "auto") -> nn.Sequential:
    """Return the network as a module with torch's default initialisation, in channels-last memory.

    backend: "fused", "torch" or "auto", which takes the fused ops wherever the native library is
    loaded (`fastcnn.ops.load()`) and has kernels; the weights' names and shapes are the same.

    Submodules: conv1, conv2, … block1, … avgpool, flatten, fc1, …: `LayerRow.layer`.
    Input: (N, 3, image_size, image_size), channels-last; output: logits (N, classes).
    On a GPU in half precision, with the library's convolutions, a forward hook or who calls a
    submodule alone may get an `ops.Pending` (see `ConvNormAct`); `.applied()` makes a tensor of it.
    Backend "torch" never defers.
    Raises UsageError for an image too small for the network.
    """
    model = nn.Sequential()
    for step, _ in walk(network, image_size, classes):
        model.add_module(step.name, make(step.record, step.input_shape[0], backend))
    for layer, follower in itertools.pairwise(model):
        if isinstance(layer, ConvNormAct) and isinstance(follower, ConvNormAct):
            layer.defers = layer.pool is None
    # torch's stubs lack this overload
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
