"""Images go one way, source, scan, select, store, loader, and enter each of the rooms once."""

from collections import Counter

import pytest
from image_files import members_of, write_folder, write_tar, write_zip

from fastcnn import data
from fastcnn.config import DATA_NAMES
from fastcnn.recipes import resolve
from fastcnn.train import setup

pytestmark = pytest.mark.usefixtures("own_cache")

ROOMS = {  # in order; what enters each
    "source": ("open_source",),
    "scan": ("scan_images",),
    "select": ("select_images",),
    "store": ("pack", "leave_in_files"),
}


@pytest.fixture
def entered(monkeypatch):
    """The rooms that images come into, and the loaders that they go out by."""
    rooms = []

    def watched(room, enter):
        return lambda *args, **options: rooms.append(room) or enter(*args, **options)

    for room, names in ROOMS.items():
        for name in names:
            monkeypatch.setattr(data, name, watched(room, getattr(data, name)))
    monkeypatch.setattr(setup, "make_loader", watched("loader", setup.make_loader))
    return rooms


def prepared(path, **options):
    given = {"data": str(path), "arch": "cnn-a", "device": "cpu", "backend": "torch"}
    return setup.prepare(resolve(given | options))


@pytest.mark.parametrize("kind", ["folder", "files", "tar", "zip", "digits"])
def test_a_run_enters_each_room_once(entered, root, tmp_path, kind):
    write_folder(root, side=32)
    path, options = root, {"batch_size": 2}
    if kind == "files":
        options |= {"store": "files", "loader": "torch"}
    elif kind in ("tar", "zip"):
        pack = {"tar": write_tar, "zip": write_zip}[kind]
        path = pack(tmp_path / f"x.{kind}", members_of(root))
    elif kind in DATA_NAMES:
        path = kind
    prepared(path, **options)
    counts = Counter(entered)
    assert counts.pop("loader") == 1  # and one by which it is evaluated
    assert counts == dict.fromkeys(ROOMS, 1)
    entered.clear()
    prepared(path, **options)
    again = {"source", "store"} if kind != "files" else ROOMS.keys()
    assert set(entered) - {"loader"} == set(again)
