"""The resident loader: uint8 images stay on the device, a batch is gathered and augmented there.

On the CPU they are in memory, never in the store's memory map: a file that is cut while it is
mapped would kill the process.
"""

from fastcnn.config import AugmentConfig
from fastcnn.data.images import Images
from fastcnn.data.loaders.base import LoaderOptions
from fastcnn.data.loaders.on_device import DeviceLoader
from fastcnn.data.loaders.upload import resident
from fastcnn.data.normalize import Normalization


class ResidentLoader(DeviceLoader):
    """See loaders.make_loader."""

    def __init__(
        self,
        images: Images,
        augment: AugmentConfig | None,
        normalization: Normalization,
        options: LoaderOptions,
    ) -> None:
        super().__init__(
            resident(images.pixels, options.device),
            resident(images.labels, options.device),
            augment,
            normalization,
            options,
            gathered=False,
            samples=len(images),
        )
