"""Checkpoints: plain tensors and Python values in one file, written whole or not at all.

The file is torch's zip archive; its members carry CRC-32 sums, which are checked before anything
is read.
"""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastcnn.errors import CheckpointError
from fastcnn.files import replace_bytes

FORMAT = 2


def save(state: dict[str, Any], path: Path) -> None:
    """Write `state` to `path`, whole or not at all.

    Raises CheckpointError if the disk refuses; a checkpoint that was there stays.
    """
    # into memory first: torch's own writer reports a full disk as an internal failure
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    replace_bytes(path, buffer.getbuffer())


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file can execute (weights_only).

    Raises CheckpointError if it is missing, cut, altered, not one of ours or of a newer format.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give a run folder or a .pt file")
    _check_sums(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler may raise anything on a forged file
        raise CheckpointError(f"{path}: not a checkpoint that is safe to load") from error
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise CheckpointError(f"{path}: not a checkpoint of fastcnn")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: format {state['format']} is newer than this fastcnn ({FORMAT}); upgrade it"
        )
    return state


def _check_sums(path: Path) -> None:
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a cut or altered directory raises anything
        raise CheckpointError(
            f"{path}: not a checkpoint, or cut or damaged ({size:,} bytes)"
        ) from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged: its part {damaged} does not match its checksum")


def locate(target: str | Path, name: str = "last.pt") -> Path:
    """The checkpoint file meant by a run folder or by a path to the file itself."""
    path = Path(target)
    if path.is_dir():
        path = path / name
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give a run folder or a .pt file")
    return path


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of torch's generators that a step on `device` draws from (dropout)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], where: Path) -> None:
    """Load a state dict into `model`, whole or not at all.

    Raises CheckpointError naming the first entries that are missing, unknown or of another shape.
    """
    own = model.state_dict()
    faults = [f"{key} is missing" for key in own if key not in weights]
    faults += [f"{key} is unknown" for key in weights if key not in own]
    faults += [
        f"{key} is {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{where} does not fit the network: {'; '.join(faults[:3])}{more}")
    model.load_state_dict(weights)
