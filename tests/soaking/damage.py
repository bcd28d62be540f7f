"""What may have happened to a run's folder between two starts."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random


def _flip(path: Path, random: Random) -> None:
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def _cut(path: Path, random: Random) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def _empty(path: Path, random: Random) -> None:
    path.write_bytes(b"")


def _remove(path: Path, random: Random) -> None:
    path.unlink()


def _garbage(path: Path, random: Random) -> None:
    path.write_bytes(random.randbytes(100))


def _half_written(path: Path, random: Random) -> None:
    """Beside a file, what a process left that was killed while it wrote."""
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as gone:
        pass
    former = random.choice(("", ".former"))
    path.with_name(f".{path.name}.{gone.pid}{former}.part").write_bytes(random.randbytes(1000))


DAMAGES: dict[str, tuple[str, Callable[[Path, Random], None]]] = {
    "a bit of last.pt": ("last.pt", _flip),
    "last.pt cut": ("last.pt", _cut),
    "last.pt empty": ("last.pt", _empty),
    "last.pt removed": ("last.pt", _remove),
    "a bit of checkpoints.json": ("checkpoints.json", _flip),
    "checkpoints.json cut": ("checkpoints.json", _cut),
    "checkpoints.json removed": ("checkpoints.json", _remove),
    "metrics.csv garbage": ("metrics.csv", _garbage),
    "metrics.csv removed": ("metrics.csv", _remove),
    "environment.json cut": ("environment.json", _cut),
    "last.pt half written": ("last.pt", _half_written),
    "metrics.csv half written": ("metrics.csv", _half_written),
}


def damage(run: Path, kind: str, random: Random) -> bool:
    """Do it; False where there is no such file yet, or nobody would write it again."""
    name, change = DAMAGES[kind]
    path = run / name
    if not path.is_file() or not path.stat().st_size:
        return False
    if name in ("checkpoints.json", "environment.json") and (run / "summary.json").is_file():
        return False
    change(path, random)
    return True
