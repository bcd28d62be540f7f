"""Which loader and store suit images and device: what `auto` comes to, and why."""

from dataclasses import dataclass
from typing import Literal

import torch

from fastcnn.config import DataConfig


@dataclass(frozen=True)
class Choice:
    """loader and store as the options, but for auto; `why` says it in a line."""

    loader: Literal["resident", "dali", "torch"]
    store: Literal["packed", "files"]
    why: str


def choose(
    config: DataConfig,
    images: int,
    sides: tuple[int, int],
    folder: bool,
    device: torch.device,
) -> Choice:
    """Return what suits `images` uint8 RGB images of `sides` (height, width) on `device`.

    folder: whether they can be decoded from their files every epoch; an archive's are packed in any
    case. Raises UsageError for --store files of an archive and beside --loader resident.
    """
    loader = "resident" if config.loader == "auto" else config.loader
    packed = loader == "resident" or not folder
    store = config.store if config.store != "auto" else ("packed" if packed else "files")
    return Choice(loader, store, f"{loader} loader")
