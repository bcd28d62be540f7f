"""What a network makes of one image, layer by layer, and the filters that it begins with."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from fastcnn.archs.elementary import Elementary
from fastcnn.archs.layers import ConvNormAct
from fastcnn.archs.spec import LayerRow

Maps = dict[str, np.ndarray]


def stages(rows: Sequence[LayerRow], chosen: Sequence[LayerRow]) -> list[tuple[str, ...]]:
    """Which operations to show beside each other, a tuple a figure.

    chosen: rows of the network's table. A convolution among them is shown before and after
    normalisation: its output and that of the batch norm behind it or, where there is none, of the
    activation. Other operations with channels of pixels are shown by themselves, unless they belong
    to a layer of which a convolution is shown.
    """
    names = [row.name for row in rows]
    convolutions = [row for row in chosen if row.name.startswith("Conv2d")]
    if not convolutions:
        return [(row.name,) for row in chosen if len(row.output_shape) == 3]
    found: list[tuple[str, ...]] = []
    for row in convolutions:
        after = _behind(names[names.index(row.name) + 1 :])
        found.append((row.name, after) if after else (row.name,))
    return found


def _behind(names: Sequence[str]) -> str | None:
    """Of the operations behind a convolution the norm, else the activation, if there is one."""
    activation = None
    for name in names:
        kind = name.split("-")[0]
        if kind == "BatchNorm2d":
            return name
        if kind not in ("ReLU", "LeakyReLU"):
            break
        activation = activation or name
    return activation


def feature_maps(network: Elementary, image: Tensor, names: Sequence[str]) -> Maps:
    """The outputs of the named operations for one normalised image (3, H, W): float32 (K, P, Q)."""
    found = network.outputs(image[None], names)
    return {name: values[0].float().cpu().numpy() for name, values in found.items()}


def first_filters(model: nn.Module) -> np.ndarray:
    """The filters of a network's first convolution as images: float32 (K, R, S, 3), red, green and
    blue, each filter from its own smallest weight (0) to its largest (1), one without extent 0.5.
    """
    conv = next(layer.conv for layer in model.modules() if isinstance(layer, ConvNormAct))
    weights = conv.weight.detach().float().cpu().numpy().transpose(0, 2, 3, 1)
    return scaled(weights, 0.5)


def scaled(values: np.ndarray, flat: float = 0.0) -> np.ndarray:
    """Bring each of (n, …) to the range from its own smallest (0) to its largest value (1); one
    that is the same everywhere becomes `flat`."""
    axes = tuple(range(1, values.ndim))
    low, high = (part(axis=axes, keepdims=True) for part in (values.min, values.max))
    extent = high - low
    none = extent == 0
    return np.where(none, flat, (values - low) / np.where(none, 1, extent)).astype(np.float32)
