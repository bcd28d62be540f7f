"""Image files for the tests of the DALI loader, and one way to make each loader on them."""

import io
from pathlib import Path

import numpy as np
import torch
from image_files import noise, write
from loader_cases import UNIT, hashes_of, stamp_of
from PIL import Image

from fastcnn.config import DataConfig
from fastcnn.data import make_loader
from fastcnn.data.decode import decode
from fastcnn.data.images import Files, Images


def encode(pixels, form="PNG", mode="RGB", **options):
    """Return uint8 (H, W, 3) as a file."""
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if mode == "RGB" else image.convert(mode)).save(file, form, **options)
    return file.getvalue()


def scanned(root: Path, names, sides=None, resize="stretch", labels=None) -> Files:
    """What a scan of the files `names` in `root` finds; sides: else those of the first."""
    data = [(root / name).read_bytes() for name in names]
    found = [decode(part) for part in data]
    shapes = np.array([image.pixels.shape[:2] for image in found], np.int32)
    count = len(names)
    return Files(
        root=root,
        paths=np.array(names),
        labels=np.arange(count) if labels is None else np.asarray(labels),
        stamps=np.array([stamp_of(root / name) for name in names]),
        hashes=hashes_of(data),
        shapes=shapes,
        sums=np.zeros((count, 6)),
        plain=np.array([image.plain for image in found]),
        sides=sides or tuple(map(int, shapes[0])),
        resize=resize,
    )


def smooth(height, width, seed=0):
    """A smooth image: a JPEG of noise says little."""
    small = Image.fromarray(noise((5, 7, 3), seed))
    return np.asarray(small.resize((width, height), Image.BILINEAR))


def write_files(root, count, height=12, width=10, form="JPEG"):
    """Write so many images of one size, as JPEG and PNG in turn or in one format."""
    names = []
    for i in range(count):
        kind = form if form != "both" else ("JPEG", "PNG")[i % 2]
        names.append(f"c{i % 3}/image {i}.{'jpg' if kind == 'JPEG' else 'png'}")
        write(root / names[-1], encode(smooth(height, width, i), kind))
    return names


def write_sizes(root, count, form="both"):
    """The same of different sizes."""
    rng = np.random.default_rng(0)
    names = []
    for i in range(count):
        (name,) = write_files(root / str(i), 1, *map(int, rng.integers(9, 40, 2)), form)
        names.append(f"{i}/{name}")
    return names


def packed(files) -> Images:
    """The pixels of files, as a store would have them."""
    return Images(files.pixels_of(range(len(files))), files.labels)


def stored(path, images) -> Images:
    """The images in a file that is mapped into memory, as those of the store."""
    np.save(path, images.pixels)
    return Images(np.load(path, mmap_mode="c"), images.labels)


def made(
    images,
    loader="dali",
    augment=None,
    *,
    batch=4,
    device="cpu",
    dtype=torch.float32,
    seed=0,
    shuffle=True,
    drop_last=False,
    backend="auto",
    normalization=UNIT,
    **place,
):
    return make_loader(
        images,
        DataConfig(loader=loader, workers=0),
        augment,
        normalization,
        batch_size=batch,
        device=torch.device(device),
        dtype=dtype,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        backend=backend,
        **place,
    )
