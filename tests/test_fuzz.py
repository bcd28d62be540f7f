"""A few inputs of each target of fuzz.py, those that were findings once, and readers with faults
that it must find."""

import json
import os
import time
from random import Random

import fuzz
import pytest
from fuzzing.guard import MEMORY, Reader
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcnn.config import Config, options_by_name
from fastcnn.errors import DataError, UsageError

INPUTS = range(6)
# numbers of inputs that were findings, by target: each of another fault
KEPT = {
    "tar": (234, 493, 924, 10145),
    "zip": (30, 135, 656),
    "tiny": (73, 97),
    "folder": (26,),
    "config": (1, 4, 11, 15, 293),
    "run-config": (0, 169),
    "weights": (10, 48, 66, 135, 217, 251, 310, 691, 794),
    "resume": (8, 105, 10042, 20003, 20022, 40086),
    "sums": (44, 1991),
    "page": (2, 27, 42, 58),
    "record": (18, 19, 22, 53, 120),
}


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    fuzz.warm_up()
    with Reader(fuzz.TARGETS, tmp_path_factory.mktemp("fuzz"), fuzz.LIMIT) as found:
        yield found


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_damaged_files_are_read_or_refused(reader, target):
    verdicts = {number: reader(target, number) for number in (*KEPT.get(target, ()), *INPUTS)}
    assert not {n: found for n, found in verdicts.items() if found.outcome == "fault"}
    assert "refused" in {found.outcome for found in verdicts.values()}


def test_an_input_follows_from_its_number(tmp_path):
    contents = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        fuzz.TARGETS["tar"](Random("tar 5"), folder)
        contents.append([(path.name, path.read_bytes()) for path in folder.iterdir()])
    assert contents[0] == contents[1]


def raises(error):
    def read(folder):
        raise error

    return read


FAULTY = {
    "KeyError ": raises(KeyError("wnid")),
    "RecursionError ": raises(RecursionError()),
    "SystemExit ": raises(SystemExit(0)),
    "name ": raises(DataError("--data: something is wrong somewhere")),
    "hangs": lambda folder: time.sleep(60),
    "memory": lambda folder: len(bytearray(b"x") * (MEMORY + (64 << 20))),
    "MemoryError ": lambda folder: bytearray(1 << 40),
    "ends with 3": lambda folder: os._exit(3),
    "does open": lambda folder: (folder.parent.parent / "outside").write_text("x"),
    "does os.mkdir": lambda folder: (folder.parent.parent / "outside").mkdir(),
    "does os.system": lambda folder: os.system("true"),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", FAULTY)
def test_a_faulty_reader_is_found_and_its_input_kept(tmp_path, monkeypatch, capsys, kind):
    def prepare(random, folder):
        (folder / "given.tar").write_bytes(random.randbytes(8))
        return lambda: FAULTY[kind](folder)

    monkeypatch.setattr(fuzz, "TARGETS", {"planted": prepare})
    monkeypatch.setattr(fuzz, "LIMIT", 0.5 if kind == "hangs" else 20.0)
    words = ["--target", "planted", "--seed", "7", "--count", "1", "--folder", str(tmp_path)]
    assert fuzz.main(words) == 1
    found = json.loads((tmp_path / "planted-7" / "finding.json").read_text())
    assert found["kind"].startswith(kind)
    assert len((tmp_path / "planted-7" / "input" / "given.tar").read_bytes()) == 8
    assert "planted: 1 inputs, 0 read, 0 refused, 1 findings" in capsys.readouterr().out


def test_what_a_reader_swallows_is_found(tmp_path, monkeypatch):
    def read():
        try:
            os.system("true")
        except Exception:
            return

    monkeypatch.setattr(fuzz, "TARGETS", {"planted": lambda random, folder: read})
    assert fuzz.main(["--target", "planted", "--count", "1", "--folder", str(tmp_path)]) == 1


def test_sound_readers_end_well(tmp_path, monkeypatch, capsys):
    def prepare(random, folder):
        path = folder / "given"
        return lambda: path.write_text("x") if random.random() < 0.5 else raises_of(path)

    def raises_of(path):
        raise DataError(f"{path}: cut; get it again")

    monkeypatch.setattr(fuzz, "TARGETS", {"planted": prepare})
    assert fuzz.main(["--count", "20", "--target", "planted", "--folder", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    assert "planted: 20 inputs" in capsys.readouterr().out


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*options_by_name()]), VALUES, min_size=1, max_size=6))
@settings(max_examples=200, deadline=None, derandomize=True, database=None)
def test_any_plain_values_make_a_configuration_or_an_error_of_one_line(options):
    refused = ""
    try:
        config = Config.from_flat(options)
    except UsageError as error:
        refused = str(error)
    if refused:
        assert refused.isprintable()
        assert len(refused) < 500
    else:
        assert Config.from_flat(config.flat()) == config
