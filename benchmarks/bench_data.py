"""Images/s of the loaders, ours and torchvision's DataLoader, in turn in one run.

    python benchmarks/bench_data.py [--json FILE] [--only cifar tiny photos] [--device cpu|cuda]

Image folders (root/<class>/…) by environment variables; what is missing is made of smooth noise,
photos from the Tiny ImageNet folder where that is given:
    FASTCNN_BENCH_CIFAR    JPEGs of 32x32
    FASTCNN_BENCH_TINY     Tiny ImageNet's train folder, JPEGs of 64x64
    FASTCNN_BENCH_PHOTOS   JPEGs of about 500x375

The rival is what the documentation of torchvision.transforms.v2 recommends: uint8 tensors,
antialiased resizing, normalisation last; "folder" decodes files by ImageFolder, "memory" has
decoded images in an array, as torchvision's CIFAR10. "torch" is fastcnn's loader of that name. All
crop and mirror at random (photos: a random resized crop) and deliver normalised fp32 batches on the
device. Before anything is timed, all must deliver the same labels and pixels.

A turn takes about a second (--seconds): whole epochs of as many images as the loader manages in
it, so that nothing that workers have prefetched is left for the next turn. Ratios are of medians,
with the extremes of single rounds.
"""

import argparse
import copy
import hashlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from fastcnn.bench.environment import environment
from fastcnn.bench.timing import ratios, spread
from fastcnn.config import AugmentConfig, DataConfig
from fastcnn.data import Images, Normalization, make_loader
from fastcnn.data.choose import has_dali
from fastcnn.data.decode import decode
from fastcnn.data.examine import cores
from fastcnn.data.images import Files
from fastcnn.data.sources.base import Stamp
from fastcnn.errors import UsageError
from fastcnn.ops import load
from fastcnn.train.host import share_the_cores, tune_process

MEAN, STD = (0.49, 0.47, 0.43), (0.24, 0.24, 0.26)
NORMAL = Normalization("zscore", MEAN, STD)
WARM_UP = 1  # rounds
ALONE = ("folder 0", "memory 0")  # torchvision's transforms in the main process
CHECKED = 128  # images
TOLERANCE = 1.0  # mean difference to torchvision's pixels, of 255 levels
CROP = AugmentConfig(crop_padding=4)
RESIZED = AugmentConfig(crop_padding=0, resized_crop=0.25)
# (loader, rival, times as fast on two cores)
TARGETS = {
    "cifar": [("resident", "memory 0", 20), ("dali store", "memory 0", 10)],
    "tiny": [("dali files", "folder 2", 1.2)],
    "photos": [("dali files", "folder 2", 1.2)],
}
Make = Callable[[int, bool], Iterable[Any]]  # of so many images, in order or augmented


@dataclass(frozen=True)
class Set:
    """A kind of images: the side they are brought to, height and width in their files, how many
    there are, and how they are augmented."""

    name: str
    side: int
    shape: tuple[int, int]
    count: int
    batch: int
    augment: AugmentConfig


SETS = (
    Set("cifar", 32, (32, 32), 20_000, 128, CROP),
    Set("tiny", 64, (64, 64), 6_000, 128, CROP),
    Set("photos", 224, (375, 500), 1_000, 64, RESIZED),
)


class Arrays(Dataset):
    """Images in memory, one by one, as torchvision's CIFAR10 gives them."""

    def __init__(self, images: Images, transform: Callable[[Any], Any]):
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Any:
        picture = Image.fromarray(self.images.pixels[i])
        return self.transform(picture), int(self.images.labels[i])


def transform_of(data: Set, augmented: bool) -> Any:
    from torchvision.transforms import v2

    steps = [v2.ToImage()]
    if not augmented:
        steps.append(v2.Resize((data.side, data.side), antialias=True))
    elif data.augment.resized_crop < 1:
        scale = (data.augment.resized_crop, 1.0)
        steps += [v2.RandomResizedCrop(data.side, scale=scale, antialias=True)]
        steps += [v2.RandomHorizontalFlip()]
    else:
        padding = data.augment.crop_padding
        steps += [v2.RandomCrop(data.side, padding=padding, padding_mode="reflect")]
        steps += [v2.RandomHorizontalFlip()]
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


def batches_of(dataset: Dataset, data: Set, workers: int, shuffle: bool, device: torch.device):
    """DataLoader as one writes it for training."""
    on_gpu = device.type == "cuda"
    loader = DataLoader(
        dataset,
        data.batch,
        shuffle=shuffle,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=on_gpu,
    )
    return OnDevice(loader, device) if on_gpu else loader


@dataclass
class OnDevice:
    loader: Iterable[Any]
    device: torch.device

    def __iter__(self):
        for x, y in self.loader:
            yield x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)


