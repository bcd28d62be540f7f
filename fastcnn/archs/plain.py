"""A network of torch.nn's modules alone: what others compare with, and what is exported.

Biases are inside the convolutions, activations in place, dropout is left out: for inference.
"""

from typing import Any

from torch import Tensor, nn

from fastcnn.archs.layers import ConvNormAct, LinearNormAct, ResidualBlock


def plain(model: nn.Module) -> nn.Module:
    """Return the network for inference, with `model`'s own weights under `model`'s names.

    A folded model (`fastcnn.archs.fold`) gives one without the norms that were folded.
    """
    network = nn.Sequential()
    for name, layer in model.named_children():
        network.add_module(name, _plain_layer(layer))
    return network.eval()


def _plain_layer(layer: Any) -> nn.Module:
    match layer:
        case ConvNormAct() | LinearNormAct():
            return _sequence(layer)
        case ResidualBlock():
            return _PlainBlock(layer)
    return layer


def _sequence(layer: Any, last: bool = True) -> nn.Sequential:
    """[pad] → conv or linear → [pre] → [norm] → [post] → [pool]; last: whether with what follows
    the norm."""
    name = "conv" if isinstance(layer, ConvNormAct) else "linear"
    # what an even kernel pads beyond both sides alike
    top, bottom, left, right = getattr(layer, "pads", (0, 0, 0, 0))
    pads = (0, right - left, 0, bottom - top)
    pool = getattr(layer, "pool", None)
    parts = {
        "pad": nn.ZeroPad2d(pads) if any(pads) else None,
        name: getattr(layer, name),
        "pre": _activation(layer.pre_slope),
        "norm": layer.norm,
        "post": _activation(layer.post_slope) if last else None,
        "pool": nn.MaxPool2d(*pool) if pool else None,
    }
    sequence = nn.Sequential()
    for part, module in parts.items():
        if module is not None:
            sequence.add_module(part, module)
    return sequence


def _activation(slope: float) -> nn.Module | None:
    if slope == 1:
        return None
    return nn.LeakyReLU(slope, inplace=True) if slope else nn.ReLU(inplace=True)


class _PlainBlock(nn.Module):
    """relu(conv2(conv1(x)) + shortcut(x)), each with its norm."""

    def __init__(self, block: Any):
        super().__init__()
        self.conv1 = _sequence(block.conv1)
        self.conv2 = _sequence(block.conv2, last=False)
        self.projection = _sequence(block.projection) if block.projection else nn.Identity()
        self.post = _activation(block.conv2.post_slope)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x))
        y += self.projection(x)
        return y if self.post is None else self.post(y)
