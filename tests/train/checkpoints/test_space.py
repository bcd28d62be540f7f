"""The disk's room for checkpoints, held against what a run needs before it begins."""

import re
import shutil

import pytest
from small_runs import SMALL, resume, start

from fastcnn.errors import DiskError
from fastcnn.recipes import resolve
from fastcnn.train.checkpoints import space
from fastcnn.train.setup import prepare


def with_free(monkeypatch, free):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: usage._replace(free=free))


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "momentum": 0.9, "ema": 0.0, "keep_checkpoints": 1},
        {"optimizer": "sgd", "momentum": 0.0, "ema": 0.9, "keep_checkpoints": 2},
        {"optimizer": "adam", "ema": 0.9, "keep_checkpoints": 3},
    ],
    ids=["momentum", "averaged", "Adam"],
)
def test_what_is_needed_is_what_a_run_writes(tmp_path, options):
    folder = start(tmp_path, epochs=4, **options).folder
    written = sum(path.stat().st_size for path in folder.path.glob("*.pt"))
    written += folder.last.stat().st_size + folder.best.stat().st_size  # while they are written
    needed = space.bytes_of_checkpoints(prepare(resolve(SMALL | options)))
    assert 0.9 * written < needed <= written


def test_a_disk_that_is_too_small_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    needed = space.bytes_of_checkpoints(prepare(resolve(SMALL)))
    with_free(monkeypatch, needed - 1)
    wanted = re.escape(
        f"{tmp_path / 'runs' / 'run'}: {needed:,} bytes needed for checkpoints, {needed - 1:,} "
        "free; free some, give an --output on another disk, or fewer --keep-checkpoints"
    )
    with pytest.raises(DiskError, match=f"^{wanted}$") as caught:
        start(tmp_path / "runs")
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []
    with_free(monkeypatch, needed)
    start(tmp_path / "runs", epochs=1)


def test_a_run_that_goes_on_needs_no_room_for_what_it_replaces(tmp_path, monkeypatch):
    folder = start(tmp_path, epochs=1).folder
    there = sum(path.stat().st_size for path in folder.path.glob("*.pt"))
    needed = space.bytes_of_checkpoints(prepare(resolve(SMALL)))
    assert there < needed
    with_free(monkeypatch, needed - there - 1)
    with pytest.raises(DiskError, match=f"{needed - there:,} bytes needed"):
        resume(folder.path, epochs=2, allow_changes=True)
    with_free(monkeypatch, needed - there)
    assert resume(folder.path, epochs=2, allow_changes=True).summary["epochs"] == 2