def stamp_of(path: Path) -> Stamp:
    """What a scan notes of a file: bytes, mtime and ctime."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def listed(root: Path, chosen: list[tuple[str, int]], side: int) -> Files:
    """The files of an ImageFolder's samples as fastcnn's scan lists them."""
    data = [Path(path).read_bytes() for path, _ in chosen]
    found = [decode(part) for part in data]
    return Files(
        root=root,
        paths=np.array([os.path.relpath(path, root) for path, _ in chosen]),
        labels=np.array([label for _, label in chosen]),
        stamps=np.array([stamp_of(Path(path)) for path, _ in chosen]),
        hashes=np.array([np.frombuffer(hashlib.sha256(part).digest(), np.uint8) for part in data]),
        shapes=np.array([image.pixels.shape[:2] for image in found], np.int32),
        sums=np.zeros((len(chosen), 6)),
        plain=np.array([image.plain for image in found]),
        sides=(side, side),
        resize="stretch",
    )


def makers_of(data: Set, root: Path, scratch: Path, device: torch.device) -> dict[str, Make]:
    """Return how each loader is made on the images below `root`, by name."""
    from torchvision.datasets import ImageFolder

    listing = ImageFolder(root)
    samples = listing.samples
    step = max(1, len(samples) // data.count)
    indices = [*range(0, len(samples), step)][: data.count]
    files = listed(root, [samples[i] for i in indices], data.side)
    np.save(scratch / f"{data.name}.npy", files.pixels_of(range(len(files))))
    stored = Images(np.load(scratch / f"{data.name}.npy", mmap_mode="c"), files.labels)
    memory = Images(np.array(stored.pixels), files.labels)

    def folder(workers: int, count: int, augmented: bool) -> Iterable[Any]:
        whole = copy.copy(listing)
        whole.transform = transform_of(data, augmented)
        return batches_of(Subset(whole, indices[:count]), data, workers, augmented, device)

    def arrays(workers: int, count: int, augmented: bool) -> Iterable[Any]:
        part = Images(memory.pixels[:count], memory.labels[:count])
        dataset = Arrays(part, transform_of(data, augmented))
        return batches_of(dataset, data, workers, augmented, device)

    def ours(images: Any, name: str, workers: int, count: int, augmented: bool) -> Iterable[Any]:
        if isinstance(images, Images):
            part = Images(images.pixels[:count], images.labels[:count])
        else:
            part = images.take(np.arange(count))
        return make_loader(
            part,
            DataConfig(loader=name, workers=workers),
            data.augment if augmented else None,
            NORMAL,
            batch_size=data.batch,
            device=device,
            seed=0,
            shuffle=augmented,
            drop_last=False,
        )

    found: dict[str, Make] = {
        f"folder {n}": lambda c, a, n=n: folder(n, c, a)  # type: ignore[misc]
        for n in (0, 1, 2)
    }
    if data.name == "cifar":
        found["memory 0"] = lambda c, a: arrays(0, c, a)
        found["memory 2"] = lambda c, a: arrays(2, c, a)
    found["torch 2"] = lambda c, a: ours(files, "torch", 2, c, a)
    found["resident"] = lambda c, a: ours(memory, "resident", 0, c, a)
    if has_dali():
        found["dali store"] = lambda c, a: ours(stored, "dali", 0, c, a)
        found["dali files"] = lambda c, a: ours(files, "dali", 0, c, a)
    return found


def check(name: str, makers: dict[str, Make], data: Set) -> dict[str, float]:
    """Return the mean difference of each loader's pixels to folder 0, in levels of 255; raises
    UsageError for other labels and for too large a difference."""
    results = {}
    for maker, make in makers.items():
        pairs = [*make(min(CHECKED, data.count), False)]
        results[maker] = [torch.cat([pair[i].cpu() for pair in pairs]) for i in (0, 1)]
    x, y = results["folder 0"]
    std = torch.tensor(STD).view(1, 3, 1, 1)
    differences = {}
    for maker, (other_x, other_y) in results.items():
        difference = float(((other_x - x) * std * 255).abs().mean())
        if not torch.equal(other_y, y) or difference > TOLERANCE:
            raise UsageError(f"{name}: {maker} differs from folder 0 by {difference:.2f} levels")
        differences[maker] = round(difference, 3)
    return differences


class Turn:
    """A loader and how many epochs of it make a turn."""

    def __init__(self, make: Make, data: Set, device: torch.device, threads: int, turn_s: float):
        self.device, self.threads = device, threads
        self.count, self.epochs = min(2 * data.batch, data.count), 1
        self.loader = make(self.count, True)
        self.seconds()  # workers start, kernels are chosen
        rate = self.count / self.seconds()
        wanted = max(self.count, round(rate * turn_s / data.batch) * data.batch)
        self.count = min(wanted, data.count)
        self.epochs = max(1, round(wanted / self.count))
        self.loader = make(self.count, True)

    def seconds(self) -> float:
        """Seconds an image, times `count`."""
        torch.set_num_threads(self.threads)
        self._wait()
        start = time.perf_counter()
        images = sum(len(y) for _ in range(self.epochs) for _, y in self.loader)
        self._wait()
        spent = time.perf_counter() - start
        if images != self.count * self.epochs:
            raise UsageError(f"{images} images delivered, {self.count * self.epochs} expected")
        return spent / self.epochs

    def per_image(self) -> float:
        return self.seconds() / self.count

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(
    data: Set, root: Path, scratch: Path, device: torch.device, rounds: int, turn_s: float
) -> Any:
    makers = makers_of(data, root, scratch, device)
    differences = check(data.name, makers, data)
    # one image is too small to be shared by threads: they would only wait for each other
    turns = {
        name: Turn(make, data, device, 1 if name in ALONE else cores(), turn_s)
        for name, make in makers.items()
    }
    found: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(WARM_UP + rounds):
        for name, turn in turns.items():
            found[name].append(turn.per_image())
    kept = {name: seconds[WARM_UP:] for name, seconds in found.items()}
    rivals = [name for name in kept if name.startswith(("folder", "memory"))]
    rows = {
        name: {
            "images_per_s": spread([1 / s for s in seconds]),
            "difference_levels": differences[name],
            "images_a_turn": turns[name].count * turns[name].epochs,
            "times_as_fast_as": {r: ratios(kept[r], seconds) for r in rivals if r != name},
        }
        for name, seconds in kept.items()
    }
    return {"batch": data.batch, "side": data.side, "n": rounds, "loaders": rows}


def folder_of(data: Set, scratch: Path) -> tuple[Path, str]:
    """Return a folder of images, the one that is given or one made here, and where it is from."""
    if given := os.environ.get(f"FASTCNN_BENCH_{data.name.upper()}"):
        return Path(given), "given"
    root, tiny = scratch / data.name, os.environ.get("FASTCNN_BENCH_TINY")
    sources = []
    if data.name == "photos" and tiny:
        sources = sorted(Path(tiny).rglob("*.JPEG"))[:: max(1, 100_000 // data.count)]
    rng = np.random.default_rng(0)
    height, width = data.shape
    for i in range(min(data.count, 2_000)):
        if sources:
            small = Image.open(sources[i % len(sources)]).convert("RGB")
        else:
            small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        path = root / f"class{i % 10}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((width, height), Image.BICUBIC).save(path, quality=90)
    return root, "enlarged from Tiny ImageNet" if sources else "smooth noise"


def judged(results: dict[str, Any]) -> list[str]:
    """A line on each target."""
    lines = []
    wanted = [(name, *target) for name in results for target in TARGETS[name]]
    for name, loader, rival, least in wanted:
        row = results[name]["loaders"].get(loader)
        if row is not None:
            times = row["times_as_fast_as"][rival]
            verdict = "met" if times["median"] >= least else "MISSED"
            lines.append(f"{name}: {loader} {times['median']:.1f}x {rival}, {least}x: {verdict}")
    return lines


def show(name: str, result: Any) -> None:
    print(f"\n{name}: {result['images']}, {result['n']} rounds, batch {result['batch']}")
    for loader, row in result["loaders"].items():
        rate = row["images_per_s"]
        text = f"{rate['median']:>10,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f}) images/s"
        times = ", ".join(
            f"{t['median']:.2f}x {rival} ({t['min']:.2f} to {t['max']:.2f})"
            for rival, t in row["times_as_fast_as"].items()
            if rival in ("folder 0", "folder 2", "memory 0")
        )
        print(f"  {loader:<12}{text}  {times}", flush=True)


def options_of(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in SETS], default=[])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="of a turn, about")
    parser.add_argument("--images", type=int, help="at most so many of each set")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = options_of(words)
    device = torch.device(options.device)
    if has_dali():
        from nvidia.dali import fn  # noqa: F401 - before torchvision (NVIDIA/DALI#2872)
    tune_process()
    load()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for data in SETS:
            if options.only and data.name not in options.only:
                continue
            count = min(data.count, options.images or data.count)
            data = replace(data, count=count)
            root, source = folder_of(data, Path(scratch))
            count = min(count, len([*itertools.islice(root.rglob("*.*"), count)]))
            data = replace(data, count=count)
            results[data.name] = measure(
                data, root, Path(scratch), device, options.rounds, options.seconds
            )
            results[data.name]["images"] = source
            show(data.name, results[data.name])
    lines = judged(results)
    print("\n" + "\n".join(lines))
    if options.json:
        content = {
            "command": "python benchmarks/bench_data.py",
            "environment": environment(device),
            "results": results,
            "targets": lines,
        }
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    before = dict(os.environ)
    share_the_cores()
    if os.environ != before:  # torch, which is imported already, read it as the process began
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    sys.exit(main())
