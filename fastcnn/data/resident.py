"""The resident loader: uint8 images stay on the device, a batch is gathered and augmented there.

On the CPU the store's memory map itself is read, without a copy.
"""

from collections.abc import Iterator

import numpy as np
import torch

from fastcnn.config import AugmentConfig
from fastcnn.data import augment as augmentation
from fastcnn.data.loaders import Batch, Loader
from fastcnn.data.normalize import Normalization, normalize
from fastcnn.data.store import Images


class ResidentLoader(Loader):
    """See loaders.make_loader."""

    def __init__(
        self,
        images: Images,
        augment: AugmentConfig | None,
        normalization: Normalization,
        *,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        shuffle: bool,
        drop_last: bool,
    ) -> None:
        super().__init__(
            len(images), batch_size=batch_size, seed=seed, shuffle=shuffle, drop_last=drop_last
        )
        self.device = device
        self.dtype = dtype
        self.augment = augment
        self.fill = normalization.fill
        self.pixels = torch.from_numpy(np.ascontiguousarray(images.pixels)).to(device)
        self.labels = torch.from_numpy(images.labels).to(device)
        self.scale, self.bias = normalization.scale_bias(self.pixels.shape[2], device)

    def deliver(self, epoch: int, batches: list[torch.Tensor]) -> Iterator[Batch]:
        draws: augmentation.Draws = {}
        if self.augment is not None:
            height, width = self.pixels.shape[1:3]
            drawn = augmentation.draw(self.augment, self.seed, epoch, self.samples, height, width)
            draws = {name: values.to(self.device) for name, values in drawn.items()}
        if not batches:
            return
        order = torch.cat(batches).to(self.device)
        for index in order.split([len(batch) for batch in batches]):
            own = {name: values.index_select(0, index) for name, values in draws.items()}
            yield self.inputs(index, own), self.labels.index_select(0, index)

    def inputs(self, index: torch.Tensor, draws: augmentation.Draws) -> torch.Tensor:
        """Return (n, 3, H, W), channels last: the images at `index`, augmented and normalised."""
        if self.augment is None:
            pixels = augmentation.crop_flip(self.pixels, index, None, None, "zero")
        else:
            pixels = augmentation.distort(self.augment, self.pixels, index, draws)
        x = normalize(pixels, self.scale, self.bias, self.dtype)
        if self.augment is not None and "cutout" in draws:
            x = augmentation.cut_out(x, draws["cutout"], self.augment.cutout, self.fill)
        return x.permute(0, 3, 1, 2)
