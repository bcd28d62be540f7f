"""The loaders on small images: one way to make each, and to compare what they give."""

import hashlib
import os

import numpy as np
import torch
from image_files import encoded, make_images, noise, write

from fastcnn.config import AugmentConfig, DataConfig
from fastcnn.data import Normalization, make_loader
from fastcnn.data.images import Files, Images
from fastcnn.data.loaders.base import LoaderOptions
from fastcnn.data.loaders.on_device import DeviceLoader

FUSED = AugmentConfig(cutout=3, flip="alternating")  # all of it by the kernel
EVERYTHING = AugmentConfig(rotation=10, shift=0.1, cutout=3, color_jitter=0.3)
UNIT = Normalization("unit", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
# kinds of loaders: --loader and the backend that makes batches on the device
KINDS = {"fused": ("resident", "fused"), "resident": ("resident", "torch"), "torch": ("torch",) * 2}
LOADERS = [*KINDS]  # of packed images
FILE_LOADERS = ["torch"]  # of images in files
WORKERS = {"torch": (0, 2)}  # how many each kind is tested with; others have none
# kind, workers, where the images are
CASES = [(kind, n, "packed") for kind in LOADERS for n in WORKERS.get(kind, (0,))]
CASES += [(kind, n, "files") for kind in FILE_LOADERS for n in WORKERS.get(kind, (0,))]


def loader_of(
    images,
    kind="resident",
    augment=None,
    *,
    workers=0,
    normalization=UNIT,
    batch=4,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    shuffle=True,
    drop_last=False,
    epoch_images=None,
    rank=0,
    world=1,
):
    name, backend = KINDS[kind]
    return make_loader(
        images,
        DataConfig(loader=name, workers=workers),
        augment,
        normalization,
        batch_size=batch,
        device=torch.device(device),
        dtype=dtype,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        epoch_images=epoch_images,
        backend=backend,
        rank=rank,
        world=world,
    )


class Staged(DeviceLoader):
    """A loader as one that decodes files is: it stages the images of a batch, from an array, in
    buffers of one batch on the device."""

    def __init__(self, images, augment=None, *, batch=4, backend="fused", device="cpu", **options):
        options = {"seed": 0, "shuffle": True, "drop_last": False, "backend": backend} | options
        normalization = options.pop("normalization", UNIT)
        super().__init__(
            torch.zeros(batch, *images.pixels.shape[1:], dtype=torch.uint8, device=device),
            torch.zeros(batch, dtype=torch.int64, device=device),
            augment,
            normalization,
            LoaderOptions(batch, device, **options),
            gathered=True,
            samples=len(images),
        )
        self.images = images

    def stage(self, count):
        chosen = self.epoch_samples()[self.position : self.position + count].numpy()
        self.pixels[:count] = torch.from_numpy(self.images.pixels_of(chosen))
        self.labels[:count] = torch.from_numpy(self.images.labels[chosen])


def placed(images, place, root):
    """The images where a case wants them."""
    return files_of(images, root) if place == "files" else images


def files_of(images, root, resize="stretch"):
    """The same images as PNG files of their own size, as a scan lists them."""
    return listed([*images.pixels], images.labels, images.sides, root, resize)


def odd_files(root, count, resize="stretch", sides=(8, 10)):
    """PNG files of many sizes, whose labels are their own numbers."""
    sizes = np.random.default_rng(3).integers(6, 24, (count, 2))
    pixels = [noise((*size, 3), seed=number) for number, size in enumerate(sizes)]
    return listed(pixels, np.arange(count), sides, root, resize)


def listed(pixels, labels, sides, root, resize):
    count = len(pixels)
    paths = [f"{number:04}.png" for number in range(count)]
    written = [write(root / path, encoded(p)) for path, p in zip(paths, pixels, strict=True)]
    return Files(
        root=root,
        paths=np.array(paths),
        labels=np.asarray(labels, dtype=np.int64),
        stamps=np.array([stamp_of(path) for path in written]),
        hashes=hashes_of([path.read_bytes() for path in written]),
        shapes=np.array([p.shape[:2] for p in pixels], dtype=np.int32),
        sums=np.zeros((count, 6)),  # for a normalisation; the tests have their own
        plain=np.ones(count, dtype=bool),
        sides=sides,
        resize=resize,
    )


def stamp_of(path):
    """The stamp of a file as a listing has it."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def hashes_of(contents):
    """The hashes of files as a scan has them."""
    found = [hashlib.sha256(data).digest() for data in contents]
    return np.array([np.frombuffer(digest, np.uint8) for digest in found])


def worker_pids(loader):
    """Processes that load for a torch loader in the middle of an epoch."""
    return [worker.pid for worker in loader.loader._iterator._workers]


def resident_bytes(pid="self"):
    """Memory that a process holds."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def numbered(count):
    """Images whose label is their own number."""
    return Images(make_images(count).pixels, np.arange(count, dtype=np.int64))


def epoch_labels(loader):
    return [label for _, y in loader for label in y.tolist()]


def by_label(loader):
    """Return {label: x} of one epoch."""
    return {int(label): image for x, y in loader for image, label in zip(x, y, strict=True)}


def assert_same_batches(first, second):
    assert len(first) == len(second)
    for (x, y), (other_x, other_y) in zip(first, second, strict=True):
        assert torch.equal(y, other_y)
        assert torch.equal(x, other_x)
