"""One disturbed training of soak.py, and that it sees what it is there for."""

import json
import shutil
import sys
from random import Random

import pytest
import soak
import torch
from soak import Event, Soak
from soaking import damage, training
from soaking.compare import differences
from soaking.training import Stuck, way_on

from fastcnn.train.checkpoints import checkpoint

pytestmark = pytest.mark.full

# figures take longer than the training
UNDRAWN = (
    "import sys; from fastcnn import api, cli; api.draw = lambda folder: None; "
    "sys.exit(cli.main(['train', '--quiet', *sys.argv[1:]]))"
)
SMALL = "--arch murgolo-improved --optimizer adam --train-subset 96 --epochs 6"


def events(folder):
    return [json.loads(line)["event"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A soak's folder after the undisturbed run."""
    folder = tmp_path_factory.mktemp("soak")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soak, "CONFIGURATIONS", {"small": SMALL})
        patch.setattr(training, "COMMAND", [sys.executable, "-c", UNDRAWN])
        Soak(folder).reference("small")
    return folder


@pytest.fixture
def own(undisturbed, tmp_path, monkeypatch):
    """A copy of it."""
    monkeypatch.setattr(soak, "CONFIGURATIONS", {"small": SMALL})
    monkeypatch.setattr(training, "COMMAND", [sys.executable, "-c", UNDRAWN])
    return shutil.copytree(undisturbed, tmp_path / "soak")


def test_a_run_that_was_stopped_killed_and_damaged_ends_as_another(own):
    given = [
        Event("", "SIGTERM", training=True),
        Event("a bit of last.pt"),
        Event("last.pt half written", "SIGKILL", training=True),
    ]
    running = Soak(own)
    assert running.round("small", iter(given)), running.state.mismatch
    assert events(own) == [
        "undisturbed run",
        "SIGTERM",
        "damage",
        "none",
        "goes back",
        "damage",
        "SIGKILL",
        "none",
        "run like the undisturbed one",
    ]
    assert not (own / "disturbed" / "small").exists()
    assert running.state.round == 1


def forget_moments(path, random):
    """What a resume would do that began the optimiser anew."""
    state = checkpoint.load(path)
    for moments in state["optimizer"]["state"].values():
        for moment in moments.values():
            moment.zero_()
    checkpoint.save(state, path, 3)


def test_a_resume_without_the_optimiser_s_moments_is_seen(own, monkeypatch, capsys):
    monkeypatch.setitem(damage.DAMAGES, "moments", ("last.pt", forget_moments))
    given = [Event("", "SIGINT", training=True), Event("moments")]
    monkeypatch.setattr(Soak, "events", lambda self: iter(given))
    words = ["--seconds", "1", "--folder", str(own)]
    assert soak.main(words) == 1
    said = capsys.readouterr().out
    assert "differs from" in said
    assert "last.pt.model" in said
    assert (own / "disturbed" / "small" / "last.pt").is_file()
    # nothing more is run where a mismatch waits for a look
    monkeypatch.setattr(training, "run", None)
    assert soak.main(words) == 1


@pytest.fixture
def pair(own):
    whole = own / "undisturbed" / "small"
    return whole, shutil.copytree(whole, own / "other")


def test_equal_runs_do_not_differ(pair):
    whole, other = pair
    (other / "last-2.pt").unlink()
    text = (other / "metrics.csv").read_text().splitlines()
    place = text[0].split(",").index("seconds")
    text[1] = ",".join("99" if n == place else v for n, v in enumerate(text[1].split(",")))
    (other / "metrics.csv").write_text("\n".join(text) + "\n")
    assert differences(whole, other) == []


def alter_state(change):
    def alter(folder):
        state = checkpoint.load(folder / "last.pt")
        change(state)
        checkpoint.save(state, folder / "last.pt")

    return alter


def nudge(tensors):
    tensor = next(t for t in tensors if t.is_floating_point())
    tensor.data.add_(1e-3)


ALTERED = {
    "last.pt.model": alter_state(lambda state: nudge(state["model"].values())),
    "last.pt.optimizer": alter_state(lambda s: nudge(s["optimizer"]["state"]["exp_avg"].values())),
    "last.pt.rng": alter_state(lambda state: state["rng"]["cpu"].view(-1)[-1:].add_(1)),
    "last.pt.step": alter_state(lambda state: state.update(step=1)),
    "metrics.csv": lambda f: (f / "metrics.csv").write_text((f / "metrics.csv").read_text()[:-40]),
    "summary.json.test_top1": lambda f: (f / "summary.json").write_text(
        json.dumps(json.loads((f / "summary.json").read_text()) | {"test_top1": 0.0})
    ),
    ".last.pt.7.part is left over": lambda f: (f / ".last.pt.7.part").touch(),
    "best.pt is missing": lambda f: (f / "best.pt").unlink(),
}


@pytest.mark.parametrize("place", ALTERED)
def test_every_difference_is_seen(pair, place):
    whole, other = pair
    ALTERED[place](other)
    assert [found for found in differences(whole, other) if found.startswith(place)]


def test_other_types_and_shapes_differ(pair):
    whole, other = pair
    state = checkpoint.load(other / "last.pt")
    state["model"] = {name: t.double() for name, t in state["model"].items()}
    checkpoint.save(state, other / "last.pt")
    assert len(differences(whole, other)) == len(state["model"])
    assert all(isinstance(t, torch.Tensor) for t in state["model"].values())


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("import time; time.sleep(60)", "no end after 0.5 s"),
        (
            "import subprocess; subprocess.Popen(['sleep', '60'], stderr=-3)",
            "processes left behind",
        ),
        ("raise SystemExit(7)", "the undisturbed run ended with 7"),
    ],
)
def test_what_hangs_or_leaves_processes_ends_the_soak(tmp_path, monkeypatch, capsys, script, told):
    monkeypatch.setattr(training, "COMMAND", [sys.executable, "-c", script])
    monkeypatch.setattr(training, "LONGEST", 0.5 if "no end" in told else 60.0)
    monkeypatch.setattr(training, "ORPHANS", 0.2)
    assert soak.main(["--seconds", "9", "--folder", str(tmp_path)]) == 1
    assert told in capsys.readouterr().out


