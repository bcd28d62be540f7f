"""torch.export: a program (.pt2) that torch alone loads and runs."""

import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastcnn.export.network import Exported, traced

METADATA = "metadata.json"


def encode(network: Exported, metadata: dict[str, str]) -> bytes:
    """Return a .pt2 archive with `metadata` as its extra file metadata.json."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        extra = {METADATA: json.dumps(metadata, ensure_ascii=False)}
        torch.export.save(traced(network), buffer, extra_files=extra)
    return buffer.getvalue()


def reader(path: Path) -> Callable[[Tensor], Tensor]:
    """Return the program of a file as a function of images."""
    # a buffer: of a path torch wants the ending .pt2, which an unfinished file has not
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.load(io.BytesIO(path.read_bytes())).module()
