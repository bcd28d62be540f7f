"""The folder of a run: configuration, environment, metrics, summary and checkpoints."""

import contextlib
import csv
import io
import json
import os
import platform
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from fastcnn.cache import locked
from fastcnn.config import Config, PlaceConfig
from fastcnn.data.select import bad_table
from fastcnn.errors import CheckpointError, DiskError, UsageError
from fastcnn.files import check_regular, inside, load_json, replace_text
from fastcnn.options import read_yaml
from fastcnn.text import first_line
from fastcnn.version import __version__

COLUMNS = (
    "epoch",
    "train_loss",
    "train_top1",
    "val_loss",
    "val_top1",
    "val_top5",
    "lr",
    "images_per_s",
    "seconds",
    "skipped_steps",
)


BAD_IMAGES = "bad_images.csv"
# what a run's folder holds beside checkpoints, and folders in it whose files are others' as well
OWN_FILES = {
    "config.yaml",
    "environment.json",
    "metrics.csv",
    "confusion_matrix.csv",
    BAD_IMAGES,
    "summary.json",
    "checkpoints.json",
    "curves.png",
    "confusion_matrix.png",
    "index.html",
}
OWN_FOLDERS = ("analysis", "ood", "tensorboard", "wandb")  # with these names or such beginnings


class RunFolder:
    """Paths and files of one run; the files written here are replaced whole.

    writes: whether this process is the one that does; of the others nothing is written.
    """

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes

    @property
    def last(self) -> Path:
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        return self.path / "best.pt"

    @staticmethod
    def check_name(place: PlaceConfig) -> None:
        """Raise UsageError for a name that is no plain folder name, or that exists."""
        name = place.name
        if name is not None and (Path(name).name != name or name == ".." or not name.isprintable()):
            raise UsageError(f"--name: expected the name of a folder, got {name!r}; see --output")
        if place.name and (Path(place.output) / place.name).exists():
            path = Path(place.output) / place.name
            raise UsageError(
                f"run folder {path} exists; continue it with --resume {path}, "
                "or give another --name"
            )

    @classmethod
    def create(cls, place: PlaceConfig, arch: str) -> "RunFolder":
        """Make `<output>/<name>`, or the next free `<output>/<arch>-<n>`.

        Raises UsageError if the named folder exists or cannot be made.
        """
        cls.check_name(place)
        root = Path(place.output)
        try:
            root.mkdir(parents=True, exist_ok=True)
            if place.name:
                (root / place.name).mkdir()
                return cls(root / place.name)
            return cls._numbered(root, arch)
        except OSError as error:
            raise UsageError(
                f"--output: cannot make a run folder in {root}: {error.strerror}"
            ) from error

    @classmethod
    def _numbered(cls, root: Path, arch: str) -> "RunFolder":
        number = 1
        while True:
            path = root / f"{arch}-{number}"
            try:
                path.mkdir()
                return cls(path)
            except FileExistsError:
                number += 1

    @classmethod
    def open(cls, path: str | Path) -> "RunFolder":
        """An existing run; raises CheckpointError if `path` holds none."""
        folder = Path(path)
        if not (folder / "config.yaml").is_file():
            raise CheckpointError(f"{folder} is not a run folder: it has no config.yaml")
        return cls(folder)

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Hold the run against another process that would write it.

        Raises UsageError where another one has it. A folder that cannot be written needs no lock.
        """
        with contextlib.ExitStack() as held:
            if self.writes and os.access(self.path, os.W_OK):
                lock = self.path / ".lock"
                try:
                    held.enter_context(locked(lock, partial(_refuse, self.path)))
                except OSError as error:
                    why = error.strerror or error
                    raise DiskError(f"cannot write {lock}: {why}; remove it") from error
            yield

    @classmethod
    def finished(cls, path: str | Path) -> "RunFolder":
        """A run that has its result; raises CheckpointError if `path` holds none."""
        folder = cls.open(path)
        if folder.read_summary() is None:
            raise CheckpointError(
                f"{folder.path} is not finished; go on with fastcnn train --resume {folder.path}"
            )
        return folder

    def write_start(self, config: Config, command: list[str]) -> None:
        """Write config.yaml and environment.json."""
        self._write("config.yaml", config_text(config))
        self._write("environment.json", _json({"command": command, **environment()}))

    def write_resumption(self, config: Config, command: list[str]) -> None:
        """Rewrite config.yaml and add `command` to environment.json's `resumed_by`.

        An older summary goes: until the run ends again, it is not finished.
        """
        self._write("config.yaml", config_text(config))
        found = self._read_json("environment.json") or {"command": command, **environment()}
        found.setdefault("resumed_by", []).append(command)
        self._write("environment.json", _json(found))
        if self.writes:
            (self.path / "summary.json").unlink(missing_ok=True)

    def read_config(self) -> Config:
        """The configuration that config.yaml holds; raises CheckpointError if it is unreadable."""
        path = self.path / "config.yaml"
        try:
            options, _ = read_yaml(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
        if not isinstance(options, dict) or not all(isinstance(name, str) for name in options):
            raise CheckpointError(f"{path} holds no options")
        try:
            return Config.from_flat(options)
        except UsageError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def write_metrics(self, history: list[dict[str, Any]]) -> None:
        """Write metrics.csv: one row an epoch."""
        self._write("metrics.csv", metrics_text(history))

    def has_tables(self, history: list[dict[str, Any]]) -> bool:
        """Whether the tables of a finished run are there: metrics.csv as its epochs have it, and
        confusion_matrix.csv."""
        try:
            check_regular(self.path / "metrics.csv")
            own = (self.path / "metrics.csv").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return False
        return own == metrics_text(history) and (self.path / "confusion_matrix.csv").is_file()

    def write_confusion(self, counts: torch.Tensor, classes: tuple[str, ...]) -> None:
        """Write confusion_matrix.csv: rows true, columns predicted class."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))
        self._write("confusion_matrix.csv", text.getvalue())

    def write_bad_images(self, bad: Sequence[tuple[str, str]]) -> None:
        """Write bad_images.csv: path and reason of each file left out, if there are any."""
        if bad:
            self._write(BAD_IMAGES, bad_table(bad))

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write("summary.json", _json(summary))

    def read_summary(self) -> dict[str, Any] | None:
        """The summary of a finished run, or None."""
        return self._read_json("summary.json")

    def _read_json(self, name: str) -> dict[str, Any] | None:
        path = own_file(self.path, name)
        if not path.is_file():
            return None
        try:
            found = load_json(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({first_line(error)}); remove it"
            ) from error
        if not isinstance(found, dict) or not found:
            raise CheckpointError(f"{path} is not what this program wrote; remove it")
        return found

    def _write(self, name: str, text: str) -> None:
        if self.writes:
            replace_text(self.path / name, text)


