"""Commands through ninja: names that need quoting, what is shown, the first error of an output."""

import logging
from pathlib import Path

import pytest

from fastcnn.ops.native import compile as compiling
from fastcnn.ops.native.compile import Step, StepFailed, first_error, run_steps

WENT_WELL = "[1/3] c++ -Werror a.cpp\na.cpp:1: warning: error: in a warning\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("a.cpp:1:2: error: 'x' was not declared", "a.cpp:1:2: error: 'x' was not declared"),
        ("In file included\nb.h:1: fatal error: y.h: No such file", "b.h:1: fatal error: y.h: No"),
        ('a.cu(3): error: identifier "x"', 'a.cu(3): error: identifier "x"'),
        ("nvcc fatal   : Unsupported gpu architecture", "nvcc fatal   : Unsupported gpu"),
        ("ptxas fatal   : Unresolved extern", "ptxas fatal   : Unresolved"),
        ("x.cpp:(.text+0x5): undefined reference to `f'\ncollect2: error: ld", "x.cpp:(.text+0x5)"),
        ("/usr/bin/ld: cannot find -lx: No such file\ncollect2: error: ld", "/usr/bin/ld: cannot"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "c++: fatal error: Killed"),
        ("nothing that is known", "ninja: build stopped"),
    ],
)
def test_the_first_error_of_what_failed(output, expected):
    failed = f"FAILED: [code=1] b.o\nc++ -Werror: error:\n{output}\nninja: build stopped.\n"
    assert first_error(WENT_WELL + failed).startswith(expected)


def test_ninja_s_own_error_and_silence():
    assert first_error("ninja: error: unknown target 'x'") == "ninja: error: unknown target 'x'"
    assert first_error("") == "ninja ended without a message"


def test_words_reach_the_command_as_they_are(tmp_path):
    folder = tmp_path / "a b$c"
    folder.mkdir()
    words = ["a b", "$ORIGIN", "it's", "x:y", "*"]
    program = "import json, sys; json.dump(sys.argv[1:], open('out', 'w'))"
    run_steps(folder, [Step("out", ["python3", "-c", program, *words])], "t", True, lambda: None)
    assert (folder / "out").read_text() == '["a b", "$ORIGIN", "it\'s", "x:y", "*"]'
    assert "[1/1] python3" in (folder / "build.log").read_text()


def test_steps_wait_for_what_they_need(tmp_path):
    steps = [Step("b", ["cp", "a", "b"], ("a",)), Step("a", ["sh", "-c", "sleep 0.2; echo 1 > a"])]
    run_steps(tmp_path, steps, "t", True, lambda: None)
    assert (tmp_path / "b").read_text() == "1\n"


def test_lines_while_it_takes_long(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(compiling, "LINE_INTERVAL_S", 0.25)
    steps = [Step("a", ["sh", "-c", "echo 1 > a"]), Step("b", ["sleep", "0.7"], ("a",))]
    with caplog.at_level(logging.INFO, "fastcnn"):
        run_steps(tmp_path, steps, "building", False, lambda: None)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("building: 2 steps, ")
    assert lines[1:]
    assert set(lines[1:]) <= {"building: 1/2, 0 s", "building: 1/2, 1 s"}


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, caplog, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with caplog.at_level(logging.INFO, "fastcnn"):
        run_steps(tmp_path, [Step("a", ["true"])], "building", False, lambda: None)
    assert caplog.text == ""
    assert "building" in capsys.readouterr().err


class Stop(Exception):
    """What ends a build in these tests."""


def run_until_started(folder, script):
    def check():
        if (folder / "started").exists():
            raise Stop

    with pytest.raises(Stop):
        run_steps(folder, [Step("a", ["sh", "-c", script])], "t", True, check)


def test_what_ends_the_build_ends_its_commands(tmp_path):
    loop = "while :; do sleep 0.02; done"
    run_until_started(tmp_path, f"trap 'touch ended; exit' TERM; touch started; {loop}")
    assert (tmp_path / "ended").exists()


def test_commands_that_do_not_heed_it_are_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "GRACE_S", 0.2)
    run_until_started(tmp_path, "trap '' TERM; echo $$ > pid; touch started; sleep 600")
    process = int((tmp_path / "pid").read_text())
    # at once: at most for init to reap it
    state = Path(f"/proc/{process}/stat")
    assert not state.exists() or ") Z " in state.read_text()


def test_a_failure_is_raised_at_once(tmp_path):
    with pytest.raises(StepFailed, match="planted"):
        run_steps(
            tmp_path,
            [Step("a", ["sh", "-c", "echo error: planted; exit 1"])],
            "t",
            True,
            lambda: None,
        )
