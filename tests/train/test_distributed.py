"""Runs of several processes: the same as of one, one writer, and what becomes of the others when
one of them dies, is stopped or was started otherwise."""

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from loader_cases import loader_of, numbered
from small_runs import assert_same, final_state, resume, start, stop_at_check
from torch.nn import functional as F

from fastcnn.config import Config
from fastcnn.errors import UsageError
from fastcnn.ops.conv_autotune import plan_cache
from fastcnn.recipes import resolve
from fastcnn.train import distributed, loop, setup
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.distributed import ALONE, Distributed
from fastcnn.train.interrupt import Interrupted, StopAtStepEdge
from fastcnn.train.numerics import amp
from fastcnn.train.numerics.precise_bn import PreciseBatchNorm, batches_of
from fastcnn.train.run import evaluate_run

# no dropout, which draws anew on each rank; SGD, whose steps are no larger than what they come from
OPTIONS = {
    "arch": "mao-default",
    "data": "digits",
    "train_subset": 101,  # batches of 24, 24, 24, 24 and 5
    "test_subset": 37,
    "batch_size": 24,
    "eval_batch_size": 8,
    "epochs": 2,
    "threads": 1,
    "optimizer": "sgd",
    "lr": 0.01,
    "backend": "torch",
    "loader": "resident",
}


def words_of(options):
    """The options as those of a command."""
    words = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return words


def launch(count, *words):
    """Start `torchrun … -m fastcnn train` with these options."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", str(count), "-m", "fastcnn", "train", *words]
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        torchrun,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        start_new_session=True,
    )


def ended(process, timeout=120):
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for pid in (*rank_processes(process).values(), process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=10)
        raise
    return process.returncode, out, err


def history(folder):
    rows = checkpoint.load(Path(folder) / "last.pt")["progress"]["history"]
    return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_s")} for row in rows]


def assert_close_runs(folder, other):
    """The same to the rounding of fp32: weights, moments and the curve."""
    first, second = (checkpoint.load(Path(f) / "last.pt") for f in (folder, other))
    assert first["step"] == second["step"]
    assert first["loader"] == second["loader"]
    for kind in ("model", "ema"):
        if first[kind] is not None:
            for name, tensor in first[kind].items():
                torch.testing.assert_close(tensor, second[kind][name], rtol=1e-4, atol=1e-5)
    for row, wanted in zip(history(folder), history(other), strict=True):
        assert row == pytest.approx(wanted, rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that one process trains."""
    return start(tmp_path_factory.mktemp("alone"), **OPTIONS).folder.path


def test_four_processes_train_and_count_as_one(alone, tmp_path):
    words = words_of(OPTIONS | {"output": str(tmp_path), "name": "run"})
    code, out, err = ended(launch(4, *words))
    assert code == 0, err
    assert_close_runs(tmp_path / "run", alone)
    # one has written, and told; what it draws a run without a command does not
    drawn = {".html", ".png", ".svg"}
    written = {path.name for path in (tmp_path / "run").iterdir() if path.suffix not in drawn}
    assert written == {path.name for path in alone.iterdir()}
    assert out.count("run folder") == 1
    assert len(re.findall("^epoch 1/2", err, re.MULTILINE)) == 1
    assert "device 4 x cpu" in err
    # 37 images on four ranks: 10, 9, 9 and 9, each counted once
    counts = (tmp_path / "run" / "confusion_matrix.csv").read_text()
    assert counts == (alone / "confusion_matrix.csv").read_text()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["images"] == {"train": 101, "test": 37}


def rank_processes(launcher):
    """{rank: process id} of a launcher's processes."""
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdecimal():
            try:
                parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                environ = (path / "environ").read_bytes().split(b"\0")
            except (OSError, IndexError):
                continue
            own = dict(pair.split(b"=", 1) for pair in environ if b"=" in pair)
            if parent == launcher.pid and b"RANK" in own:
                found[int(own[b"RANK"])] = int(path.name)
    return found


def wait_for(path, process, timeout=90):
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


LONG = OPTIONS | {"epochs": 500, "checkpoint_steps": 1, "schedule": "constant"}


