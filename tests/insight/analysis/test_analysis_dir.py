"""The folders that `analyze` and `ood` write into a run: one writer each, nothing outside."""

import pytest
from run_folders import make_run

from fastcnn.cli import main
from fastcnn.insight.analysis.analysis_dir import claimed, origin_of, word_of
from fastcnn.insight.run_page.saved_sections import save_sections

COMMANDS = [("analyze", "analysis"), ("ood", "ood-digits")]


@pytest.fixture
def run(tmp_path):
    """A finished run without a checkpoint: who opens that first says that it is missing."""
    return make_run(tmp_path / "run")


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def refused(capsys, command, run):
    """What the command says, which changes nothing."""
    before = files(run.parent)
    words = ["--out", "digits"] if command == "ood" else []
    assert main([command, str(run), *words]) == 4
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert files(run.parent) == before
    return captured.err


def a_file(run, name):
    (run / name).write_text("mine")
    return f"{name} is a file where a folder is needed; move it"


def a_link(run, name):
    (run.parent / "elsewhere").mkdir()
    (run / name).symlink_to(run.parent / "elsewhere")
    return f"{name} is a link, which may lead out of the run; remove it"


def a_link_for_the_lock(run, name):
    (run.parent / "mine").write_text("mine")
    (run / f".{name}.lock").symlink_to(run.parent / "mine")
    return f"cannot write into {run}: Too many levels of symbolic links"


def no_environment(run, name):
    (run / "environment.json").unlink()
    return "environment.json is missing"


def garbage_for_metrics(run, name):
    (run / "metrics.csv").write_text("\0\1")
    return "metrics.csv"


def another_record_damaged(run, name):
    (run / "ood-other").mkdir()
    (run / "ood-other" / "ood.json").write_text("{")
    return "ood.json is not what fastcnn wrote"


@pytest.mark.parametrize(("command", "name"), COMMANDS)
@pytest.mark.parametrize(
    "fault",
    [
        a_file,
        a_link,
        a_link_for_the_lock,
        no_environment,
        garbage_for_metrics,
        another_record_damaged,
    ],
)
def test_what_would_stop_the_end_is_told_before_any_image(capsys, run, command, name, fault):
    says = fault(run, name)
    assert says in refused(capsys, command, run)
    assert {path.read_text() for path in run.parent.glob("mine")} <= {"mine"}


@pytest.mark.parametrize(("command", "name"), COMMANDS)
def test_a_second_writer_is_refused_and_no_lock_stays(capsys, run, command, name):
    of = ["", "test"] if command == "analyze" else ["", "digits"]
    with claimed(run, name, "key", of) as folder:
        assert folder == run / name
        told = refused(capsys, command, run)
        assert f"{folder}: another process is writing there" in told
    assert "no checkpoint at" in refused(capsys, command, run)
    assert [path.name for path in run.glob(".*")] == []


@pytest.mark.parametrize(("command", "name"), COMMANDS)
def test_a_damaged_record_is_written_anew(capsys, run, command, name):
    (run / name).mkdir()
    (run / name / ("analysis.json" if command == "analyze" else "ood.json")).write_text("{")
    assert "no checkpoint at" in refused(capsys, command, run)


def test_data_of_the_same_name_have_a_folder_each(run):
    def held(of):
        with claimed(run, "ood-images", "ood", [of]) as folder:
            folder.mkdir(exist_ok=True)
            save_sections(folder, "ood", [], [of])
        return folder.name

    found = [held(of) for of in ("/a/images", "/b/images", "/a/images", "/c/images", "/b/images")]
    assert found == ["ood-images", *(f"ood-images{n}" for n in ("-2", "", "-3", "-2"))]
    # of an older version, which did not say whose it is
    save_sections(run / "ood-images", "ood", [])
    assert held("/d/images") == "ood-images"


def test_images_are_told_by_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert [origin_of(data) for data in (None, "digits", "x/y/../z")] == [
        *("", "digits"),
        str(tmp_path / "x/z"),
    ]
    assert [word_of(data) for data in ("digits", "x/y/..", ".")] == ["digits", "x", tmp_path.name]
