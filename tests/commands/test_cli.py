"""The command as a user types it: exit codes, one-line errors, nearest names, signals."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import fake_build
import pytest
import torch

from fastcnn import doctor
from fastcnn.cli import main
from fastcnn.config import options_by_name
from fastcnn.errors import BuildError
from fastcnn.ops.native import build, library
from fastcnn.train.checkpoints import checkpoint

SMALL = [
    "train",
    "--arch",
    "murgolo-improved",
    "--data",
    "digits",
    "--train-subset",
    "96",
    "--test-subset",
    "32",
    "--batch-size",
    "16",
    "--threads",
    "1",
]


def run(capsys, *words):
    code = main(list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        ("trian", 2, "unknown command 'trian'; did you mean 'train'?"),
        ("", 2, "no command given"),
        ("train --lrr 3", 2, "unknown option --lrr; did you mean '--lr'?"),
        ("train vgg16", 2, "unexpected argument 'vgg16'; files and folders go together"),
        ("predict run a.png --top 3 b.png", 2, "unexpected argument 'b.png'; files and folders go"),
        ("train --weigth-decay=1", 2, "did you mean '--weight-decay'?"),
        ("train --no-ampp", 2, "did you mean '--no-amp'?"),
        ("train --lr fast", 2, "--lr: expected a number, got 'fast'"),
        ("train --lr -1", 2, "--lr: must be more than 0"),
        ("train --lr nan", 2, "--lr: expected a finite number, got nan"),
        ("train --epochs 0", 2, "--epochs: must be at least 1"),
        ("train --epochs 1.5", 2, "--epochs: expected a whole number"),
        ("train --optimizer sdg", 2, "did you mean 'sgd'?"),
        ("train --milestones 3 x", 2, "--milestones: expected whole numbers"),
        ("train --arch vgg61", 2, "did you mean 'vgg16'?"),
        ("train --data digts", 2, "did you mean 'digits'?"),
        ("train --data no/such/folder", 3, "no such file or folder"),
        ("train --data ~nobody/y", 3, "--data"),
        ("train --data " + "x" * 300, 3, "too long"),
        ("train --loader dalli", 2, "--loader: 'dalli' is not one of auto, resident, dali, torch"),
        ("train --config no-such.yaml", 2, "no-such.yaml"),
        ("predict", 2, "are required: RUN, IMAGES; see fastcnn predict RUN IMAGES... [options]"),
        ("compare", 2, "are required: RUN; see fastcnn compare RUN RUN"),
        ("eval", 2, "are required: RUN; see fastcnn eval RUN [options]"),
        # an option of train, which analyze does not take
        ("analyze run --epoch 3", 2, "unknown option --epoch; did you mean '--device'?"),
        ("train --epoch 1", 2, "unknown option --epoch; did you mean '--epochs'?"),
        ("train --batch-size 99999999999999999999", 2, "--batch-size: must be at most"),
        ("train --mixup 1e308", 2, "--mixup: must be at most 100"),
        ("train --schedule cosine --warmup-epochs 90", 2, "--warmup-epochs: must be less than"),
        ("train --name a/b --data digits", 2, "--name: expected the name of a folder"),
        ("train --name ../a --data digits", 2, "--name: expected the name of a folder"),
        ("train --name .. --data digits", 2, "--name: expected the name of a folder"),
        ("train --resume x --name y", 2, "leave name and output out"),
        ("train --data=", 2, "--data: expected a text, got none"),
        ("train --resume=", 2, "--resume: expected a text, got none"),
        ("eval run --weights bset", 2, "--weights: 'bset' is not one of last, best; did you"),
        ("eval run --split tset", 2, "did you mean 'test'?"),
        ("archs --classes x", 2, "--classes: expected a whole number, got 'x'"),
        ("train --resume no/such/run", 4, "is not a run folder"),
        ("train --data digits --train-subset 99999", 2, "99999"),
        ("train --data digits --val-fraction 1.0", 2, "--val-fraction: must be less than 1"),
        ("train --data digits --image-size 16", 2, "smallest size that works is 32x32"),
        ("train --recipe report --arch resnet18 --data digits", 2, "no report describes resnet18"),
        ("train --recipe fast --arch cnn-a --data digits", 2, "which cnn-a lacks; take --recipe"),
        ("train --recipe fsat", 2, "is not one of modern, fast, report; did you mean 'fast'?"),
        ("eval no/such/run", 4, "no checkpoint at"),
        ("archs nosuchnet", 2, "unknown architecture 'nosuchnet'"),
        ("archs cnn-a --classes 1", 2, "--classes: must be at least 2"),
        ("archs cnn-a --image-size 2", 2, "--image-size: must be at least 8"),
    ],
)
def test_an_error_is_one_line_with_its_exit_code(
    capsys, tmp_path, monkeypatch, words, code, expected
):
    monkeypatch.chdir(tmp_path)
    found, out, err = run(capsys, *words.split())
    assert (found, out) == (code, "")
    assert err.startswith("fastcnn: ")
    assert err.count("\n") == 1
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_fused_convolutions_in_plain_torch_are_refused_in_one_line(capsys, tmp_path):
    where = ["--device", "cpu", "--output", str(tmp_path)]
    code, out, err = run(capsys, *SMALL, *where, "--backend", "torch", "--conv", "fused")
    assert (code, out) == (BuildError.exit_code, "")
    assert err.startswith("fastcnn: --conv fused: needs --backend fused, which cannot be had here ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_one_line(capsys):
    code, _, err = run(capsys, "train", "--data", "digits", "--device", "cuda")
    assert code == 2
    assert "torch sees no GPU here" in err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weigth_decay: 0.3\n", "did you mean 'weight_decay'?"),
        ("lr: quick\n", "--lr: expected a number"),
        ("lr: [1\n", ""),
        ("- 1\n- 2\n", "expected lines of 'option: value'"),
        ("", "expected lines of 'option: value'"),
        ("optimizer: sgdd\n", "did you mean 'sgd'?"),
        ("arch: [1]\n", "--arch: expected a text"),
        ("name: 5\n", "--name: expected a text, got 5"),
        ("milestones: 3\n", "--milestones: expected whole numbers"),
        ("lr: 0.1\nlr: 0.2\n", "lr is given twice"),
        ("1: 2\n", "unknown option '1'"),
        (b"\xff\xfe\x00", "not YAML"),
    ],
)
def test_a_bad_config_file_is_one_line(capsys, tmp_path, text, expected):
    (tmp_path / "c.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, _, err = run(capsys, "train", "--config", str(tmp_path / "c.yaml"))
    assert code == 2
    assert err.count("\n") == 1
    assert expected in err


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    for option in options_by_name().values():
        assert option.flag in text
    assert "--epochs N passes over the training images (default: 60)" in text
    assert "type:" not in text


def test_debug_shows_the_traceback(capsys):
    _, _, err = run(capsys, "archs", "nosuchnet", "--debug")
    assert "Traceback" in err


@pytest.mark.parametrize("first", [True, False])
def test_flags_stand_above_the_config_file(capsys, tmp_path, first):
    (tmp_path / "c.yaml").write_text("epochs: 2\nlr: 2.5e-1\nseed: 7\nname: run\n")
    where, file = ["--output", str(tmp_path)], ["--config", str(tmp_path / "c.yaml")]
    flags = [*file, "--epochs", "1"] if first else ["--epochs", "1", *file]
    code, out, _ = run(capsys, *SMALL, *flags, *where)
    assert code == 0
    assert f"run folder: {tmp_path / 'run'}" in out
    config = checkpoint.load(tmp_path / "run" / "last.pt")["config"]
    assert (config["epochs"], config["lr"], config["seed"]) == (1, 0.25, 7)


def test_train_draws_its_figures_and_page_and_eval_reads_the_run(capsys, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr("fastcnn.commands.train.open_page", opened.append)
    where = ["--output", str(tmp_path), "--name", "run"]
    code, out, err = run(capsys, *SMALL, "--epochs", "1", *where, "--open")
    assert code == 0
    assert opened == [tmp_path / "run" / "index.html"]
    assert "Test top-1" in out
    assert "epoch 1/1" in err
    folder = tmp_path / "run"
    for name in ("curves.png", "confusion_matrix.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert page.count('<figure class="chart">') == 4
    assert "http" not in page
    code, out, _ = run(capsys, "eval", str(folder), "--json", "--threads", "1")
    assert code == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert json.loads(out)["top1"] == summary["test_top1"]
    code, out, _ = run(capsys, "eval", str(folder / "best.pt"), "--threads", "1")
    assert "32 images: top-1" in out
    _, out, _ = run(capsys, "eval", str(folder), "--test-flip", "--threads", "1")
    assert "32 images seen both ways: top-1" in out


def test_an_unexpected_error_is_one_line_too(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda: {}["gone"])
    code, _, err = run(capsys, "doctor")
    assert (code, err) == (1, "fastcnn: unexpected KeyError: 'gone'; --debug shows where\n")


def test_a_damaged_analysis_ends_no_resumed_run(capsys, tmp_path):
    small = [*SMALL, "--output", str(tmp_path), "--name", "run"]
    assert run(capsys, *small, "--epochs", "1")[0] == 0
    (tmp_path / "run" / "analysis").mkdir()
    (tmp_path / "run" / "analysis" / "analysis.json").write_text("{}")
    more = ["train", "--resume", str(tmp_path / "run"), "--epochs", "2", "--allow-changes"]
    code, out, err = run(capsys, *more)
    assert (code, err.count("analysis.json is not what fastcnn wrote")) == (0, 1)
    assert "Test top-1" in out


@pytest.mark.full
@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_training_goes_on_without_what_draws(tmp_path, missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "from fastcnn.cli import main\n"
        f"sys.exit(main({[*SMALL, '--epochs', '1', '--output', str(tmp_path)]!r}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert f"{missing} is missing; see fastcnn doctor" in found.stderr
    assert "Test top-1" in found.stdout


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m fastcnn archs --json | head -1; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert found.returncode in (0, 141)
    assert found.stderr == ""


def test_archs_lists_every_network_and_shows_one(capsys):
    code, out, _ = run(capsys, "archs", "--json")
    listed = {entry["name"]: entry for entry in json.loads(out)}
    assert code == 0
    assert listed["cnn-a"]["parameters"] == 591_274
    assert listed["vgg16"]["report"] == "bohnstedt2019"
    assert listed["vgg16"]["train_mflop"] == pytest.approx(1_876, rel=2e-3)
    _, out, _ = run(capsys, "archs", "mao-default")
    assert "Conv2d-1" in out
    assert "Total params: 256,058" in out
    assert "Estimated Total Size (MB): 1.46" in out
    _, out, _ = run(capsys, "archs", "vgg16", "--image-size", "64", "--classes", "200", "--json")
    assert json.loads(out)["layers"][-1]["output_shape"] == [-1, 200]


def test_doctor_reports_and_names_remedies(capsys):
    code, out, _ = run(capsys, "doctor", "--json")
    findings = {entry["subject"]: entry for entry in json.loads(out)}
    assert code == 0
    assert findings["torch"]["state"] == torch.__version__.split("+")[0]
    assert all(entry["ok"] or entry["remedy"] for entry in findings.values())
    code, out, _ = run(capsys, "doctor")
    assert "torch" in out


@pytest.fixture
def native(tmp_path, monkeypatch):
    """The cache of builds of a native library that compiles in a moment."""
    source = fake_build.write_sources(tmp_path / "csrc")
    monkeypatch.setattr(library, "source_dir", lambda: source)
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(build.ARCHS_VARIABLE, raising=False)
    return tmp_path / "cache" / "native"


def test_build_says_what_was_built_and_then_that_it_is_there(capsys, native):
    code, out, err = run(capsys, "build", "--cpu")
    assert code == 0
    assert re.match(rf"native library for CPU built in \d+\.\d s: {native}/torch.*\.so\n", out)
    assert err.startswith("building the native library for CPU: 3 steps")
    path = out.split(": ")[1].splitlines()[0]
    code, out, err = run(capsys, "build", "--archs", "none")
    assert re.match(rf"native library for CPU is there since 20..-..-..: {re.escape(path)}\n", out)
    assert err == ""
    _, out, err = run(capsys, "build", "--cpu", "--force", "--quiet")
    assert "built in" in out
    assert err == ""


@pytest.mark.parametrize(
    ("words", "variable", "archs"),
    [
        ([], "", None),
        (["--cpu"], "9.0", "none"),
        (["--cuda"], "", "8.0;9.0+PTX"),
        (["--cuda"], "none", "8.0;9.0+PTX"),
        (["--cuda"], "8.6", None),  # which leaves it to the variable
        (["--archs", "9.0"], "8.6", "9.0"),
        (["--cuda", "--archs", "9.0"], "", "9.0"),
    ],
)
def test_build_for_what_the_flags_name(capsys, native, monkeypatch, words, variable, archs):
    asked = []
    monkeypatch.setattr(build, "ensure", lambda *given: asked.append(given) or {}["stop"])
    monkeypatch.setenv(build.ARCHS_VARIABLE, variable)
    run(capsys, "build", *words)
    assert asked == [(archs, False, False)]


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["--cpu", "--cuda"], 2, "--cpu: leave out --cuda and --archs with it"),
        (["--cpu", "--archs", "9.0"], 2, "--cpu: leave out"),
        (["--cuda", "--archs", "none"], 2, "--cuda: leave it out"),
        (["--archs", "hopper"], 2, "--archs: 'hopper' is no architecture"),
        ([], 5, "the native library cannot be built: "),
    ],
)
def test_build_errors_are_one_line(capsys, native, tmp_path, words, code, expected):
    (tmp_path / "csrc" / "bindings.cpp").write_text("planted")
    found, out, err = run(capsys, "build", "--quiet", *words)
    assert (found, out) == (code, "")
    assert err.startswith(f"fastcnn: {expected}")
    assert err.count("\n") == 1


@pytest.mark.full
@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_build_that_is_stopped_leaves_nothing(native, tmp_path, signum, exit_code):
    calls = fake_build.write_compiler(tmp_path / "cxx", delay=600)
    environment = {**os.environ, "CXX": str(tmp_path / "cxx")}
    command = [sys.executable, "-m", "fastcnn", "build", "--cpu"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    fake_build.wait_until(lambda: fake_build.lines(calls))
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == exit_code
    assert "Traceback" not in err
    assert fake_build.processes_of(tmp_path / "cache") == []
    assert list(native.iterdir()) == []


def spawn(tmp_path, *words):
    command = [sys.executable, "-m", "fastcnn", *words, "--output", str(tmp_path)]
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )


def wait_for(path, process, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


LONG = [*SMALL, "--epochs", "3", "--checkpoint-steps", "1"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    process = spawn(folder, *LONG, "--name", "run")
    assert process.wait(120) == 0
    return checkpoint.load(folder / "run" / "last.pt")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_ended_by_a_signal_is_resumed_bit_equal(tmp_path, unbroken, number, code):
    process = spawn(tmp_path, *LONG, "--name", "run")
    wait_for(tmp_path / "run" / "last.pt", process)
    time.sleep(0.1)  # into a step, or a save
    process.send_signal(number)
    found = process.wait(60)
    if found == 0:
        pytest.skip("the run was faster than the signal")
    assert found == code
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert 1 <= state["step"] <= 18
    assert main(["train", "--resume", str(tmp_path / "run"), "--quiet"]) == 0
    final = checkpoint.load(tmp_path / "run" / "last.pt")
    assert final["step"] == unbroken["step"] == 18
    for name, tensor in unbroken["model"].items():
        assert torch.equal(tensor, final["model"][name]), name
    leftovers = [name for name in os.listdir(tmp_path / "run") if name.endswith(".part")]
    assert number == signal.SIGKILL or leftovers == []
