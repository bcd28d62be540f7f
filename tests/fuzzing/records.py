"""Configurations, checkpoints and the records of runs, damaged and forged, and their readers."""

import copy
import io
import json
import pickle
import shutil
import tempfile
import zipfile
import zlib
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import small_runs
import torch
import yaml
from run_folders import make_run

from fastcnn.config import PlaceConfig, options_by_name
from fastcnn.errors import UsageError
from fastcnn.insight.run_page.compare import compare
from fastcnn.insight.run_page.page import write_page
from fastcnn.options import options_of, read_config_file, read_lists
from fastcnn.study.pages import write_pages
from fastcnn.train import loop, run
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.checkpoints.load_run import open_trained
from fastcnn.train.rundir import RunFolder
from fuzzing.guard import Read
from fuzzing.mutations import (
    change_bytes,
    change_pickle,
    change_tree,
    deflated_zeros,
    nested,
    odd_value,
)

CPU = torch.device("cpu")
SMALL = {"train_subset": 16, "test_subset": 10, "batch_size": 8, "backend": "torch", "ema": 0.9}

# YAML that a reader of plain mappings may stumble over
ODD_YAML = (
    "lr: 2020-99-99\n",
    "lr: 2020-01-01\n",
    "lr: 0b\n",
    "lr: !!int x\n",
    "lr: !!float x\n",
    "lr: !!binary x\n",
    "lr: !!timestamp x\n",
    "epochs: 1:30:99\n",
    "lr: .nan\n",
    "epochs: " + "9" * 5000 + "\n",
    "lr: !!python/object/apply:os.system ['touch executed']\n",
    "lr: !!python/name:os.system\n",
    "? [1, 2]\n: 3\n",
    "? {a: 1}\n: 3\n",
    "? !!set {a}\n: 3\n",
    "null: 3\n",
    "1: 3\n",
    "true: 3\n",
    "&a lr: *a\n",
    "a: &a [*a]\nmilestones: *a\n",
    "milestones: &a [*a]\n",
    "milestones: &a {x: *a}\n",
    "<<: {lr: 1}\n",
    "<<: 3\n",
    "<<: [1]\n",
    "lr: 1\nlr: 2\n",
    "---\nlr: 1\n---\nlr: 2\n",
    "lr: |\n  a\n  b\n",
    'data: "a\\nb"\n',
    'data: "\\0"\n',
    'data: "\\ud800"\n',
    'arch: "a\\e[2J"\n',
    '"a\\nb": 1\n',
    "%YAML 9.9\n---\nlr: 1\n",
    "%TAG ! x\n---\nlr: 1\n",
    "lr: *nowhere\n",
    "=: 1\n",
    "lr: =\n",
    "milestones: " + "[" * 3000 + "\n",
    "milestones: " + "[" * 300 + "]" * 300 + "\n",
)
# a list, and a mapping, of 9^11 values
BOMB = "milestones:\n- &b0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"- &b{i} [{','.join([f'*b{i - 1}'] * 9)}]\n" for i in range(1, 12)
)
MERGES = "a:\n- &c0 {x: 1}\n" + "".join(
    f"- &c{i} {{<<: [{','.join([f'*c{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


def odd_yaml(random: Random, plain: dict[str, Any]) -> bytes:
    """A configuration file: other values, odd YAML, other bytes."""
    few = {name: plain[name] for name in random.sample([*plain], random.randint(1, 12))}
    chance = random.random()
    if chance < 0.5:
        text = yaml.safe_dump(change_tree(random, few), allow_unicode=random.random() < 0.5)
    elif chance < 0.8:
        text = "".join(random.choices((*ODD_YAML, BOMB, MERGES), k=random.randint(1, 2)))
        text += yaml.safe_dump(few) if random.random() < 0.3 else ""
    else:
        text = yaml.safe_dump(few)
    data = text.encode("utf-8", "surrogatepass")
    return change_bytes(random, data, 2) if chance > 0.75 else data


def options() -> list[Any]:
    return [*options_by_name().values(), *options_of("place", PlaceConfig)]


@cache
def plain_options() -> dict[str, Any]:
    return small_runs.resolve(small_runs.SMALL | SMALL).flat()


def config(random: Random, folder: Path) -> Read:
    path = folder / "options.yaml"
    path.write_bytes(odd_yaml(random, plain_options()))
    lists = random.random() < 0.3
    return lambda: read_lists(str(path)) if lists else read_config_file(str(path), options())


def run_config(random: Random, folder: Path) -> Read:
    (folder / "config.yaml").write_bytes(odd_yaml(random, plain_options()))
    return RunFolder(folder).read_config


# Checkpoints


@cache
def trained() -> dict[str, bytes]:
    """The files of a run that has trained one epoch."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = small_runs.start(folder, epochs=1, **SMALL).folder.path
        return {p.name: p.read_bytes() for p in path.iterdir()}
    finally:
        shutil.rmtree(folder)


@cache
def state(name: str) -> dict[str, Any]:
    return torch.load(io.BytesIO(trained()[name]), weights_only=True)


def odd_tensor(random: Random) -> Any:
    return random.choice(
        (
            torch.zeros(0),
            torch.zeros(3),
            torch.zeros(3, dtype=torch.int64),
            torch.zeros(2, dtype=torch.complex64),
            torch.zeros(2, dtype=torch.bool),
            torch.tensor(float("nan")),
            torch.zeros(1).expand(10**12),
            torch.zeros(32, 3, 3, 3, dtype=torch.float64),
            torch.zeros(32, 3, 3, 3).to_sparse(),
            torch.zeros(32, dtype=torch.complex64),
            torch.zeros(32, device="meta"),
            odd_value(random),
        )
    )


def change_state(random: Random, plain: dict[str, Any]) -> dict[str, Any]:
    """Other values in a checkpoint: near the top as often as deep inside."""
    changed = dict(plain)
    for _ in range(random.randint(1, 2)):
        name = random.choice([*changed] or ["x"])
        chance = random.random()
        if chance < 0.15:
            changed.pop(name, None)
        elif chance < 0.3:
            changed[name] = odd_value(random)
        elif chance < 0.5 and isinstance(changed.get(name), dict) and changed[name]:
            inner = dict(changed[name])
            inner[random.choice([*inner])] = odd_tensor(random)
            changed[name] = inner
        else:
            changed[name] = change_tree(random, changed.get(name), 1)
    return changed


def saved(plain: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    return buffer.getvalue()


def change_members(random: Random, data: bytes) -> bytes:
    """Change members of the archive that a checkpoint is, with checksums that agree."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("data.pkl"))
    chance = random.random()
    if chance < 0.6:
        members[name] = change_pickle(random, members[name])
    elif chance < 0.9:
        name = random.choice([*members])
        members[name] = change_bytes(random, members[name])
    else:
        members.pop(random.choice([*members]))
    file = io.BytesIO()
    packing = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(file, "w", packing) as archive:
        for member, content in members.items():
            archive.writestr(zipfile.ZipInfo(member), content, packing)
    return file.getvalue()


def odd_checkpoint(random: Random, name: str) -> bytes:
    chance = random.random()
    if chance < 0.5:
        return saved(change_state(random, state(name)))
    if chance < 0.8:
        return change_members(random, trained()[name])
    if chance < 0.83:
        value = odd_value(random)
        return random.choice((pickle.dumps, saved))(value)
    if chance < 0.84:
        return checkpoint_bomb(random)
    return change_bytes(random, trained()[name])


def checkpoint_bomb(random: Random) -> bytes:
    """A tensor's bytes that unpack to GiB of zeros."""
    mebibytes = random.choice((64, 2047))
    plain = {"format": 2, "model": {"x": torch.zeros(4)}}
    data = saved(plain)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            if name.endswith("/data/0"):
                packed = deflated_zeros(mebibytes)
                info = zipfile.ZipInfo(name)
                archive.writestr(info, packed, zipfile.ZIP_STORED)
                info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, mebibytes << 20
                info.CRC = crc_of_zeros(mebibytes)
            else:
                archive.writestr(zipfile.ZipInfo(name), content)
    return file.getvalue()


@cache
def crc_of_zeros(mebibytes: int) -> int:
    found, block = 0, bytes(1 << 20)
    for _ in range(mebibytes):
        found = zlib.crc32(block, found)
    return found


def beside(random: Random, folder: Path, name: str, data: bytes) -> Path:
    """Write a checkpoint with or without its sums, which agree or not, and maybe a former one."""
    path = folder / name
    path.write_bytes(data)
    if random.random() < 0.3:
        (folder / checkpoint.SUMS).write_bytes(trained()[checkpoint.SUMS])
    if random.random() < 0.2:
        (folder / "last-2.pt").write_bytes(trained()["last.pt"])
    return path


def load(random: Random, folder: Path) -> Read:
    path = beside(random, folder, "last.pt", odd_checkpoint(random, "last.pt"))
    return lambda: checkpoint.load(path)


def weights(random: Random, folder: Path) -> Read:
    name = random.choice(("last.pt", "best.pt"))
    path = beside(random, folder, name, odd_checkpoint(random, name))
    whole = random.random() < 0.5
    if whole:
        (folder / "config.yaml").write_bytes(trained()["config.yaml"])
        summary = json.loads(trained()["summary.json"])
        summary["tested_model"] = path.stem
        if random.random() < 0.2:
            summary["tested_model"] = odd_value(random)
        (folder / "summary.json").write_text(json.dumps(summary))
    return lambda: open_trained(folder if whole else path, CPU, "torch")


def resume(random: Random, folder: Path) -> Read:
    """Up to the first step of what would be trained."""
    plain = copy.deepcopy(state("last.pt"))
    (folder / "last.pt").write_bytes(saved(change_state(random, plain)))
    for name in ("config.yaml", "environment.json", "metrics.csv"):
        data = trained()[name]
        if random.random() < 0.1:
            data = change_bytes(random, data)
        (folder / name).write_bytes(data)

    def read() -> None:
        with mock.patch.object(loop.Training, "train", return_value={}):
            try:
                run.resume(PlaceConfig(resume=str(folder)), {}, ["fuzz"], quiet=True)
            except UsageError as error:
                # names the option, which a user may give beside the run
                where = folder if str(error).startswith("--") else ""
                raise UsageError(f"{where}: {error}") from error

    return read


def sums(random: Random, folder: Path) -> Read:
    path = folder / "last.pt"
    path.write_bytes(trained()["last.pt"])
    (folder / checkpoint.SUMS).write_bytes(odd_json(random, trained()[checkpoint.SUMS]))
    return lambda: checkpoint.load(path)


# What pages are made of


def odd_json(random: Random, data: bytes) -> bytes:
    chance = random.random()
    if chance < 0.75:
        text = json.dumps(change_tree(random, json.loads(data)), ensure_ascii=random.random() < 0.5)
        return text.encode("utf-8", "surrogatepass")
    if chance < 0.8:
        deep = random.choice((1000, 100_000))
        return random.choice((b"[" * deep, b'{"a":' * deep, json.dumps(nested(500)).encode()))
    if chance < 0.82:
        return b'{"a": ' + b"9" * 5000 + b"}"
    return change_bytes(random, data)


@cache
def run_files() -> dict[str, bytes]:
    """A finished run with what analyze and ood leave for its page."""
    folder = Path(tempfile.mkdtemp())
    try:
        path = make_run(folder / "run")
        (path / "confusion_matrix.png").write_bytes(b"png")
        for key in ("analysis", "ood"):
            (path / key).mkdir()
            (path / key / f"{key}.json").write_text(json.dumps(SECTIONS))
            (path / key / "figure.png").write_bytes(b"png")
        return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    finally:
        shutil.rmtree(folder)


SECTIONS = {
    "format": 1,
    "sections": [
        {
            "title": "Confusions",
            "anchor": "confusions",
            "paragraphs": ["said"],
            "table": {"header": ["true", "images"], "rows": [["cat", "3"]], "numbers": [1]},
            "sentences": ["one"],
            "figures": [["figure.png", "what it shows", "caption"]],
            "facts": [["command", "fastcnn analyze"]],
        }
    ],
}
RECORD = {
    "format": 1,
    "key": "sweep",
    "title": "Sweep",
    "lead": "2 variants",
    "facts": [["command", "fastcnn sweep"]],
    "table": {"header": ["variant", "top-1"], "rows": [["a", "50.0"]], "numbers": [1]},
    "sentences": ["one"],
    "notes": ["two"],
    "drawings": [{"name": "figure", "alt": "what it shows", "title": "Figure"}],
}


def page(random: Random, folder: Path) -> Read:
    files = dict(run_files())
    name = random.choice([name for name in files if not name.endswith(".png")])
    if name.endswith(".json"):
        files[name] = odd_json(random, files[name])
    elif name.endswith(".yaml"):
        files[name] = odd_yaml(random, yaml.safe_load(files[name]))
    else:
        files[name] = change_bytes(random, files[name])
    if random.random() < 0.05:
        files.pop(random.choice([*files]))
    path = folder / "run"
    for inner, data in files.items():
        place = path / inner
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(data)
    together = random.random() < 0.3
    return lambda: compare([path, path]) if together else write_page(path)


def record(random: Random, folder: Path) -> Read:
    (folder / "figure.png").write_bytes(b"png")
    (folder / "sweep.json").write_bytes(odd_json(random, json.dumps(RECORD).encode()))
    return lambda: write_pages(folder, "title", "lead")