def test_an_exit_code_of_another_fault_ends_the_soak(own, monkeypatch):
    monkeypatch.setattr(training, "COMMAND", [sys.executable, "-c", "raise SystemExit(3)"])
    running = Soak(own)
    assert not running.run(60)
    assert "exit code 3" in running.state.mismatch


@pytest.mark.parametrize(
    ("words", "kind", "target", "removed"),
    [
        ("RUN/last.pt: damaged: x; RUN/last-2.pt, of step 4, is whole: give that", "goes back",
         "last-2.pt", None),
        ("RUN/checkpoints.json cannot be read (x); remove it", "removes a file", None,
         "checkpoints.json"),
        ("RUN/last.pt: truncated: 1 of 2 bytes", "begins anew", None, "last.pt"),
        ("cannot write RUN/last.pt: No space left on device", "makes room", None, None),
    ],
)  # fmt: skip
def test_the_way_on_is_the_one_that_the_message_shows(tmp_path, words, kind, target, removed):
    names = {"checkpoints.json", "last.pt", "last-2.pt"}
    for name in names:
        (tmp_path / name).touch()
    found = way_on(tmp_path, "fastcnn: " + words.replace("RUN", str(tmp_path)))
    assert found == (kind, tmp_path / target if target else None)
    assert {path.name for path in tmp_path.iterdir()} == names - {removed}


def test_a_message_that_shows_no_way_ends_the_soak(tmp_path):
    with pytest.raises(Stuck, match="no way on: fastcnn: something"):
        way_on(tmp_path, "fastcnn: something is wrong")


def test_a_soak_goes_on_where_it_was_stopped(tmp_path):
    first = Soak(tmp_path, seed=3)
    all_of_them = list(first.events())
    assert len(all_of_them) == soak.MOST
    first.state.event = 5
    first.log("SIGKILL", code=-9)
    again = Soak(tmp_path, seed=3)
    assert list(again.events()) == all_of_them[5:]
    assert again.state.counts == {"SIGKILL": 1}
    first.state.round += 1
    assert list(first.events()) != all_of_them[5:]


def test_damage_is_done_to_files_that_are_there(tmp_path):
    for kind, (name, _) in damage.DAMAGES.items():
        assert not damage.damage(tmp_path, kind, Random(0))
        (tmp_path / name).write_bytes(bytes(100))
        assert damage.damage(tmp_path, kind, Random(0))
        assert [p.read_bytes() for p in sorted(tmp_path.iterdir())] != [bytes(100)]
        for path in tmp_path.iterdir():
            path.unlink()
