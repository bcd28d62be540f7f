"""Whether the disk has room for the checkpoints of a run, before it begins."""

import shutil
from pathlib import Path

from fastcnn.errors import DiskError
from fastcnn.train.setup import Setup


def check_space(folder: Path, setup: Setup) -> None:
    """Raise DiskError where the disk of `folder`, which need not be there yet, has no room for
    what the run is going to write; checkpoints that are in it already will make room."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    needed = bytes_of_checkpoints(setup) - sum(path.stat().st_size for path in folder.glob("*.pt"))
    free = shutil.disk_usage(there).free
    if free < needed:
        raise DiskError(
            f"{folder}: {needed:,} bytes needed for checkpoints, {free:,} free; free some, give "
            "an --output on another disk, or fewer --keep-checkpoints"
        )


def bytes_of_checkpoints(setup: Setup) -> int:
    """What last.pt, the older ones that are kept and best.pt come to, one of each half written."""
    config = setup.config
    weights = sum(tensor.nbytes for tensor in setup.model.state_dict().values())
    trained = sum(p.nbytes for p in setup.model.parameters() if p.requires_grad)
    models = 2 if config.optim.ema else 1
    moments = {"sgd": int(config.optim.momentum > 0)}.get(config.optim.optimizer, 2)
    state = models * weights + moments * trained
    return (config.run.keep_checkpoints + 1) * state + 2 * weights
