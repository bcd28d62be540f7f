"""The network that is exported: norms folded, torch.nn's modules alone, pixels taken in if wanted.

Everything is fp32 on the CPU. The trace holds torch's own operations only, and the number of images
is free.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.archs.fold import fold
from fastcnn.archs.plain import plain
from fastcnn.data.normalize import Normalization
from fastcnn.train.checkpoints.load_run import TrainedModel

INPUT, OUTPUT, BATCH = "images", "logits", "batch"


class Exported(nn.Module):
    """`network` behind what `pixels` asks for.

    Input: fp32 (N, 3, H, W), normalised, in any memory format; with `pixels`, the normalisation of
    the network and its side, uint8 (N, H, W, 3), RGB. Output: fp32 logits (N, classes).
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, network: nn.Module, pixels: Normalization | None, image_size: int):
        super().__init__()
        self.network = network
        self.pixels = pixels is not None
        self.image_size = image_size
        if pixels is not None:
            scale, bias = pixels.scale_bias(torch.device("cpu"))
            self.register_buffer("scale", scale)
            self.register_buffer("bias", bias)

    def forward(self, images: Tensor) -> Tensor:
        if self.pixels:
            # as ops.reference.augmentation.normalize; without .float(), which torch.export would
            # tie to this device
            images = (images * self.scale + self.bias).permute(0, 3, 1, 2)
        return self.network(images)

    def example(self, count: int = 2) -> Tensor:
        """Return images of the shape and type that it takes; two, as torch.export would otherwise
        take the batch of one for a constant."""
        side = self.image_size
        if self.pixels:
            return torch.zeros(count, side, side, 3, dtype=torch.uint8)
        return torch.zeros(count, 3, side, side)


def exported_network(trained: TrainedModel, preprocess: bool) -> Exported:
    """Return the network of a run for export; `trained` is left as it is."""
    pixels = trained.normalization if preprocess else None
    return Exported(plain(fold(trained.model)), pixels, trained.image_size).eval()


def traced(network: Exported) -> Any:
    """Return its torch.export.ExportedProgram, with a free batch and no word of this machine.

    Nodes carry the files and lines that they came from, which files must not tell.
    """
    shapes = ({0: torch.export.Dim(BATCH)},)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (network.example(),), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program