# a step, and then an evaluation of seconds
EVALUATING = OPTIONS | {
    "arch": "vgg11",
    "train_subset": 24,
    "checkpoint_steps": 1,
    "test_subset": 359,
    "eval_batch_size": 2,
}


@pytest.mark.full
@pytest.mark.parametrize(("options", "number"), [(LONG, 1), (EVALUATING, 0)])
def test_a_rank_that_is_killed_ends_the_others_and_is_named(tmp_path, options, number):
    process = launch(2, *words_of(options | {"output": str(tmp_path), "name": "run"}))
    wait_for(tmp_path / "run" / "last.pt", process)
    victim = rank_processes(process)[number]
    os.kill(victim, signal.SIGKILL)
    begun = time.monotonic()
    code, _, err = ended(process, 60)
    assert time.monotonic() - begun < 20
    assert code != 0
    assert re.search(
        rf"^fastcnn \(rank {1 - number}\): rank {number} \(pid {victim}\) has ended: start the "
        r"same torchrun command again with --resume",
        err,
        re.MULTILINE,
    ), err
    assert checkpoint.load(tmp_path / "run" / "last.pt")["step"] >= 1


def press_ctrl_c(process):
    """Everybody hears it, and torchrun passes it on."""
    os.killpg(process.pid, signal.SIGINT)


def ask_one(process):
    os.kill(rank_processes(process)[1], signal.SIGTERM)


@pytest.mark.full
def test_a_signal_to_one_rank_in_an_evaluation_is_heard_by_all(tmp_path):
    process = launch(2, *words_of(EVALUATING | {"output": str(tmp_path), "name": "run"}))
    wait_for(tmp_path / "run" / "last.pt", process)
    begun = time.monotonic()
    ask_one(process)
    code, _, err = ended(process, 60)
    assert time.monotonic() - begun < 20
    assert code != 0
    assert "fastcnn (rank 0): stopped by SIGTERM" in err
    state = checkpoint.load(tmp_path / "run" / "last.pt")
    assert state["step"] == 1
    assert state["progress"]["trained"]
    assert not state["progress"]["history"]


def test_a_rank_that_stops_waits_until_the_first_has_saved():
    store = torch.distributed.HashStore()
    here = (socket.gethostname(), os.getpid())
    first, second = (Distributed(number, 2, number, 2, [here, here], store) for number in range(2))
    begun = time.monotonic()
    threading.Timer(0.3, first.stopped).start()
    second.stopped()
    assert time.monotonic() - begun > 0.3
    with subprocess.Popen([sys.executable, "-S", "-c", ""]) as gone:
        pass
    begun = time.monotonic()
    own = [(here[0], gone.pid), here]
    Distributed(1, 2, 1, 2, own, torch.distributed.HashStore()).stopped()
    assert time.monotonic() - begun < 5


def test_all_is_saved_before_the_others_are_let_go(tmp_path, monkeypatch):
    saved = []
    last = tmp_path / "run" / "last.pt"
    monkeypatch.setattr(
        Distributed, "stopped", lambda self: saved.append(checkpoint.load(last)["step"])
    )
    stop_at_check(monkeypatch, 2)
    with pytest.raises(Interrupted):
        start(tmp_path)
    assert saved == [2]


def test_a_signal_that_comes_while_ranks_agree_waits_for_the_next_time():
    """The others have not heard of it: who left alone would keep them waiting."""

    class Two(Distributed):
        def all_reduce_max(self, *numbers):
            heard.note(signal.SIGTERM)  # after the numbers were sent
            return list(numbers)

    heard, training = StopAtStepEdge(), SimpleNamespace(ranks=Two(0, 2, 0, 2))
    assert loop.Training._sync_stop(training, heard) is False
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        loop.Training._sync_stop(training, heard)


