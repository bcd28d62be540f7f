"""TensorBoard and W&B: what they were told is read back from their own files."""

import csv
import json
import logging
import shutil
import struct
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from small_runs import assert_same, final_state, resume, start, stop_at_check

from fastcnn import doctor
from fastcnn.config import Config
from fastcnn.errors import UsageError
from fastcnn.recipes import resolve
from fastcnn.train import loggers, loop
from fastcnn.train.interrupt import Interrupted
from fastcnn.train.rundir import RunFolder

BOTH = ["tensorboard", "wandb"]
COLUMNS = {
    "loss/train": "train_loss",
    "loss/val": "val_loss",
    "top1/train": "train_top1",
    "top1/val": "val_top1",
    "top5/val": "val_top5",
    "lr": "lr",
    "images_per_s": "images_per_s",
    "skipped_steps": "skipped_steps",
}
TEST = {"loss/test": "test_loss", "top1/test": "test_top1", "top5/test": "test_top5"}


@pytest.fixture(scope="module", autouse=True)
def _nobody_is_called():
    # of the module: W&B reads them once a process
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("MODE", "offline"), ("SILENT", "true"), ("ERROR_REPORTING", "false")):
            patch.setenv(f"WANDB_{name}", value)
        for name in ("PROJECT", "NAME", "RUN_ID"):
            patch.delenv(f"WANDB_{name}", raising=False)
        yield


def stopped(monkeypatch, root, name, look, **options):
    """A run that a signal stops, and its folder."""
    with monkeypatch.context() as patch:
        stop_at_check(patch, look)
        with pytest.raises(Interrupted):
            start(root, name, **options)
    return root / name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three epochs, stopped in the second (three steps and three evaluation batches an
    epoch) and taken up again."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("loggers")
        folder = stopped(patch, root, "run", 8, epochs=3, loggers=BOTH)
    return resume(folder).folder.path