def _refuse(path: Path) -> None:
    raise UsageError(f"{path} is in use: another process trains this run; wait for it, or stop it")


def own_file(folder: Path, name: str) -> Path:
    """A file of a run that its page shows; raises CheckpointError for a link, which may lead to any
    file of whoever writes the page."""
    try:
        return inside(folder, name)
    except ValueError as error:
        raise CheckpointError(
            f"{folder / name} is a link, which may lead out of the run; put the file in its place"
        ) from error


def check_no_file_of_a_run(path: Path) -> None:
    """Raise UsageError for an --output that would take the place of a file of a run."""
    path = path.resolve()
    own = path.name in OWN_FILES or path.suffix == ".pt"
    inner = path.exists() and path.parent.name.startswith(OWN_FOLDERS)
    for folder, taken in ((path.parent, own), (path.parent.parent, inner)):
        if taken and (folder / "config.yaml").is_file():
            raise UsageError(f"--output: {path} is a file of the run {folder}; give another")


def metrics_text(history: list[dict[str, Any]]) -> str:
    """The epochs as metrics.csv has them."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _short(row[key]) for key in COLUMNS} for row in history)
    return text.getvalue()


def config_text(config: Config) -> str:
    """The configuration as YAML, in the order of `--help`."""
    return yaml.safe_dump(config.flat(), sort_keys=False, allow_unicode=True)


def environment() -> dict[str, Any]:
    """Versions and machine, for environment.json and `versions` in summary.json."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": {
            "capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "gpus": gpus,
    }


def versions() -> dict[str, str | None]:
    return {
        "fastcnn": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version())
        if torch.backends.cudnn.is_available()
        else None,
    }


def _short(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
