"""Measurements on disk, those of convolution layers and of `--amp`: one JSON file for each machine,
library and torch.

A file is named after everything that its figures depend on beside the layer, so that a stale one is
never read. A file that is damaged, or that cannot be read or written, costs the measurements and
nothing else.
"""

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastcnn.cache import LeftBehind, locked
from fastcnn.files import load_json

log = logging.getLogger(__name__)

FORMAT = 1
WAIT_S = 5.0  # for a process that writes the same file, which takes it a moment

Entry = Mapping[str, Any]
_warned: set[Path] = set()


def file_of(folder: Path, key: Mapping[str, Any]) -> Path:
    """Return the file for measurements under `key`: plain values, by name."""
    text = json.dumps({"format": FORMAT, **key}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return folder / "plans" / f"{digest}.json"


def read(path: Path) -> dict[str, Entry]:
    """Return the entries of a file by layer; none of a file that is missing or damaged."""
    try:
        layers = load_json(path)["layers"]
        return {name: entry for name, entry in layers.items() if isinstance(entry, dict)}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        _warn_once(path, f"cannot be read ({error.strerror}); they are made again")
    except ValueError as error:
        _warn_once(path, f"is damaged ({error}); they are made again")
    except (KeyError, TypeError, AttributeError):
        _warn_once(path, "is damaged (no layers); they are made again")
    return {}


def add(path: Path, key: Mapping[str, Any], entries: Mapping[str, Entry]) -> bool:
    """Add entries to a file, whose others stay; False, with a warning, where that fails.

    Safe beside other processes: what is there is read again and the file replaced as a whole, both
    under a lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with locked(path.with_suffix(".lock"), _patience()):
            content = {**key, "format": FORMAT, "layers": {**read(path), **entries}}
            _replace(path, json.dumps(content, indent=1, sort_keys=True))
        return True
    except (OSError, LeftBehind) as error:
        why = getattr(error, "strerror", None) or error
        _warn_once(path, f"cannot be written ({why}); each run makes them anew")
        return False


def _warn_once(path: Path, what: str) -> None:
    """Warn of a file once a process: it is read and written several times in a run."""
    if path not in _warned:
        _warned.add(path)
        log.warning("measurements of this machine: %s %s", path, what)


def _patience() -> Callable[[], None]:
    end = time.monotonic() + WAIT_S

    def wait() -> None:
        if time.monotonic() > end:
            raise TimeoutError("another process holds its lock")

    return wait


def _replace(path: Path, text: str) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
