"""Loaders whose batches are made on the device, from uint8 images that lie there.

One kernel does it all (fastcnn.ops.augment), but for the rarer augmentations and without the native
library, where tensor operations give the same bits.

What changes from epoch to epoch lies in buffers whose addresses never change, and the place in the
epoch is on the device, so that `batch` can be captured in a CUDA graph and replayed.
"""

import torch

from fastcnn import ops
from fastcnn.config import AugmentConfig
from fastcnn.data import augment as augmentation
from fastcnn.data.loaders.base import Batch, Loader, LoaderOptions
from fastcnn.data.loaders.upload import upload
from fastcnn.data.normalize import Normalization
from fastcnn.ops.backend import ops_for
from fastcnn.ops.reference import augmentation as reference_augment

OFF = AugmentConfig(crop_padding=0, flip="none")


class DeviceLoader(Loader):
    """See loaders.make_loader. `at`: int64 (2,) on the device, epoch and position.

    pixels: uint8 (M, H, W, 3) and labels: int64 (M,) on the device: of all samples, or with
    `gathered` those of the batch that `stage` brought, in its order.
    """

    def __init__(
        self,
        pixels: torch.Tensor,
        labels: torch.Tensor,
        augment: AugmentConfig | None,
        normalization: Normalization,
        options: LoaderOptions,
        *,
        gathered: bool,
        samples: int,
    ) -> None:
        super().__init__(samples, options)
        self.pixels, self.labels, self.gathered = pixels, labels, gathered
        self.device = device = pixels.device
        self.augment = augment or OFF
        self.scale, self.bias = normalization.scale_bias(device)
        self.fill = torch.tensor(normalization.fill, dtype=torch.float32, device=device)
        self.order = torch.zeros(self.samples, dtype=torch.int64, device=device)
        self.at = torch.zeros(2, dtype=torch.int64, device=device)
        self.cursor = self.at[1:]  # the position alone
        chosen = ops_for(options.backend, torch.empty(0, dtype=self.dtype, device=device))
        self.fused = chosen is ops and augmentation.is_one_kernel(self.augment)
        self.draws = {} if self.fused else self._draw()

    def begin(self) -> list[int]:
        upload(self.order, self.epoch_samples())
        upload(self.at, torch.tensor([self.epoch, self.position]))
        if not self.fused:
            for name, values in self._draw().items():
                self.draws[name].copy_(values)
        return self.remaining()

    def _draw(self) -> augmentation.Draws:
        """The epoch's choices, on the device."""
        height, width = self.pixels.shape[1:3]
        shape = (self.total, height, width, self.device)
        drawn = augmentation.draw(self.augment, self.seed, self.epoch, *shape)
        return {name: v.to(self.device, non_blocking=True) for name, v in drawn.items()}

    def batch(self, count: int) -> Batch:
        """Return the next `count` images and labels, and move the position on the device.

        Work of the device alone. More than is left of the epoch starts it again.
        """
        made = self._one_kernel(count) if self.fused else self._tensor_operations(count)
        self.cursor.add_(count)
        return made

    def _one_kernel(self, count: int) -> Batch:
        config = self.augment
        return ops.augment(
            self.pixels,
            self.labels,
            self.order,
            self.at,
            count,
            self.scale,
            self.bias,
            self.fill,
            seed=self.seed,
            padding=config.crop_padding,
            reflect=config.crop_mode == "reflect",
            flip=config.flip,
            cutout=config.cutout,
            gathered=self.gathered,
            dtype=self.dtype,
        )

    def _tensor_operations(self, count: int) -> Batch:
        samples = reference_augment.next_samples(self.order, self.at, count)
        places = torch.arange(count, device=self.device) if self.gathered else samples
        draws = {name: values.index_select(0, samples) for name, values in self.draws.items()}
        pixels = augmentation.distort(self.augment, self.pixels, places, draws)
        x = reference_augment.normalize(pixels, self.scale, self.bias)
        if "cutout" in draws:
            x = reference_augment.cut_out(x, draws["cutout"], self.augment.cutout, self.fill)
        return x.to(self.dtype).permute(0, 3, 1, 2), self.labels.index_select(0, places)
