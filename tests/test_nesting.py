"""Files with lists in lists: each reader refuses them at the same depth, however deep the
interpreter may recurse; torch.compile raises its limit for the whole process."""

import inspect
import pickle
import sys
import zipfile
from contextlib import contextmanager
from functools import partial

import pytest
import torch

from fastcnn.config import Config, options_by_name
from fastcnn.data.store import load_packed
from fastcnn.errors import FastcnnError
from fastcnn.files import DEEPEST
from fastcnn.insight.run_page import run_files
from fastcnn.insight.run_page.saved_sections import kept_of, saved_sections
from fastcnn.ops.conv_autotune import plan_cache
from fastcnn.options import read_config_file, read_lists
from fastcnn.study import record
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.checkpoints.migrations import FORMAT
from fastcnn.train.loggers import Loggers
from fastcnn.train.rundir import RunFolder

MANY = 100_000


@contextmanager
def recursion_limit(limit):
    former = sys.getrecursionlimit()
    sys.setrecursionlimit(limit)
    try:
        yield
    finally:
        sys.setrecursionlimit(former)


def lists(depth):
    return "[" * depth + "]" * depth


def mixed(depth):
    """Mappings in lists, a text with brackets beside each."""
    pair = '{"a": "]\\"]}", "b": ['
    return "[" * (depth % 2) + pair * (depth // 2) + "]}" * (depth // 2) + "]" * (depth % 2)


def blocks(depth):
    """Lists in a mapping, in YAML's other style."""
    return "a:\n" + "- " * (depth - 1) + "x"


def write_checkpoint(path, depth):
    """A checkpoint, a mapping that holds lists: torch's own writer would recurse."""
    torch.save({"format": FORMAT, "x": []}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    head = pickle.dumps({"format": FORMAT}, 2)[:-1] + b"X\1\0\0\0x"
    parts[name] = head + b"]" * (depth - 1) + b"a" * (depth - 2) + b"s."
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def read_logger(path):
    config = Config.from_flat(Config().flat() | {"loggers": ["tensorboard"]})
    Loggers(config, path.parent.parent, [])


# by the file's name: what is in it and who reads it
READERS = {
    "config.yaml": (lists, lambda path: read_config_file(str(path), options_by_name().values())),
    "block.yaml": (blocks, lambda path: read_lists(str(path))),
    "run/config.yaml": (lists, lambda path: RunFolder(path.parent).read_config()),
    "summary.json": (mixed, lambda path: RunFolder(path.parent).read_summary()),
    "environment.json": (lists, lambda path: run_files.read_json(path.parent, path.name)),
    "analysis.json": (mixed, lambda path: saved_sections(path.parent, path.stem)),
    "record.json": (lists, record.read),
    "checkpoints.json": (mixed, lambda path: checkpoint.has_sum(path.with_name("last.pt"))),
    "last.pt": (write_checkpoint, checkpoint.load),
    "tensorboard/logged.json": (lists, read_logger),
    "plan.json": (mixed, plan_cache.read),
    "cache/entry/meta.json": (mixed, lambda path: load_packed("images", path.parent.name)),
}


def told(tmp_path, monkeypatch, caplog, name, depth):
    """What a reader says of a file of this depth, by an error or a warning."""
    content, read = READERS[name]
    path = tmp_path / str(depth) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if content is write_checkpoint:
        write_checkpoint(path, depth)
    else:
        path.write_text(content(depth))
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / str(depth) / "cache"))
    caplog.clear()
    try:
        read(path)
    except FastcnnError as error:
        return str(error)
    return "\n".join(one.getMessage() for one in caplog.records)


@pytest.mark.parametrize("limit", ["little left", 1000, MANY])
@pytest.mark.parametrize("name", READERS)
def test_a_reader_refuses_a_depth_of_its_own(tmp_path, caplog, monkeypatch, name, limit):
    tell = partial(told, tmp_path, monkeypatch, caplog, name)
    with recursion_limit(limit if limit in (1000, MANY) else len(inspect.stack(0)) + 200):
        shallow = tell(DEEPEST)
        deep = {depth: tell(depth) for depth in (DEEPEST + 1, MANY)}
    assert "deep in one another" not in shallow
    assert "recursion" not in shallow
    for depth, line in deep.items():
        assert f"lists or mappings lie more than {DEEPEST} deep in one another" in line
        assert str(tmp_path / str(depth) / name.removesuffix("/meta.json")) in line
        assert len(line.splitlines()) == 1
        assert len(line) < 400


def test_a_section_too_deep_tells_of_no_data(tmp_path):
    (tmp_path / "ood.json").write_text(lists(MANY))
    assert kept_of(tmp_path, "ood") is None


def test_many_values_side_by_side_are_not_deep(tmp_path):
    text = '{"a[{": [' + ", ".join(["[]", "{}", '"[[["', r'"\"["'] * 1000) + "]}"
    (tmp_path / "values.json").write_text(text)
    assert len(run_files.read_json(tmp_path, "values.json")["a[{"]) == 4000


def test_a_value_that_holds_itself_is_too_deep(tmp_path):
    path = tmp_path / "last.pt"
    own = {"format": FORMAT}
    torch.save(own | {"shared": [[own] * 9] * 9}, path)
    assert checkpoint.load(path)["shared"]
    own["own"] = own
    torch.save(own, path)
    with pytest.raises(FastcnnError, match=r"last\.pt: .* deep in one another"):
        checkpoint.load(path)