def rows_of(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def board_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"))
    return board.Reload()


def scalars(board, tag):
    return [(event.step, event.value) for event in board.Scalars(tag)]


def records(path):
    """The records of a file of W&B: a LevelDB log (blocks of 32 KiB, of chunks with a checksum,
    a length and a kind: whole, first, middle, last) of protocol buffers, behind 7 bytes of its
    own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield Record.FromString(parts)
            parts = b""


def offline_runs(folder):
    """Of each process that logged, in their order: its records."""
    paths = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    # W&B's own process may write the last of them after the run has ended here
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [[*records(path)] for path in paths]
        if all(any(one.HasField("exit") for one in run) for run in found):
            break
        time.sleep(0.1)
    return found


def pairs(items):
    """The values of W&B's key-value pairs; a key of several parts is joined by slashes."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def logged(found):
    return [pairs(one.history.item) for one in found if one.HasField("history")]


def assert_board_is_the_table(folder, epochs):
    board, rows = board_of(folder), rows_of(folder)
    assert [int(row["epoch"]) for row in rows] == [*range(1, epochs + 1)]
    summary = json.loads((folder / "summary.json").read_text())
    for tag, column in COLUMNS.items():
        found = scalars(board, tag)
        assert [step for step, _ in found] == [*range(1, epochs + 1)]
        wanted = [float(row[column]) for row in rows]
        np.testing.assert_allclose([value for _, value in found], wanted, rtol=1e-5)
    for tag, key in TEST.items():
        assert scalars(board, tag)[-1] == (epochs, pytest.approx(summary[key], rel=1e-6))
    return board


@pytest.mark.full
def test_tensorboard_holds_the_table_of_metrics_once(folder):
    board = assert_board_is_the_table(folder, 3)
    assert {*board.Tags()["scalars"]} == {*COLUMNS, *TEST}
    texts = board.Tensors("configuration/text_summary")
    text = texts[-1].tensor_proto.string_val[0].decode()
    saved = (folder / "config.yaml").read_text()
    assert [line.removeprefix("    ") for line in text.splitlines()] == saved.splitlines()


@pytest.mark.full
def test_wandb_holds_the_table_of_metrics_once(folder):
    first, second = offline_runs(folder)
    told = logged(first) + logged(second)
    assert [row["_step"] for row in told] == [1, 2, 3]
    assert len(logged(first)) == 1
    for row, wanted in zip(told, rows_of(folder), strict=True):
        assert row["epoch"] == int(wanted["epoch"])
        for name, column in COLUMNS.items():
            assert row[name] == pytest.approx(float(wanted[column]), rel=1e-5)
    summary = json.loads((folder / "summary.json").read_text())
    found = {}
    for record in second:
        found |= pairs(record.summary.update)
    assert {name: found[name] for name in TEST} == {n: summary[k] for n, k in TEST.items()}


def test_a_run_of_wandb_goes_on_as_itself_with_every_option(folder):
    runs = [next(one.run for one in found if one.HasField("run")) for found in offline_runs(folder)]
    assert len({one.run_id for one in runs}) == 1
    assert [(one.project, one.display_name) for one in runs] == [("fastcnn", "run")] * 2
    options = pairs(runs[0].config.update)
    wanted = RunFolder(folder).read_config().flat()
    assert {name: options[name] for name in wanted} == wanted
    ends = [
        [one.exit.exit_code for one in found if one.HasField("exit")]
        for found in offline_runs(folder)
    ]
    assert ends == [[1], [0]]


def test_logging_changes_no_bit(folder, tmp_path):
    plain = start(tmp_path, epochs=3).folder.path
    assert_same(final_state(plain), final_state(folder))


def test_what_was_logged_and_not_noted_is_void(tmp_path):
    folder = start(tmp_path, epochs=2, loggers=["tensorboard"]).folder.path
    assert_board_is_the_table(folder, 2)
    state = folder / "tensorboard" / "logged.json"
    assert json.loads(state.read_text()) == {"epochs": 2}
    state.write_text('{"epochs": 1}')
    resume(folder, epochs=3, allow_changes=True)
    assert_board_is_the_table(folder, 3)


def test_a_run_that_begins_anew_in_its_folder_logs_anew(monkeypatch, tmp_path):
    options = {"epochs": 2, "loggers": ["tensorboard"]}
    folder = stopped(monkeypatch, tmp_path, "run", 8, **options)
    for name in ("last.pt", "last-2.pt"):
        (folder / name).unlink()
    resume(folder)
    assert_board_is_the_table(folder, 2)


def test_a_logger_that_comes_late_is_told_of_all(tmp_path):
    folder = start(tmp_path, epochs=1).folder.path
    assert not (folder / "tensorboard").exists()
    with pytest.raises(UsageError, match="add --allow-changes"):
        resume(folder, epochs=2, loggers=["tensorboard"])
    resume(folder, epochs=2, loggers=["tensorboard"], allow_changes=True)
    assert_board_is_the_table(folder, 2)
    # and may be left out again; epochs decide, loggers do not
    resume(folder, epochs=3, loggers=[], allow_changes=True)
    assert len(scalars(board_of(folder), "lr")) == 2
    assert len(rows_of(folder)) == 3


def test_figures_of_the_test_are_not_those_of_the_validation(tmp_path):
    found = start(tmp_path, epochs=1, val_fraction=0.25, loggers=["tensorboard"])
    assert found.summary["validation_images"] == "val"
    for name in ("loss", "top1"):
        assert found.summary[f"test_{name}"] != found.summary[f"val_{name}"]
    assert_board_is_the_table(found.folder.path, 1)


def notes(caplog):
    return [r.getMessage() for r in caplog.records if "--loggers" in r.getMessage()]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_logger_that_fails_is_named_once_and_left(monkeypatch, tmp_path, caplog):
    original = loop.Training._record

    def record(self, *arguments):
        original(self, *arguments)
        if self.state.epoch == 1:  # in the second epoch
            shutil.rmtree(self.folder.path / "tensorboard")
            (self.folder.path / "tensorboard").write_text("no folder any more")

    monkeypatch.setattr(loop.Training, "_record", record)
    found = start(tmp_path, epochs=3, loggers=BOTH)
    assert found.summary["epochs"] == 3
    (note,) = notes(caplog)
    assert note.startswith("note: --loggers tensorboard: ")
    assert note.endswith("; going on without it")
    assert "\n" not in note
    (wandb,) = offline_runs(found.folder.path)
    assert [row["_step"] for row in logged(wandb)] == [1, 2, 3]


@pytest.mark.parametrize("damage", ["{", '"a text"'])
def test_a_logger_that_cannot_begin_is_left(tmp_path, caplog, damage):
    folder = tmp_path / "run"
    (folder / "tensorboard").mkdir(parents=True)
    (folder / "tensorboard" / "logged.json").write_text(damage)
    config = Config.from_flat({"loggers": ["tensorboard"]})
    with loggers.Loggers(config, folder, []) as found:
        found.epoch({"epoch": 1})
    assert len(notes(caplog)) == 1


@pytest.mark.parametrize("name", BOTH)
def test_a_missing_package_is_told_before_anything_is_made(monkeypatch, tmp_path, name):
    for module in [m for m in sys.modules if m.startswith(("torch.utils.tensorboard", name))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    wanted = f"--loggers {name}: the package {name} is missing; pip install 'fastcnn[{name}]'"
    with pytest.raises(UsageError) as caught:
        start(tmp_path, loggers=[name])
    assert str(caught.value) == wanted
    assert [*tmp_path.iterdir()] == []


def test_a_broken_package_is_told_in_a_line(monkeypatch, tmp_path):
    # as an empty folder of that name in the working directory imports
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    with pytest.raises(UsageError, match=r"wandb cannot be imported \(.*init.*\); pip install"):
        loggers.check_loggers(["wandb"])


def test_a_run_that_goes_on_needs_the_package_as_well(monkeypatch, tmp_path):
    folder = stopped(monkeypatch, tmp_path, "run", 2)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match="package wandb is missing"):
        resume(folder, loggers=["wandb"])


def test_a_trial_run_logs_its_epoch(tmp_path):
    options = {"fast_dev_run": True, "loggers": ["tensorboard"]}
    found = start(tmp_path, **options)
    assert_board_is_the_table(found.folder.path, 1)


class Online:
    """W&B where a network is: what it is asked for. Real runs there need a login."""

    def __init__(self, login, project=None):
        self.asked, self.login_answer = [], login
        self.settings = SimpleNamespace(mode="online", project=project, run_name=None, run_id=None)

    def setup(self):
        return SimpleNamespace(settings=self.settings)

    def login(self, prompt):
        assert not prompt
        return self.login_answer

    def Settings(self, **given):  # noqa: N802 - W&B's name
        return given

    def init(self, **given):
        self.asked.append(given)
        nothing = SimpleNamespace(log=lambda *a, **k: None, finish=lambda **k: None)
        return SimpleNamespace(id=given["id"] or "drawn", **vars(nothing))


@pytest.mark.parametrize(
    ("login", "mode", "word"), [(True, "online", "allow"), (False, "offline", None)]
)
def test_wandb_is_online_only_with_a_login(monkeypatch, tmp_path, caplog, login, mode, word):
    caplog.set_level(logging.INFO)
    fake = Online(login, "mine")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = Config.from_flat({"loggers": ["wandb"]})
    for _ in range(2):
        with loggers.Loggers(config, tmp_path, []):
            pass
    first, second = fake.asked
    assert (first["mode"], first["resume"], first["project"]) == (mode, word, "mine")
    assert (first["id"], second["id"]) == (None, "drawn")
    assert first["config"] == config.flat()
    assert first["settings"] == {"console": "off", "quiet": True}
    assert bool(notes(caplog)) != login


def test_options_name_loggers_or_none():
    assert resolve({}).run.loggers == []
    with pytest.raises(UsageError, match="did you mean 'tensorboard'"):
        Config.from_flat({"loggers": ["tensorbord"]})
    with pytest.raises(UsageError, match="is given twice"):
        Config.from_flat({"loggers": ["wandb", "wandb"]})
    assert Config.from_flat({"loggers": []}).run.loggers == []


def test_the_doctor_knows_what_they_need():
    known = {name: remedy for name, purpose, remedy in doctor.PACKAGES if "--loggers" in purpose}
    assert known == {name: f"pip install 'fastcnn[{name}]'" for name in BOTH}
