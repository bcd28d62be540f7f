"""`--amp` on a CPU: bf16 or fp32 by a measurement, which is given here but for one test."""

import logging
import threading
import time

import pytest
import torch
import yaml
from small_runs import SMALL, assert_same, final_state, resume, start, stop_at_check

from fastcnn import ops
from fastcnn.config import PlaceConfig
from fastcnn.errors import UsageError
from fastcnn.ops.conv_autotune import plan_cache
from fastcnn.recipes import resolve
from fastcnn.train import run
from fastcnn.train.distributed import ALONE, Distributed
from fastcnn.train.interrupt import Interrupted
from fastcnn.train.numerics import amp
from fastcnn.train.numerics.amp import Times
from fastcnn.train.setup import prepare

CPU = torch.device("cpu")
SLOWER, FASTER = Times(0.8, 1.0), Times(1.0, 0.5)
DISTURBED = Times(0.8, 1.0, steady=False)
TORCH = {"backend": "torch"}  # needs no library


class Timing:
    """What a step is timed with: answers with `times`, and counts."""

    def __init__(self, times=FASTER):
        self.times, self.backends = times, []

    def __call__(self, backend):
        self.backends.append(backend)
        return self.times


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache folder, on a CPU that has the instructions."""
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(amp, "cpu_computes_in", lambda dtype: True)
    return tmp_path / "cache"


def decided(timing, device=CPU, ranks=ALONE, **options):
    config, note = amp.decided(resolve(TORCH | options), device, ranks, timing)
    return config.run.amp_dtype, note


FUSED = "--amp: --conv fused computes in fp32 on a CPU; training in fp32"
NO_TIMING = "--amp: with --deterministic no timing may choose its format; training in fp32"
WORST = " in the worst of several timings, which other work disturbed;"
RATIO = "--amp: bf16 is {}x as fast as fp32 on this CPU; training in {}"


@pytest.mark.parametrize(
    ("times", "options", "dtype", "note"),
    [
        (FASTER, {}, "bf16", RATIO.format("2.00", "bf16")),
        (SLOWER, {}, "fp32", RATIO.format("0.80", "fp32")),
        # by no more than noise
        (Times(1.0, 0.98), {}, "fp32", RATIO.format("1.02", "fp32")),
        (Times(1.0, 0.96), {}, "bf16", RATIO.format("1.04", "bf16")),
        (DISTURBED, {}, "fp32", RATIO.format("0.80", "fp32").replace(";", WORST)),
        (None, {"amp": False}, "auto", ""),
        (None, {"amp_dtype": "bf16"}, "bf16", ""),
        (None, {"amp_dtype": "fp16"}, "fp16", ""),
        (None, {"amp_dtype": "fp32"}, "fp32", ""),
        (None, {"amp_dtype": "bf16", "deterministic": True}, "bf16", ""),
        (None, {"conv": "fused"}, "fp32", FUSED),
        (None, {"deterministic": True}, "fp32", f"{NO_TIMING} (or name one: --amp-dtype bf16)"),
    ],
)
def test_the_faster_is_taken_where_none_is_named(times, options, dtype, note):
    timing = Timing(times)
    assert decided(timing, **{"amp": True, **options}) == (dtype, note)
    assert timing.backends == (["torch"] if times else [])


def test_nothing_is_timed_where_the_hardware_decides(monkeypatch):
    timing = Timing()
    assert decided(timing, torch.device("cuda"), amp=True) == ("bf16", "")
    monkeypatch.setattr(amp, "cpu_computes_in", lambda dtype: False)
    told = "--amp: this CPU has no bf16 instructions; training runs in fp32"
    assert decided(timing, amp=True) == ("fp32", told)
    assert timing.backends == []


def test_the_first_rank_decides_for_all():
    class Second(Distributed):
        def all_gather_object(self, value):
            return [["fp32", "told"], value]

    timing = Timing()
    assert decided(timing, ranks=Second(1, 2, 1, 2), amp=True) == ("fp32", "told")
    assert timing.backends == []


# the cache


def test_a_machine_is_measured_once(cache):
    timing = Timing(SLOWER)
    first = decided(timing, amp=True)
    assert decided(Timing(FASTER), amp=True) == first
    assert timing.backends == ["torch"]


def test_what_other_work_disturbed_is_not_kept():
    decided(Timing(DISTURBED), amp=True)
    timing = Timing(FASTER)
    assert decided(timing, amp=True)[0] == "bf16"
    assert timing.backends == ["torch"]


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (amp, "cpu_name", lambda: "another"),
        (torch, "get_num_threads", lambda: 77),
        (torch, "__version__", "9.9"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "another"),
        (torch.cpu, "_is_amx_tile_supported", lambda: "another"),
    ],
)
def test_what_the_times_depend_on_is_measured_for_itself(monkeypatch, place, name, value):
    decided(Timing(SLOWER), amp=True)
    monkeypatch.setattr(place, name, value)
    timing = Timing(FASTER)
    assert decided(timing, amp=True)[0] == "bf16"
    assert timing.backends == ["torch"]


def test_each_backend_and_rule_of_convolutions_is_measured_for_itself(monkeypatch):
    monkeypatch.setattr(amp, "choose_backend", lambda backend, *_: (backend, ""))
    monkeypatch.setattr(amp, "choose_convolution", lambda *_: None)
    built = type("Built", (), {"path": amp.Path("folder/library.so")})
    monkeypatch.setattr(amp, "load", lambda: built)
    timing = Timing()
    for options in (TORCH, {"conv": "vendor"}, {"backend": "fused"}):
        decided(timing, amp=True, **options)
    built.path = amp.Path("other/library.so")
    decided(timing, amp=True, backend="fused")
    assert timing.backends == ["torch", "torch", "fused", "fused"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"layers": {}}',
        '{"layers": {"training step": 1}}',
        '{"layers": {"training step": {"fp32": 1.0}}}',
        '{"layers": {"training step": {"fp32": 1.0, "bf16": 0.0}}}',
        '{"layers": {"training step": {"fp32": "1", "bf16": 2.0}}}',
        '{"layers": {"training step": {"fp32": NaN, "bf16": 2.0}}}',
    ],
)
def test_a_damaged_file_is_measured_anew(cache, text):
    decided(Timing(SLOWER), amp=True)
    [path] = (cache / "plans").glob("*.json")
    path.write_text(text)
    assert decided(Timing(FASTER), amp=True)[0] == "bf16"
    assert plan_cache.read(path) == {amp.ENTRY: {"fp32": 1.0, "bf16": 0.5}}


def test_a_damaged_file_is_warned_of_once(cache, caplog):
    decided(Timing(SLOWER), amp=True)
    [path] = (cache / "plans").glob("*.json")
    path.write_text("[]")
    decided(Timing(FASTER), amp=True)
    told = f"measurements of this machine: {path} is damaged (no layers); they are made again"
    assert [record.getMessage() for record in caplog.records] == [told]


def test_a_folder_that_cannot_be_written_costs_the_measurement_alone(cache, caplog):
    cache.mkdir()
    (cache / "plans").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert decided(Timing(SLOWER), amp=True)[0] == "fp32"
    assert "cannot be written" in caplog.text
    timing = Timing(FASTER)
    assert decided(timing, amp=True)[0] == "bf16"
    assert timing.backends == ["torch"]


def test_without_any_cache_folder_each_run_measures(cache, monkeypatch, caplog):
    cache.write_text("a file")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc")
    with caplog.at_level(logging.WARNING):
        assert decided(Timing(FASTER), amp=True)[0] == "bf16"
    assert "; --amp is measured in each run" in caplog.text


def test_runs_that_begin_together_measure_once():
    measured = []

    def measure():
        time.sleep(0.3)
        measured.append(len(measured))
        return Times(1.0, 1.0 + len(measured))

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(amp.known_or_measured({"a": 1}, measure)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measured == [0]
    assert found == [Times(1.0, 2.0)] * 3


def test_a_format_without_amp_is_told_to_do_nothing():
    options = TORCH | {"data": "digits", "arch": "cnn-a", "train_subset": 64, "device": "cpu"}
    notes = prepare(resolve(options | {"amp_dtype": "bf16"})).notes
    assert notes == ["--amp-dtype bf16: changes nothing without --amp"]
    assert prepare(resolve(options)).notes == []


# runs


@pytest.fixture
def slow_bf16(monkeypatch):
    timing = Timing(SLOWER)
    monkeypatch.setattr(amp, "step_times", timing)
    return timing


def options_in(folder):
    return yaml.safe_load((folder / "config.yaml").read_text())


def test_a_run_says_what_it_took_and_its_configuration_repeats_it(tmp_path, slow_bf16, capfd):
    place = PlaceConfig(output=str(tmp_path), name="first")
    outcome = run.start(resolve(SMALL | TORCH | {"amp": True}), place, ["test"])
    line = "note: --amp: bf16 is 0.80x as fast as fp32 on this CPU; training in fp32\n"
    assert capfd.readouterr().err.count(line) == 1
    assert outcome.summary["precision"] == "fp32"
    written = options_in(outcome.folder.path)
    assert (written["amp"], written["amp_dtype"]) == (True, "fp32")
    slow_bf16.times = FASTER
    again = run.start(resolve(written), PlaceConfig(output=str(tmp_path)), ["test"], quiet=True)
    assert slow_bf16.backends == ["torch"]
    assert_same(final_state(again.folder.path), final_state(outcome.folder.path))
    # and so does who evaluates it
    found = run.evaluate_run(str(outcome.folder.path), overrides=TORCH | {"threads": 1})
    assert found["precision"] == "fp32"
    assert found["top1"] == outcome.summary["test_top1"]


def test_a_resumed_run_goes_on_in_its_format(tmp_path, slow_bf16, monkeypatch, cache):
    options = TORCH | {"amp": True}
    whole = start(tmp_path, "whole", **options).folder.path
    with monkeypatch.context() as patch:
        stop_at_check(patch, 2)
        with pytest.raises(Interrupted):
            start(tmp_path, "broken", **options)
    for path in (cache / "plans").iterdir():
        path.unlink()
    slow_bf16.times = FASTER
    # the same command again, as whoever lost a rank is told to
    assert resume(tmp_path / "broken", amp=True, amp_dtype="auto").summary["precision"] == "fp32"
    assert slow_bf16.backends == ["torch"]
    assert_same(final_state(tmp_path / "broken"), final_state(whole))
    assert options_in(tmp_path / "broken")["amp_dtype"] == "fp32"
    with pytest.raises(UsageError, match="amp_dtype: fp32 → bf16"):
        resume(tmp_path / "broken", amp_dtype="bf16")


# the measurement itself


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(amp, "BATCH", 4)
    monkeypatch.setattr(amp, "BUDGET_S", 0.0)


@pytest.mark.parametrize("backend", ["fused", "torch"])
def test_a_step_computes_with_the_layers_of_training(library, few, monkeypatch, backend):
    seen = []
    place = ops if backend == "fused" else ops.reference
    original = place.conv_bn_act

    def spy(x, *rest, **more):
        values = getattr(x, "x", x)  # of a pending input
        seen.append((values.dtype, values.requires_grad or values.shape[1] == 3))
        return original(x, *rest, **more)

    monkeypatch.setattr(place, "conv_bn_act", spy)
    before = torch.get_rng_state()
    found = amp.step_times(backend)
    assert min(found.fp32, found.bf16) > 0
    layers = [(torch.float32, True)] * 4, [(torch.bfloat16, True)] * 4
    # each once before it counts
    assert seen == [*layers[0], *layers[1]] * (1 + amp.FEWEST)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("fp32", "bf16", "found"),
    [
        ([5.0, 4.0, 9.0], [3.0, 1.0, 2.0], Times(5.0, 3.0)),
        ([5.0, 4.0, 9.0], [6.0, 5.0, 9.0], Times(4.0, 5.0)),
        ([5.0, 4.0, 9.0], [3.0, 4.0, 2.0], Times(4.0, 4.0, steady=False)),
    ],
)
def test_bf16_must_win_every_round(few, monkeypatch, fp32, bf16, found):
    seconds = {None: iter(fp32), torch.bfloat16: iter(bf16)}
    monkeypatch.setattr(amp, "_step", lambda model, dtype, *_: lambda: dtype)
    monkeypatch.setattr(amp, "_seconds", lambda step: next(seconds[step()]))
    assert amp.step_times("torch") == found
