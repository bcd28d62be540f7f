"""A named pipe where a file should be is refused: nobody may ever write to it."""

import os
import signal

import pytest
from image_files import load, write_folder
from run_folders import make_run

from fastcnn import cli
from fastcnn.data.sources.cifar import PYTHON_BATCHES
from fastcnn.data.sources.download import md5_of
from fastcnn.errors import CheckpointError, DataError, FastcnnError
from fastcnn.files import check_regular
from fastcnn.insight.run_page.page import write_page
from fastcnn.insight.run_page.saved_sections import kept_of
from fastcnn.options import read_config_file, read_lists
from fastcnn.study import record
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.rundir import RunFolder

WAIT_S = 3


@pytest.fixture(autouse=True)
def _no_wait():
    """End a test that waits."""

    def end(*_):
        pytest.fail(f"it still waits after {WAIT_S} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(WAIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path):
    path = tmp_path / "x.yaml"
    os.mkfifo(path)
    return path


READERS = {
    "a configuration": lambda path: read_config_file(str(path), []),
    "a study": lambda path: read_lists(str(path)),
    "a record": record.read,
    "an archive": md5_of,
}


@pytest.mark.parametrize("kind", READERS)
def test_a_pipe_is_refused_in_a_line(pipe, kind):
    with pytest.raises(FastcnnError, match=rf"{pipe}.*not a regular file"):
        READERS[kind](pipe)


def test_a_command_refuses_a_pipe_as_configuration(pipe, capsys):
    assert cli.main(["train", "--config", str(pipe)]) == 2
    assert capsys.readouterr().err == f"fastcnn: --config {pipe}: not a regular file\n"


@pytest.mark.parametrize("name", ["metrics.csv", "confusion_matrix.csv", "environment.json"])
def test_a_pipe_among_the_files_of_a_run(tmp_path, name):
    folder = make_run(tmp_path / "run")
    (folder / "confusion_matrix.png").write_bytes(b"png")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read .*not a regular file"):
        write_page(folder)


def test_a_pipe_for_what_may_be_absent(tmp_path):
    for name in ("metrics.csv", "x.json", "checkpoints.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "last.pt").write_bytes(b"x")
    assert not RunFolder(tmp_path).has_tables([])
    assert kept_of(tmp_path, "x") is None
    with pytest.raises(CheckpointError, match=r"checkpoints\.json cannot be read .*not a regular"):
        checkpoint.load(tmp_path / "last.pt")


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to("file")
    check_regular(tmp_path / "file")
    check_regular(tmp_path / "link")


def test_a_device_is_refused_too():
    with pytest.raises(FastcnnError, match="/dev/null: not a regular file"):
        read_config_file("/dev/null", [])


def test_pipes_as_images_and_archives(tmp_path, own_cache):
    os.mkfifo(tmp_path / "x.zip")
    with pytest.raises(DataError, match="neither a folder nor a regular file"):
        load(tmp_path / "x.zip")
    root = write_folder(tmp_path / "images")
    os.mkfifo(root / "train" / "ant" / "pipe.png")
    assert len(load(root).train) == 6


def test_a_pipe_among_the_batches_of_cifar(tmp_path, own_cache):
    for name in PYTHON_BATCHES:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / PYTHON_BATCHES[0]).unlink()
    os.mkfifo(tmp_path / PYTHON_BATCHES[0])
    with pytest.raises(DataError, match=rf"cannot read \S+{PYTHON_BATCHES[0]}: not a regular"):
        load("cifar10", data_dir=str(tmp_path))