@pytest.mark.full
def test_a_run_goes_on_with_the_same_bits_or_another_number_of_ranks(alone, tmp_path):
    """Three of them: of two summands no order can be told."""
    options = OPTIONS | {"checkpoint_steps": 1, "output": str(tmp_path)}
    code, _, err = ended(launch(3, *words_of(options | {"name": "whole"})))
    assert code == 0, err
    process = launch(3, *words_of(options | {"name": "broken"}))
    wait_for(tmp_path / "broken" / "last.pt", process)  # then the first epoch trains
    press_ctrl_c(process)
    code, _, err = ended(process, 60)
    assert code != 0
    assert "fastcnn (rank 0): stopped by SIGINT" in err
    assert 1 <= checkpoint.load(tmp_path / "broken" / "last.pt")["step"] < 10, err
    shutil.copytree(tmp_path / "broken", tmp_path / "fewer")
    code, _, err = ended(launch(3, "--resume", str(tmp_path / "broken")))
    assert code == 0, err
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "broken"))
    resume(tmp_path / "fewer")
    assert_close_runs(tmp_path / "fewer", alone)


def apart(port, rank, world, *words, **environment):
    """Start one process of several as torchrun would on a machine of its own."""
    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
    place |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    env = dict(os.environ) | {name: str(value) for name, value in place.items()} | environment
    command = [sys.executable, "-m", "fastcnn", "train", *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def free_port():
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


@pytest.mark.full
def test_ranks_with_other_options_or_images_are_refused(tmp_path):
    port = free_port()
    own = [{}, {"lr": 0.02, "test_subset": 36}]
    options = OPTIONS | {"output": str(tmp_path), "name": "run"}
    processes = [apart(port, r, 2, *words_of(options | own[r])) for r in range(2)]
    for rank, process in enumerate(processes):
        code, _, err = ended(process)
        assert code == 2, err
        line = (
            rf"fastcnn \(rank {rank}\): the ranks differ: --test-subset: 37 on rank 0, 36 on rank "
            r"1; --lr: 0.01 on rank 0, 0.02 on rank 1; images: .*; start all of them alike"
        )
        assert re.search(line, err), err
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_ranks_that_differ_in_amp_do_not_wait_for_each_other(tmp_path):
    port = free_port()
    options = OPTIONS | {"output": str(tmp_path)}
    words = [words_of(options | {"amp": not rank}) for rank in range(2)]
    for process in [apart(port, rank, 2, *words[rank]) for rank in range(2)]:
        code, _, err = ended(process)
        assert code == 2, err
        assert "the ranks differ: --amp: True on rank 0, False on rank 1; start" in err


@pytest.mark.full
def test_all_ranks_train_in_the_format_that_the_first_has_measured(tmp_path, monkeypatch):
    """Each has a cache of its own, as on machines of their own, and these say otherwise."""
    monkeypatch.setattr(amp, "cpu_computes_in", lambda dtype: True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    key = amp._key("torch", "auto")
    torch.set_num_threads(threads)
    for rank, bf16 in enumerate((2.0, 0.5)):
        path = plan_cache.file_of(tmp_path / f"cache{rank}", key)
        plan_cache.add(path, key, {amp.ENTRY: {"fp32": 1.0, "bf16": bf16}})
    port, options = free_port(), OPTIONS | {"output": str(tmp_path), "name": "run", "epochs": 1}
    words = words_of(options | {"amp": True})
    processes = [
        apart(port, rank, 2, *words, FASTCNN_CACHE=str(tmp_path / f"cache{rank}"))
        for rank in range(2)
    ]
    told = []
    for process in processes:
        code, _, err = ended(process)
        assert code == 0, err
        told.append(err.count("--amp: bf16 is 0.50x as fast as fp32 on this CPU; training in fp32"))
    assert told == [1, 0]
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["amp_dtype"] == "fp32"


def test_other_commands_are_for_one_process(tmp_path, monkeypatch, capsys):
    from fastcnn.cli import main

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["archs"]) == 2
    line = "fastcnn (rank 1): archs is for one process; torchrun is for fastcnn train\n"
    assert capsys.readouterr().err == line


def test_a_torchrun_environment_that_is_none_is_refused(monkeypatch):
    assert distributed.launched() is ALONE
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="not as torchrun does"):
        distributed.launched()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.launched() == Distributed(0, 2, 0, 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.launched() is ALONE


def test_a_batch_is_shared_evenly_or_not_at_all():
    three = Distributed(1, 3, 1, 3)
    assert setup.part_of_batch(24, three) == 8
    with pytest.raises(UsageError, match="take a multiple of 3, such as 24"):
        setup.part_of_batch(26, three)
    with pytest.raises(UsageError, match=r"such as 3$"):
        setup.part_of_batch(2, three)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert setup.device_of("auto", Distributed(3, 4, 1, 2)) == "cuda:1"
    assert setup.device_of("cpu", Distributed(3, 4, 1, 2)) == "cpu"
    assert setup.device_of("cuda:0", ALONE) == "cuda:0"
    with pytest.raises(UsageError, match="torchrun gives each process its own GPU"):
        setup.device_of("cuda:0", Distributed(0, 2, 0, 2))
    with pytest.raises(UsageError, match="there are 2 GPUs here"):
        setup.device_of("auto", Distributed(3, 4, 3, 4))


@settings(deadline=None)  # of a machine that does other things too
@given(
    total=st.integers(1, 60),
    world=st.integers(1, 4),
    part=st.integers(1, 5),
    drop_last=st.booleans(),
)
def test_the_weights_of_the_ranks_count_every_image_alike(total, world, part, drop_last):
    if total < (part * world if drop_last else world):
        return
    shards = [
        loader_of(numbered(total), "resident", batch=part, drop_last=drop_last, rank=r, world=world)
        for r in range(world)
    ]
    steps = [shard.remaining() for shard in shards]
    assert {shard.common_batches for shard in shards} == {min(map(len, shards))}
    rest = total % (part * world)
    if drop_last or not 0 < rest < world:  # too few for all: the run drops them
        assert len({len(sizes) for sizes in steps}) == 1
        assert all(len(shard) == len(sizes) for shard, sizes in zip(shards, steps, strict=True))
        last = [sizes[-1] for sizes in steps]
        shares = [
            shard.last_weight / (world * count) for shard, count in zip(shards, last, strict=True)
        ]
        assert shares == pytest.approx([1 / sum(last)] * world)


@pytest.mark.parametrize(
    ("arch", "samples", "batch_size", "world", "dropped"),
    [
        ("cnn-a", 50, 24, 2, False),
        ("cnn-a", 49, 24, 2, True),
        ("vgg11", 51, 24, 2, True),
        ("vgg11", 52, 24, 2, False),
        ("vgg11", 49, 24, 1, True),
        ("vgg11", 48, 24, 4, False),
    ],
)
def test_a_last_batch_that_is_too_small_for_all_is_dropped(
    arch, samples, batch_size, world, dropped
):
    from fastcnn.archs import get_network

    config = Config.from_flat({"arch": arch, "batch_size": batch_size})
    notes: list[str] = []
    found = setup.drops_last(
        samples, get_network(arch), config, notes, Distributed(0, world, 0, world)
    )
    assert found is dropped
    assert len(notes) == dropped


def test_ranks_that_would_have_too_few_images_are_refused():
    from fastcnn.archs import get_network

    config = Config.from_flat({"arch": "vgg11", "batch_size": 4})
    with pytest.raises(UsageError, match="4 processes need at least 8 images a batch"):
        setup.drops_last(100, get_network("vgg11"), config, [], Distributed(0, 4, 0, 4))


def test_the_run_is_that_of_one_process_in_its_files(alone):
    """So that the rank count stays out of what a resumed run is compared with."""
    saved = yaml.safe_load((alone / "config.yaml").read_text())
    assert not [name for name in saved if "rank" in name or "world" in name]


# batch norm and no dropout; every image of the last, uneven batch counts
NORMS = OPTIONS | {
    "arch": "murgolo-no-dropout",
    "train_subset": 57,
    "epochs": 1,
    "precise_bn": "on",
}


@pytest.mark.full
def test_with_synchronised_norms_two_processes_train_as_one(tmp_path, torchs_convolutions, library):
    # alone a timing might choose other convolutions, which round otherwise
    options = NORMS | {"backend": "fused", "conv": "vendor"}
    wanted = start(tmp_path, "alone", **options).folder.path
    options |= {"sync_norm": True}
    words = words_of(options | {"output": str(tmp_path), "name": "run"})
    code, _, err = ended(launch(2, *words))
    assert code == 0, err
    assert_close_runs(tmp_path / "run", wanted)


def trained_in_parts(config, world):
    """The weights that `world` processes come to without --sync-norm, by one process: each part
    of a batch goes through the network by itself, and the statistics are those of the first, or
    with --precise-bn the means of those that each takes."""
    setups = [setup.prepare(config, Distributed(r, world, r, world)) for r in range(world)]
    whole = loop.new_step(dataclasses.replace(setups[0], ranks=ALONE))
    model, statistics = whole.network.train(), whole.guard.statistics
    none = torch.zeros(())
    for parts in zip(*(one.train_loader for one in setups), strict=True):
        whole._prepare()
        gradients, images = [], sum(len(labels) for _, labels in parts)
        for rank, (x, labels) in enumerate(parts):
            before = statistics.clone()
            loss = F.cross_entropy(model(x), labels, label_smoothing=config.optim.label_smoothing)
            own = torch.autograd.grad(loss * len(labels) / images, whole.optimizer.leaves)
            gradients.append(own)
            if rank:
                statistics.copy_(before)
        rates = whole._table[whole.step % whole.steps_per_epoch][:2]
        total = [sum(each) for each in zip(*gradients, strict=True)]
        whole.optimizer.step(total, rates, None, none)
        whole.step += 1
    if config.optim.precise_bn == "on":
        found = []
        for one in setups:
            loader = one.train_loader
            PreciseBatchNorm(whole.model)(loader.ahead(batches_of(loader)))
            found.append(statistics.clone())
        statistics.copy_(torch.stack(found).mean(0))
    return whole.model.state_dict()


@pytest.mark.full
@pytest.mark.parametrize("mode", ["on", "off"])
def test_without_them_each_process_norms_its_own_part(tmp_path, mode):
    own = NORMS | {"precise_bn": mode}
    options = own | {"output": str(tmp_path), "name": "run"}
    code, _, err = ended(launch(2, *words_of(options)))
    assert code == 0, err
    found = checkpoint.load(tmp_path / "run" / "last.pt")["model"]
    for name, tensor in trained_in_parts(resolve(own), 2).items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    # both have evaluated with the statistics that are saved
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    alone = evaluate_run(str(tmp_path / "run"))
    assert summary["test_loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_synchronised_norms_are_for_several_processes_and_no_fused_convolution(library):
    from fastcnn.archs import get_network
    from fastcnn.archs.build import build

    model = build(get_network("murgolo-no-dropout"), 32, 10)
    notes: list[str] = []
    config = Config.from_flat({"arch": "murgolo-no-dropout", "conv": "fused", "sync_norm": True})
    setup.synchronise_norms(model, config, ALONE, notes)
    assert notes == ["--sync-norm: changes nothing in one process; torchrun starts several"]
    with pytest.raises(UsageError, match="--conv fused: not with --sync-norm"):
        setup.synchronise_norms(model, config, Distributed(0, 2, 0, 2), notes)


SCRIPT = """
import sys
import fastcnn

for name in ("one", "two"):
    model = fastcnn.train(sys.argv[1], output=sys.argv[2], name=name, quiet=True)
    print(model.summary["images"], model.folder.name, flush=True)
"""


def test_an_exchange_waits_until_its_threads_have_let_go():
    """A thread lets go of the object in Python last, and needs the lock of Python for it."""
    tensor, held = torch.ones(1), []
    before = sys.getrefcount(tensor)
    with distributed.released(tensor):
        held.append(tensor)
        threading.Timer(0.2, held.clear).start()
    assert sys.getrefcount(tensor) == before


@pytest.mark.full
def test_a_script_trains_one_run_after_the_other(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    options = OPTIONS | {"arch": "murgolo-no-dropout", "epochs": 1, "train_subset": 48}
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += [str(tmp_path / "script.py"), str(tmp_path / "options.yaml"), str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = sorted(done.stdout.splitlines())
    assert lines == sorted(
        f"{{'train': 48, 'test': 37}} {name}" for name in ("one", "two") for _ in range(2)
    )
