"""Cases of the augmentation op, and one way to run a case through any module that has it."""

import dataclasses
from dataclasses import dataclass

import torch

SAMPLES = 23
SEED = 2**40 + 12345  # both words of the key


@dataclass(frozen=True)
class Case:
    """A call of `augment` on images of height x width."""

    height: int = 8
    width: int = 8
    count: int = 9
    padding: int = 0
    reflect: bool = True
    flip: str = "none"
    cutout: int = 0
    bias_of_pixels: bool = False
    gathered: bool = False

    def __str__(self):
        words = [f"{self.count}x{self.height}x{self.width}", self.flip]
        words += [("reflect" if self.reflect else "zero") + str(self.padding)] * (self.padding > 0)
        words += [f"cutout{self.cutout}"] * (self.cutout > 0)
        words += ["mean-image"] * self.bias_of_pixels + ["gathered"] * self.gathered
        return "-".join(words)


# rows of a whole number of 16 bytes (8 values or 4) and others, one pixel, more rows than columns
SIDES = [(8, 8), (5, 4), (7, 5), (1, 3), (3, 1), (1, 1), (9, 16), (16, 24), (33, 31), (40, 32)]
EVERYTHING = {"flip": "random", "cutout": 5, "bias_of_pixels": True}


def kinds(height, width):
    """Every option on images of one size, each alone and all together."""
    plain = Case(height, width)
    change = dataclasses.replace
    least = min(height, width) - 1  # the widest padding that can be reflected
    yield plain
    yield change(plain, gathered=True)
    yield change(plain, bias_of_pixels=True)
    for flip in ("random", "alternating"):
        yield change(plain, flip=flip)
        yield change(plain, flip=flip, cutout=2, padding=3, reflect=False, gathered=True)
    for padding in {1, least} - {0} if least else set():
        yield change(plain, padding=padding)
        yield change(plain, padding=padding, **EVERYTHING)
        yield change(plain, padding=padding, **EVERYTHING, gathered=True)
    for padding in (1, 4, 2 * max(height, width)):
        yield change(plain, padding=padding, reflect=False)
        yield change(plain, padding=padding, reflect=False, **EVERYTHING)
    for cutout in (1, 2, 5, 3 * max(height, width)):
        yield change(plain, cutout=cutout)


CASES = [case for sides in SIDES for case in kinds(*sides)]
FULL = Case(16, 24, 9, padding=4, **EVERYTHING)


def tensors_of(case, device="cpu", samples=SAMPLES, length=None, epoch=3, position=5, seed=0):
    """The op's tensors by name; scale and bias as a normalisation has them, so that roundings show
    whether product and sum were rounded. Of a gathered case, images and labels are those of its
    batch and one more, fewer than there are sample numbers."""
    g = torch.Generator().manual_seed(seed)
    shape = (samples, case.height, case.width, 3)
    found = {
        "images": torch.randint(0, 256, shape, generator=g, dtype=torch.uint8),
        "labels": torch.randint(0, 1000, (samples,), generator=g),
        "order": torch.randperm(samples, generator=g)[: length or samples],
        "at": torch.tensor([epoch, position]),
        "scale": torch.rand(3, generator=g) / 64 + 0.003,
        "bias": -torch.rand(shape[1:] if case.bias_of_pixels else (3,), generator=g) * 2,
        "fill": torch.rand(3, generator=g),
    }
    if case.gathered:
        found = gather(found, case.count)
    return {name: t.to(device) for name, t in found.items()}


def gather(t, count):
    """Tensors by name whose images and labels are the next `count` of `t`, and a stray one."""
    places = (t["at"][1] + torch.arange(count)) % len(t["order"])
    chosen = t["order"][places]
    images = torch.cat([t["images"][chosen], 255 - t["images"][:1]])
    return t | {"images": images, "labels": torch.cat([t["labels"][chosen], t["labels"][:1] + 1])}


def call(module, case, t, dtype=torch.float32, seed=SEED, count=None):
    """`augment` of a module on tensors by name."""
    names = ("images", "labels", "order", "at")
    parameters = (t[name] for name in ("scale", "bias", "fill"))
    return module.augment(
        *(t[name] for name in names),
        count or case.count,
        *parameters,
        seed=seed,
        padding=case.padding,
        reflect=case.reflect,
        flip=case.flip,
        cutout=case.cutout,
        gathered=case.gathered,
        dtype=dtype,
    )
