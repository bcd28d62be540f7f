"""Checkpoints: plain tensors and Python values in one file, written whole or not at all.

The file is torch's zip archive. Its size and SHA-256 stand in checkpoints.json beside it and are
checked before anything is read; of a checkpoint that was taken out of its folder or given another
name, the CRC-32 sums of the archive's members.
"""

import hashlib
import io
import json
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from fastcnn.errors import CheckpointError, DiskError
from fastcnn.files import check_depth_of, discard, load_json, replace_text, replacing
from fastcnn.text import first_line
from fastcnn.train.checkpoints.migrations import FORMAT, migrate

SUMS = "checkpoints.json"
REMEMBERED = 16  # sums of a name, so that an older checkpoint may have it again
CHUNK = 1 << 20  # bytes read at a time
# what reading and sorting out a JSON file that somebody else wrote may raise
FORGED = (OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError)


def save(state: dict[str, Any], path: Path, keep: int = 1) -> None:
    """Write `state` to `path`, whole or not at all. The `keep` - 1 that were there before stay
    under older names: last-2.pt, last-3.pt.

    Raises DiskError if the disk refuses; a checkpoint that was there stays.
    """
    # into memory first: torch's own writer reports a full disk as an internal failure
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    content = buffer.getbuffer()
    with replacing(path, content):
        # before the file has its name: wherever the process ends, what has it is known
        aging = _aging(path, keep)
        _add_sum(path, content, keep, aging)
        _keep_former(path, aging)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; nothing in the file can execute (weights_only).

    Raises CheckpointError if it is missing, cut, altered, not one of ours or of a newer format; it
    names an older one that is whole, or says why none is.
    """
    try:
        return _load(path)
    except CheckpointError as error:
        why = ""
        for older in formers(path):
            try:
                step = _load(older).get("step")
            except CheckpointError as fault:
                why = why or f"; no older one can be read: {fault}"
                continue
            whole = f"{older}, of step {step}, is whole: give that"
            raise CheckpointError(f"{error}; {whole}") from error
        raise CheckpointError(f"{error}{why}") from error


def formers(path: Path) -> list[Path]:
    """The older checkpoints of `path` that are there, newest first."""
    number = re.compile(rf"{re.escape(path.stem)}-(\d+){re.escape(path.suffix)}")
    there = [path.with_name(name) for name in os.listdir(path.parent) if number.fullmatch(name)]
    return sorted(there, key=lambda older: int(older.stem.rpartition("-")[2]))


def _older(path: Path, number: int) -> Path:
    return path.with_name(f"{path.stem}-{number}{path.suffix}")


def _newest(name: str) -> str:
    """The name that a checkpoint had when it was written: last.pt of last-2.pt."""
    return re.sub(r"-\d+(?=\.pt$)", "", name)


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give a run folder or a .pt file")
    _check_whole(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler may raise anything on a forged file
        raise CheckpointError(f"{path}: not a checkpoint that is safe to load") from error
    try:
        check_depth_of(state)
    except ValueError as error:
        raise CheckpointError(f"{path}: not a checkpoint of fastcnn: {error}") from error
    if not isinstance(state, dict) or type(state.get("format")) is not int:
        raise CheckpointError(f"{path}: not a checkpoint of fastcnn")
    if state["format"] < 1:
        raise CheckpointError(f"{path}: not a checkpoint of fastcnn")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"{path}: format {state['format']} is newer than this fastcnn ({FORMAT}); upgrade it"
        )
    try:
        migrate(state)
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of format {state['format']}") from error
    return state


def _aging(path: Path, keep: int) -> list[int]:
    """The numbers of the checkpoints that are to get the next older name, the oldest first; 1 is
    `path` itself. Empty where none is kept."""
    if keep < 2 or not path.is_file():
        return []
    return [n for n in range(keep - 1, 1, -1) if _older(path, n).is_file()] + [1]


def _keep_former(path: Path, aging: list[int]) -> None:
    """Give the file at `path` an older name beside its own, and those before it the next ones."""
    if not aging:
        return
    for number in aging[:-1]:
        os.replace(_older(path, number), _older(path, number + 1))
    second = path.with_name(f".{path.name}.{os.getpid()}.former.part")
    try:
        try:
            os.link(path, second)
        except OSError:  # a file system without links
            shutil.copyfile(path, second)
        os.replace(second, _older(path, 2))
    except OSError as error:
        raise DiskError(
            f"cannot keep {_older(path, 2)}: {error.strerror or error}; "
            "--keep-checkpoints 1 keeps no older one"
        ) from error
    finally:
        discard(second)


def _add_sum(path: Path, content: memoryview, keep: int, aging: list[int]) -> None:
    """Note size and SHA-256 of what `path` is about to hold, beside those of what it held, and of
    what the older names are."""
    try:
        sums = _read_sums(path.parent)
    except CheckpointError:  # a training is not ended for it: from here on it is right again
        sums = {}
    own = sums.pop(path.name, [])[-max(keep, REMEMBERED) :]
    for number in aging:
        known = own[-1:] if number == 1 else sums.pop(_older(path, number).name, [])
        sums[_older(path, number + 1).name] = known
    own.append({"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
    text = json.dumps({**sums, path.name: own}, indent=1) + "\n"
    replace_text(path.parent / SUMS, text)


def _read_sums(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """{name: sums of what it held, the newest last}; {} where there is no such file."""
    path = folder / SUMS
    try:
        found = load_json(path)
        return {
            str(name): [{"bytes": int(one["bytes"]), "sha256": str(one["sha256"])} for one in own]
            for name, own in found.items()
        }
    except FileNotFoundError:
        return {}
    except FORGED as error:
        raise CheckpointError(f"{path} cannot be read ({first_line(error)}); remove it") from error


def has_sum(path: Path) -> bool:
    """Whether checkpoints.json, which may have been lost, tells what `path` is to hold."""
    return bool(_read_sums(path.parent).get(path.name))


def _check_whole(path: Path) -> None:
    """Raise CheckpointError for a file that is not the one that was written."""
    size = path.stat().st_size
    sums = _read_sums(path.parent)
    own = sums.get(path.name)
    if not own:  # one from elsewhere, or under a name that a user gave it
        _check_members(path)
        return
    # a process may have ended between noting the sums and giving the names
    related = [one for name in sums if _newest(name) == _newest(path.name) for one in sums[name]]
    if {"bytes": size, "sha256": _sha256(path)} in related:
        _refuse_compressed(path)
        return
    if size < own[-1]["bytes"]:
        raise CheckpointError(f"{path}: truncated: {size:,} of {own[-1]['bytes']:,} bytes")
    _check_members(path)
    raise CheckpointError(f"{path}: damaged: it is not what {SUMS} says was written")


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


def _check_members(path: Path) -> None:
    _refuse_compressed(path)
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


def _refuse_compressed(path: Path) -> None:
    """Raise CheckpointError for an archive with members that may grow without end when they are
    read; torch compresses none."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception:  # no archive: whoever reads it says so
        return
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{path}: its part {member.filename} is compressed; refused")


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


def _is_plain(value: Any) -> bool:
    dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return dense and value.device.type != "meta"


def copy_checked_(tensor: torch.Tensor, saved: Any) -> None:
    """Copy a saved tensor; raises ValueError for one of another shape, which would be spread."""
    if saved.shape != tensor.shape:
        raise ValueError(f"a tensor is {tuple(saved.shape)} instead of {tuple(tensor.shape)}")
    tensor.copy_(saved)


def load_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], where: Path) -> None:
    """Load a state dict into `model`, whole or not at all. Raises as check_weights."""
    check_weights(model, weights, where)
    model.load_state_dict(weights)


def check_weights(model: torch.nn.Module, weights: dict[str, torch.Tensor], where: Path) -> None:
    """Raise CheckpointError unless a state dict fits `model`, naming the first entries that are
    missing, unknown or of another shape."""
    own = model.state_dict()
    if not isinstance(weights, dict) or not all(map(_is_plain, weights.values())):
        raise CheckpointError(f"{where}: not a checkpoint of a network: it holds no weights")
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
