"""safetensors: the weights alone, by this network's names or by torchvision's.

A file by own names is the state dict of the network as it was trained, norms and all, and its
metadata say how to build that network. By torchvision's names it holds the features of a VGG with
batch norm (torchvision.models.vgg16_bn().features): the same layers, but torchvision's convolutions
have biases beside their norms, which are zeros here. Its classifier is for 224x224 images and
ImageNet, ours is not, so that no shape of it fits.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from fastcnn.archs import get_network
from fastcnn.archs.build import build
from fastcnn.archs.layers import ConvNormAct
from fastcnn.errors import UsageError
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.checkpoints.load_run import TrainedModel

# the letters of Simonyan and Zisserman 2014, table 1, by which torchvision lists their layers
LETTERS = {"vgg11": "A", "vgg13": "B", "vgg16": "D", "vgg19": "E"}


def encode(weights: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file of `weights`, with `metadata` as its own."""
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in weights.items()}, metadata)


def weights_of(trained: TrainedModel, names: str) -> dict[str, Tensor]:
    """Return the weights by "own" or "torchvision" names; raises UsageError where there are none
    of the latter."""
    if names == "own":
        return dict(trained.model.state_dict())
    arch = trained.config.model.arch
    if arch not in LETTERS:
        why = "; its stem is 7x7, ours 3x3" if arch == "resnet18" else ""
        raise UsageError(
            f"--names torchvision: torchvision has no {arch} of this shape{why}; "
            f"it has the features of {', '.join(LETTERS)}"
        )
    return torchvision_weights(trained.model)


def torchvision_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the convolutions and norms of a VGG as torchvision's vgg*_bn names them.

    features is a sequence of convolution, norm, ReLU and, after a group's last, max-pool, numbered
    from 0.
    """
    weights: dict[str, Tensor] = {}
    position = 0
    for layer in model.children():
        if not isinstance(layer, ConvNormAct) or layer.norm is None:
            continue
        conv, norm = f"features.{position}", f"features.{position + 1}"
        weights[f"{conv}.weight"] = layer.conv.weight.detach()
        weights[f"{conv}.bias"] = torch.zeros(layer.conv.out_channels)
        for name, tensor in layer.norm.state_dict().items():
            weights[f"{norm}.{name}"] = tensor
        position += 4 if layer.pool else 3
    return weights


def reader(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the network of a file by own names: built from its metadata alone, with its weights.

    Raises CheckpointError where they do not fit.
    """
    weights, metadata = read(path)
    network = get_network(metadata["arch"])
    classes = json.loads(metadata["classes"])
    with torch.random.fork_rng(devices=[]):
        model = build(network, int(metadata["image_size"]), len(classes), "torch")
    checkpoint.load_weights(model, weights, path)
    return model.eval()


def torchvision_reader(path: Path, trained: TrainedModel) -> Callable[[Tensor], Tensor]:
    """Return torchvision's features with the weights of a file, followed by our own classifier."""
    from torchvision.models import vgg

    weights, _ = read(path)
    # what vgg16_bn().features is, without the 120 million weights of its classifier
    features = vgg.make_layers(vgg.cfgs[LETTERS[trained.config.model.arch]], batch_norm=True)
    features.load_state_dict({k.removeprefix("features."): v for k, v in weights.items()})
    head = [layer for layer in trained.model.children() if not isinstance(layer, ConvNormAct)]
    return nn.Sequential(features, *head).eval()


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
