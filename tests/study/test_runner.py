"""Runs of a study: kept when finished, taken up when stopped, in this process and in others."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from small_runs import SMALL, assert_same, final_state, stop_at_check

from fastcnn import files
from fastcnn.errors import CheckpointError, DiskError, FastcnnError, UsageError
from fastcnn.study import children, runner
from fastcnn.study.children import placed
from fastcnn.study.plan import Variant, plan
from fastcnn.study.runner import carry_out, claimed, is_finished, results
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.interrupt import Interrupted
from fastcnn.train.numerics import amp

TINY = SMALL | {"arch": "mao-default", "backend": "torch"}
COMMAND = ["test"]


def variants(**others):
    found = {"slow": {"lr": 0.01}, "fast": {"lr": 0.1}} | others
    return [Variant(key, key, TINY | options) for key, options in found.items()]


def planned(root, seeds=2, **others):
    chosen = variants(**others)
    return chosen, plan(chosen, {variant.key: range(seeds) for variant in chosen}, root)


def refuse_to_train(monkeypatch):
    def train(*arguments):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(runner, "train_one", train)


def test_runs_go_seed_by_seed_each_in_its_folder(tmp_path):
    chosen = variants()
    runs = plan(chosen, {"slow": [0, 1], "fast": [5]}, tmp_path)
    assert [(run.variant.key, run.seed) for run in runs] == [("slow", 0), ("fast", 5), ("slow", 1)]
    assert [run.config.run.seed for run in runs] == [0, 5, 1]
    assert len({run.folder for run in runs}) == 3
    assert runs[1].folder == tmp_path / "fast" / "seed-5"
    assert (runs[0].config.optim.lr, runs[1].config.optim.lr) == (0.01, 0.1)


def test_finished_runs_are_kept(tmp_path, monkeypatch):
    chosen, runs = planned(tmp_path)
    lines = []
    assert carry_out(runs, COMMAND, quiet=True, say=lines.append) == []
    assert lines[0] == "[0/4 done] slow seed 0 begins"
    assert lines[-1].startswith("[4/4 done] fast seed 1: top-1 ")
    found = results(chosen, runs)
    assert [[run.seed for run in one.runs] for one in found] == [[0, 1], [0, 1]]
    assert len(found[0].runs[0].history["train_loss"]) == 2
    refuse_to_train(monkeypatch)
    assert carry_out(runs, COMMAND, quiet=True) == []
    assert results(chosen, runs) == found


def test_a_run_that_has_chosen_its_number_format_is_the_one_that_was_planned(tmp_path, monkeypatch):
    monkeypatch.setattr(amp, "cpu_computes_in", lambda dtype: True)
    monkeypatch.setattr(amp, "known_or_measured", lambda *_: amp.Times(1.0, 2.0))
    _, runs = planned(tmp_path, seeds=1, slow={"lr": 0.01, "amp": True})
    carry_out(runs[:1], COMMAND, quiet=True)
    assert is_finished(runs[0])
    _, others = planned(tmp_path, seeds=1, slow={"lr": 0.01, "amp": True, "amp_dtype": "bf16"})
    with pytest.raises(UsageError, match="amp_dtype: fp32, now bf16"):
        is_finished(others[0])


def test_only_what_is_missing_is_trained(tmp_path):
    _, runs = planned(tmp_path, seeds=1)
    carry_out(runs[:1], COMMAND, quiet=True)
    lines = []
    carry_out(runs, COMMAND, quiet=True, say=lines.append)
    assert lines[0] == "[1/2 done] fast seed 0 begins"
    assert len(lines) == 2


def test_an_interrupted_run_goes_on_where_it_was(tmp_path, monkeypatch):
    _, unbroken = planned(tmp_path / "unbroken", seeds=1)
    carry_out(unbroken, COMMAND, quiet=True)
    _, runs = planned(tmp_path / "broken", seeds=1)
    with monkeypatch.context() as patch:
        stop_at_check(patch, 2)
        with pytest.raises(Interrupted):
            carry_out(runs, COMMAND, quiet=True)
    assert not is_finished(runs[0])
    assert checkpoint.load(runs[0].folder / "last.pt")["step"] == 2
    carry_out(runs, COMMAND, quiet=True)
    for one, other in zip(unbroken, runs, strict=True):
        assert_same(final_state(one.folder), final_state(other.folder))


@pytest.mark.parametrize("leftovers", [[], [".config.yaml.part", ".lock"]])
def test_a_run_killed_before_it_wrote_anything_begins_anew(tmp_path, leftovers):
    _, runs = planned(tmp_path, seeds=1)
    runs[0].folder.mkdir(parents=True)
    for name in leftovers:
        (runs[0].folder / name).write_text("epochs:")
    carry_out(runs[:1], COMMAND, quiet=True)
    assert is_finished(runs[0])


def test_a_folder_with_other_files_is_not_cleared(tmp_path):
    _, runs = planned(tmp_path, seeds=1)
    runs[0].folder.mkdir(parents=True)
    (runs[0].folder / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="holds files that are no run; remove it"):
        carry_out(runs[:1], COMMAND, quiet=True)
    assert (runs[0].folder / "thesis.tex").read_text() == "years of work"


def test_a_folder_with_another_run_is_refused(tmp_path):
    _, runs = planned(tmp_path, seeds=1)
    carry_out(runs[:1], COMMAND, quiet=True)
    _, others = planned(tmp_path, seeds=1, slow={"lr": 0.02})
    with pytest.raises(UsageError, match=r"other options \(lr: 0.01, now 0.02\); remove it, or"):
        carry_out(others, COMMAND, quiet=True)


def test_options_of_the_machine_are_no_other_run(tmp_path):
    _, runs = planned(tmp_path, seeds=1)
    carry_out(runs[:1], COMMAND, quiet=True)
    _, others = planned(tmp_path, seeds=1, slow={"lr": 0.01, "threads": 2, "workers": 0})
    assert is_finished(others[0])


@pytest.mark.full
@pytest.mark.parametrize("jobs", [1, 2])
def test_numbers_not_finite_fail_one_run_alone(tmp_path, jobs):
    diverging = {"lr": 1e30, "schedule": "constant", "optimizer": "sgd"}
    chosen, runs = planned(tmp_path, seeds=1, slow=diverging)
    lines = []
    [failure] = carry_out(runs, COMMAND, jobs, quiet=True, say=lines.append)
    assert failure.planned.variant.key == "slow"
    assert "is not finite" in failure.reason
    assert any("slow seed 0 failed: " in line for line in lines)
    assert [len(one.runs) for one in results(chosen, runs)] == [0, 1]


def test_a_full_disk_ends_the_study_and_leaves_what_is_finished(tmp_path, monkeypatch):
    chosen, runs = planned(tmp_path, seeds=1)
    carry_out(runs[:1], COMMAND, quiet=True)

    def no_space(*arguments):
        raise CheckpointError("cannot write last.pt: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", no_space)
        with pytest.raises(CheckpointError, match="No space left"):
            carry_out(runs, COMMAND, quiet=True)
    assert [len(one.runs) for one in results(chosen, runs)] == [1, 0]
    carry_out(runs, COMMAND, quiet=True)
    assert [len(one.runs) for one in results(chosen, runs)] == [1, 1]


def test_only_a_damaged_run_is_to_be_removed(tmp_path, monkeypatch):
    """An interrupted run that a full disk keeps from going on is worth keeping."""
    _, runs = planned(tmp_path, seeds=1)
    with monkeypatch.context() as patch:
        stop_at_check(patch, 2)
        with pytest.raises(Interrupted):
            carry_out(runs, COMMAND, quiet=True)
    with monkeypatch.context() as patch:

        def full(descriptor):
            raise OSError(28, "No space left on device")

        patch.setattr(files.os, "fsync", full)
        with pytest.raises(DiskError, match="No space left") as caught:
            carry_out(runs, COMMAND, quiet=True)
        assert "remove" not in str(caught.value)
    (runs[0].folder / "last.pt").write_bytes(b"cut")
    with pytest.raises(CheckpointError, match=r"or remove .*seed-0 to train it anew"):
        carry_out(runs, COMMAND, quiet=True)


def test_a_damaged_table_of_a_run_is_named(tmp_path):
    chosen, runs = planned(tmp_path, seeds=1)
    carry_out(runs[:1], COMMAND, quiet=True)
    (runs[0].folder / "metrics.csv").write_text("epoch,train_loss\n1,what\n")
    with pytest.raises(
        CheckpointError, match=r"metrics.csv is damaged .*; remove .*slow.seed-0 to train it"
    ):
        results(chosen, runs)


def test_two_processes_do_not_share_a_folder(tmp_path):
    with (
        claimed(tmp_path),
        pytest.raises(UsageError, match="another process is at work there"),
        claimed(tmp_path),
    ):
        pass
    with claimed(tmp_path):
        pass


def test_jobs_reach_what_one_process_reaches(tmp_path):
    _, alone = planned(tmp_path / "alone", seeds=1)
    carry_out(alone, COMMAND, quiet=True)
    _, together = planned(tmp_path / "together", seeds=1)
    lines = []
    assert carry_out(together, COMMAND, jobs=2, quiet=True, say=lines.append) == []
    assert len(lines) == 4
    for one, other in zip(alone, together, strict=True):
        assert_same(final_state(one.folder), final_state(other.folder))
        environment = json.loads((other.folder / "environment.json").read_text())
        assert environment["command"] == COMMAND
        assert "epoch 2/2" in other.folder.with_name("seed-0.log").read_text()


@pytest.mark.full
def test_what_ends_every_run_ends_the_jobs(tmp_path):
    _, runs = planned(tmp_path, seeds=1, slow={"data": str(tmp_path / "missing")})
    with pytest.raises(FastcnnError, match=r"slow seed 0: .*missing.*see .*seed-0.log") as caught:
        carry_out(runs, COMMAND, jobs=2, quiet=True)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("gpus", [0, 2])
def test_each_job_has_its_share_of_the_machine(tmp_path, monkeypatch, gpus):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(children, "usable_cores", lambda: 8)
    one = plan([Variant("a", "a", {"arch": "cnn-a"})], {"a": [0]}, tmp_path)[0]
    found = [placed(one, place, jobs=3).config.run for place in range(3)]
    devices = ["cuda:0", "cuda:1", "cuda:0"] if gpus else ["auto"] * 3
    assert [run.device for run in found] == devices
    assert [run.threads for run in found] == [2] * 3
    named = plan([Variant("a", "a", {"device": "cpu", "threads": 1})], {"a": [0]}, tmp_path)[0]
    run = placed(named, 1, jobs=3).config.run
    assert (run.device, run.threads) == ("cpu", 1)


def test_jobs_take_the_places_that_are_free(tmp_path, monkeypatch):
    """Of runs that end at once, each in the place of one that has ended."""
    taken = []

    class Ended:
        def __init__(self, planned, command, place):
            self.planned, self.place, self.process = planned, place, self
            self.looks = 0 if planned.seed % 2 else 3
            taken.append(place)

        def poll(self):
            self.looks -= 1
            return 0 if self.looks < 0 else None

        def outcome(self):
            return "numbers" if self.planned.seed == 3 else ""

    monkeypatch.setattr(runner, "Child", Ended)
    monkeypatch.setattr(runner, "POLL_S", 0)
    monkeypatch.setattr(runner.ProgressReporter, "end", lambda self, planned: None)
    one = Variant("a", "a", TINY)
    failures = carry_out(plan([one], {"a": range(6)}, tmp_path), COMMAND, jobs=2)
    # seeds with an odd number end at once: what comes next is in their place
    assert taken[:3] == [0, 1, 1]
    assert set(taken) == {0, 1}
    assert [failure.planned.seed for failure in failures] == [3]


LONG = TINY | {"epochs": 100_000, "eval_batch_size": 40}
STUDY = """
import sys
from pathlib import Path
from fastcnn.study.plan import Variant, plan
from fastcnn.study.runner import carry_out
chosen = [Variant(key, key, {options!r}) for key in "ab"]
runs = plan(chosen, dict(a=[0], b=[0]), Path({root!r}))
try:
    carry_out(runs, ["test"], jobs=2, quiet=True)
except Exception as error:
    sys.exit(error.exit_code)
"""


@pytest.mark.full
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_jobs_save_their_runs_when_the_study_is_stopped(tmp_path, signum, code):
    """SIGINT as a terminal sends it: to the whole group. Children hear of it from their parent
    alone: two signals would end them before they have saved."""
    script = STUDY.format(options=LONG, root=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    folders = [tmp_path / key / "seed-0" for key in "ab"]
    try:
        wait_for(lambda: all((folder / "last.pt").exists() for folder in folders))
        (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
        assert process.wait(60) == code
        # whoever still trained would write metrics.csv again and again
        wait_for(lambda: all("stopped by SIGTERM" in log_of(folder) for folder in folders))
        before = [(folder / "metrics.csv").stat().st_mtime_ns for folder in folders]
        time.sleep(0.5)
        assert before == [(folder / "metrics.csv").stat().st_mtime_ns for folder in folders]
    finally:
        process.kill()
        process.wait()


def log_of(folder):
    return folder.with_name("seed-0.log").read_text()


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
