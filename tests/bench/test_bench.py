"""`fastcnn bench`: options, interleaved rounds, rows, tables, charts, files, each mode once."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastcnn.archs import get_network
from fastcnn.bench import accuracy, data_rate, plot, run, table, throughput
from fastcnn.bench import options as bench_options
from fastcnn.bench.kernels import layers
from fastcnn.bench.kernels.cases import layers_of
from fastcnn.bench.options import settings_of
from fastcnn.bench.rivals.variants import Task
from fastcnn.bench.worker import Worker
from fastcnn.cli import main, parse
from fastcnn.data.choose import has_dali
from fastcnn.errors import BuildError, FastcnnError, UsageError
from fastcnn.ops import conv_autotune
from fastcnn.recipes import resolve

SMALL = ["--arch", "cnn-a", "--batch-size", "4", "--threads", "1", "--device", "cpu"]
NONE = "no kernels: this device"
LIMITS = {"copy_bytes_per_s": 4.3e12, "flop_per_s": 790e12}


def command(capsys, *words):
    code = main(["bench", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# options


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--backends eager fusd", "--backends: 'fusd' is not one of eager-fp32, eager, "),
        ("--backends eager fusd", "did you mean 'fused'?"),
        ("--backends", "--backends: expected one or more names"),
        ("--backends eager eager", "--backends: eager is given twice"),
        ("--arch cnn-a vgg61", "unknown architecture 'vgg61'; did you mean 'vgg16'?"),
        ("--arch cnn-a+nrm", "unknown architecture 'cnn-a+nrm'; did you mean"),
        ("--loader residnt", "did you mean 'resident'?"),
        ("--batch-size 0", "--batch-size: expected whole numbers from 1 up"),
        ("--rounds 6", "--rounds: must be at least 7"),
        ("--backnds eager", "unknown option --backnds; did you mean '--backends'?"),
        ("--layers --data-only", "--layers: leave out --data-only with it"),
        ("--lr 0.1", "--lr: goes with --time-to-accuracy alone"),
        ("--seeds 2", "--seeds: goes with --time-to-accuracy alone"),
        ("--time-to-accuracy 0.9 --rounds 9", "--rounds: means nothing to --time-to-accuracy"),
        ("--time-to-accuracy 94", "--time-to-accuracy: must be at most 1"),
        ("--layers --backends fused", "--backends fused: --layers takes eager compile"),
        ("--data-only --backends fused", "--backends: means nothing to --data-only"),
        ("--layers --loader torch", "--loader: means nothing to --layers"),
        ("--data-only --plot x.png", "--plot: there is no chart of --data-only"),
        ("--json .", "--json .: expected a file that can be written"),
        ("--plot /proc/none/x.png", "--plot /proc/none/x.png: no such folder: No such file or"),
        ("--time-to-accuracy 0.9 --fast-dev-run", "--fast-dev-run: means nothing to --time-to-"),
        ("--time-to-accuracy 0.9 --loggers wandb", "--loggers: means nothing to --time-to-"),
        ("--time-to-accuracy 0.9 --restore-best", "--restore-best: means nothing to --time-to-"),
        ("--device cpux", "--device: 'cpux' is not one of"),
    ],
)
def test_an_error_is_one_line(capsys, tmp_path, monkeypatch, words, expected):
    monkeypatch.chdir(tmp_path)
    code, out, err = command(capsys, *words.split())
    assert (code, out) == (2, "")
    assert err.startswith("fastcnn: ")
    assert err.count("\n") == 1
    assert expected in err
    assert list(tmp_path.iterdir()) == []


def test_help_shows_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = capsys.readouterr().out
    for option in [*bench_options.own_options(), *bench_options.train_options()]:
        assert option.flag in text
    assert "--batch-size [N ...]" in text
    assert "--arch [NAME ...]" in text
    assert "max-autotune" in text


def test_options_are_read_once_as_text_or_values():
    found = settings_of({"arch": ["cnn-a"], "batch_size": ["8", "16"], "threads": "1", "amp": True})
    assert found.own.batch_size == [8, 16]
    assert found.own.amp is True
    assert found.config.run.threads == 1
    assert settings_of({}).own.arch == ["vgg16", "cnn-a+norm"]


def tasks_of(monkeypatch, **given):
    monkeypatch.setattr(run.ops, "load", lambda: type("Built", (), {"sources": "s"}))
    return list(run.Run(settings_of({"device": "cpu", **given}), ["bench"]).tasks())


def test_tasks_are_every_network_batch_and_loader(monkeypatch):
    words = {"arch": ["cnn-a", "cnn-b"], "batch_size": ["4", "8"], "loader": ["resident", "torch"]}
    words |= {"workers": "3", "seed": "5", "threads": "1", "amp_dtype": "bf16"}
    found = tasks_of(monkeypatch, **words)
    assert [str(task) for task in found] == [
        f"{name} batch {batch} {loader}"
        for name in ("cnn-a", "cnn-b")
        for batch in (4, 8)
        for loader in ("resident", "torch")
    ]
    assert {(t.workers, t.seed, t.threads, t.half) for t in found} == {(3, 5, 1, "fp32")}
    assert all(t.images % t.batch == 0 and t.images >= 4 * t.batch for t in found)
    assert found[0].backends == bench_options.CPU_BACKENDS


def test_backends_and_defaults_of_a_device(monkeypatch):
    named = tasks_of(monkeypatch, backends=["fused", "graph"], threads="1")
    assert {task.backends for task in named} == {("fused", "graph")}
    assert [task.batch for task in named] == [256, 64] * 2
    assert bench_options.CUDA_BACKENDS[-1] == "graph"
    all_of_them = {*bench_options.CUDA_BACKENDS, *bench_options.ENGINES}
    assert all_of_them == set(bench_options.own_options()[1].choices)


def test_fused_convolutions_are_refused_where_there_are_none(
    library, capsys, tmp_path, monkeypatch
):
    monkeypatch.setattr(conv_autotune, "why_vendor", lambda *_: NONE)
    path = tmp_path / "bench.json"
    code, out, err = command(capsys, *SMALL, "--conv", "fused", "--json", str(path))
    assert (code, out) == (BuildError.exit_code, "")
    assert err == f"fastcnn: --conv fused: {NONE}; use --conv auto\n"
    assert not path.exists()


@pytest.mark.parametrize("rule", conv_autotune.MODES)
def test_the_rule_of_convolutions_is_the_one_that_is_measured_under(library, monkeypatch, rule):
    monkeypatch.setattr(conv_autotune, "_mode", "vendor" if rule == "auto" else "auto")
    monkeypatch.setattr(conv_autotune, "why_vendor", lambda *_: "")
    met = []

    def compare(run, mode, limits):
        met.append((mode, conv_autotune.mode()))
        run.set(rows=[], left_out=["all"])

    monkeypatch.setattr(run, "compare", compare)
    for words in (SMALL, [*SMALL, "--inference"]):
        given = parse(["bench", *words, "--conv", rule])[1]
        assert run.measure(settings_of(given), ["bench"])["conv"] == rule
    assert met == [("throughput", rule), ("inference", rule)]


def test_shown_commands_hold_no_paths():
    words = ["fastcnn", "bench", "--json", "/a/b.json", "--plot=/c.png", "--data", "/d/images"]
    assert run.shown_command([*words, "--seeds=2"]) == "fastcnn bench --data images --seeds=2"


# rounds and rows


class FakeProcess:
    def __init__(self, name, variants, told):
        self.name, self.variants, self.told = name, variants, told

    def time(self, variant):
        self.told.append((self.name, variant))
        return float(len(self.told))


def test_variants_of_all_processes_take_turns():
    told = []
    processes = {n: FakeProcess(n, ["eager", "fused"], told) for n in ("plain", "tuned")}
    seconds = throughput.in_turn(processes, 7)
    turn = [(n, v) for n in ("plain", "tuned") for v in ("eager", "fused")]
    assert told == turn * (throughput.WARM_UP_ROUNDS + 7)
    # the warm-up is left out
    assert seconds["plain", "eager"] == [9.0 + 4 * i for i in range(7)]


def cpu_row(backend="fused"):
    seconds = {("plain", "eager"): [8.0, 8.0], ("tuned", "eager"): [4.0, 4.0]}
    seconds |= {("plain", "fused"): [4.0, 4.0], ("tuned", "fused"): [2.0, 1.0]}
    task = Task("cnn-a", 4, "resident", ("eager", "fused"))
    return throughput.row_of(task, backend, seconds, {"kept_bytes": 2**20}, {})


def gpu_row(backend, step_s, share=True):
    task = Task("vgg16", 1024, "resident", ("eager", "graph"), "cuda", "bf16")
    seconds = {(throughput.ONE, "eager"): [0.02] * 7, (throughput.ONE, backend): [step_s] * 7}
    facts = {"set_up_s": 1.0, "peak_bytes": 3 * 2**20, "launches": 12.0, "kernels": 90.0}
    return throughput.row_of(task, backend, seconds, facts, LIMITS if share else {})


def test_rows_of_a_cpu_are_ratios_of_each_pair_of_processes():
    row = cpu_row()
    found = {words: r["median"] for words, r in row["times_as_fast_as"]["eager"].items()}
    assert found == {"both plain": 2.0, "both tuned": 2.667, "as a user runs it": 5.333}
    text = json.dumps(row)
    assert not any(word in text for word in ("ms_per", "images_per_s", '_s"', "roofline"))
    assert row["n"] == 2
    assert cpu_row("eager")["times_as_fast_as"] == {}


def test_rows_of_a_gpu_have_rates_and_shares():
    row = gpu_row("graph", 0.005)
    assert row["images_per_s"] == {"median": 204800.0, "min": 204800.0, "max": 204800.0}
    assert row["ms_per_step"]["median"] == 5.0
    assert row["times_as_fast_as"]["eager"][throughput.ONE]["median"] == 4.0
    assert row["roofline_share"]["K5"] == pytest.approx(204800 / 327.8e3, rel=1e-3)
    assert row["roofline_share"]["eager"] == pytest.approx(204800 / 199.9e3, rel=1e-3)
    assert "roofline_share" not in gpu_row("eager-fp32", 0.1)


def content_of(rows, gpu=None, **more):
    machine = {"cpu": "a CPU", "gpu": gpu, "driver": "1.2"}
    content = {"machine": machine, "torch": "2", "cuda": "13", "cudnn": 9, "commit": "c"}
    content |= {"date": "d", "threads": 2, "precision": "bf16", "mode": "throughput", "rounds": 7}
    return content | {"rows": rows, "left_out": ["cnn-c batch 4"]} | more


WHY = {"network": "vgg16", "batch": 1024, "loader": "resident", "backend": "compile"}
WHY |= {"why": "OutOfMemoryError: of [GPU] memory"}


def test_table_of_a_gpu(capsys):
    rows = [gpu_row("eager", 0.02), gpu_row("graph", 0.005), WHY]
    limits = {"copy_bytes_per_s": 4.3e12, "flop_per_s": 790e12}
    table.print_report(content_of(rows, "a GPU", limits=limits))
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("a GPU, driver 1.2, torch 2, CUDA 13, cuDNN 9, commit c, d, bf16")
    assert lines[1] == "device: copy 4.30 TB/s (read + write), matrix product 790 TFLOP/s"
    assert lines[2].endswith("images/s ms/step peak MiB launches of K5 x eager")
    graph = "vgg16 resident graph 1024 204,800 (204,800 to 204,800) 5.000 3 12 62%"
    assert lines[4] == f"{graph} 4.00 (4.00 to 4.00)"
    assert lines[-3] == "medians of 7 interleaved rounds (extremes of single rounds)"
    assert lines[-2].startswith("not timed: vgg16 batch 1024 resident compile: OutOfMemoryError:")
    assert lines[-2].endswith("of [GPU] memory")
    assert lines[-1] == "left out, no time left: cnn-c batch 4"


def test_table_of_a_cpu(capsys):
    table.print_report(content_of([cpu_row("eager"), cpu_row()]))
    out = capsys.readouterr().out
    assert "5.33 (4.00 to 8.00)" in out
    assert "images/s" not in out
    assert [line.split()[2] for line in out.splitlines()[2:4]] == ["eager", "fused"]


def test_rivals_are_told_against_eager_alone():
    row = {"backend": "compile", "times_as_fast_as": {"eager": 1, "max-autotune": 2}}
    assert table.told_ratios(row) == {"eager": 1}
    assert table.told_ratios(row | {"backend": "fused"}) == row["times_as_fast_as"]


# the chart


def test_the_chart_has_a_bar_a_backend(tmp_path):
    rows = [gpu_row("eager", 0.02), gpu_row("graph", 0.005), WHY]
    panels = plot.panels_of(content_of(rows, "a GPU"))
    assert {t: {b: f["median"] for b, f in bars.items()} for t, bars in panels.items()} == {
        "vgg16, batch 1024, loader resident": {"eager": 51200.0, "graph": 204800.0}
    }
    path = plot.draw(content_of(rows, "a GPU"), tmp_path / "new" / "bars.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_chart_of_a_cpu_shows_ratios(tmp_path):
    panels = plot.panels_of(content_of([cpu_row("eager"), cpu_row()]))
    assert [bars["fused"]["median"] for bars in panels.values()] == [5.333]
    plot.draw(content_of([cpu_row()]), tmp_path / "bars.png")
    with pytest.raises(UsageError, match="nothing was measured"):
        plot.draw(content_of([WHY]), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


# whole runs


@pytest.mark.full
def test_a_worker_times_what_it_is_told(library):
    task = Task("cnn-a", 4, "resident", ("eager", "graph"), threads=1, images=16, check=False)
    with Worker("plain", task) as worker:
        assert worker.variants == ["eager"]
        assert "CUDA graph" in worker.wrong["graph"]
        assert worker.time("eager") > 0
        with pytest.raises(FastcnnError, match="ended with code 1"):
            worker.time("nothing")


@pytest.mark.full
def test_a_comparison_from_end_to_end(library, capsys, tmp_path):
    json_path, png = tmp_path / "new" / "out.json", tmp_path / "bars.png"
    words = [*SMALL, "--rounds", "7", "--json", str(json_path), "--plot", str(png)]
    code, out, err = command(capsys, *words, "--backends", "eager", "fused", "graph")
    assert code == 0
    assert "cnn-a batch 4 resident: eager, fused, graph" in err
    content = json.loads(json_path.read_text())
    assert content["library_sources"] == library.sources
    assert content["mode"] == "throughput"
    assert str(tmp_path) not in json_path.read_text()
    timed, why = content["rows"][:2], content["rows"][2]
    assert [row["backend"] for row in timed] == ["eager", "fused"]
    assert timed[1]["times_as_fast_as"]["eager"].keys() == set(throughput.PAIRS)
    assert timed[1]["n"] == 7
    assert "CUDA graph" in why["why"]
    assert "times as fast as" in out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_what_the_budget_does_not_reach_is_named(library, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(run.Run, "left_s", lambda self: 0.0)
    code, out, _ = command(capsys, *SMALL, "--json", str(tmp_path / "x.json"), "--budget", "1")
    assert code == 0
    assert "left out, no time left: cnn-a batch 4 resident" in out


@pytest.mark.full
def test_without_what_a_bare_machine_lacks(library, tmp_path):
    missing = ("jsonargparse", "yaml", "rich", "matplotlib", "sklearn", "jinja2", "torchvision")
    path = tmp_path / "x.json"
    words = [*SMALL, "--data-only", "--loader", "resident", "--rounds", "7", "--no-amp"]
    words += ["--quiet", "--json", str(path)]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing!r}))\n"
        f"from fastcnn.bench.__main__ import main; sys.exit(main({words!r}))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout == found.stderr == ""
    assert [row["loader"] for row in json.loads(path.read_text())["rows"]] == ["resident"]


def test_the_bare_command_has_the_same_errors(capsys):
    from fastcnn.bench.__main__ import main as bare

    assert bare(["--backends", "fusd"]) == 2
    assert "did you mean 'fused'?" in capsys.readouterr().err


# layers


def test_layers_have_the_shapes_of_their_products():
    found = {layer.name: layer for layer in layers_of(get_network("tiny-a"), 2)}
    assert found["conv1"].x == (2, 3, 65, 65)  # an even kernel's extra padding
    assert found["conv1"].y == (2, 32, 64, 64)
    flop = sum(layer.flop for layer in found.values())
    assert flop == 2 * sum(row.flop for row in _table("tiny-a"))
    for layer in found.values():
        tensors = layers._inputs(layer, torch.float32, torch.device("cpu"), 0)
        parts = layers.products_of(layer)
        assert parts["product"](*tensors).shape == layer.y
        dx, dw = parts["data gradient"](*tensors), parts["weight gradient"](*tensors)
        if len(layer.x) == 4:
            dx, dw = dx[0], dw[1]
        assert (tuple(dx.shape), tuple(dw.shape)) == (layer.x, layer.weight)


def _table(name):
    from fastcnn.archs.spec import layer_table

    network = get_network(name)
    return layer_table(network, network.image_sizes[0], network.classes)


@pytest.mark.full
def test_every_part_of_every_layer_is_told(library, capsys, tmp_path):
    words = [*SMALL, "--layers", "--rounds", "7", "--json", str(tmp_path / "x.json")]
    words += ["--backends", "eager"]
    code, out, _ = command(capsys, *words)
    assert code == 0
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    parts = {name: [r["part"] for r in rows if r["layer"] == name] for name in ("conv1", "fc2")}
    assert parts["conv1"] == [
        *("product", "weight gradient", "chain forward", "chain backward"),
        *("conv forward", "conv weight gradient"),
        *("layer forward", "layer backward", "inference"),
    ]
    assert parts["fc2"] == ["product", "data gradient", "weight gradient"]
    for backend in ("eager", "fused"):
        shares = [r["share_of_step"][backend] for r in rows if "share_of_step" in r]
        assert sum(shares) == pytest.approx(1, abs=0.01)
    assert "time_us" not in json.dumps(rows)
    assert "of fused's step" in out
    planned = [r for r in rows if "plan" in r]
    assert {r["layer"] for r in planned} == {"conv1", "conv2", "conv3", "conv4"}
    assert {r["plan_reason"] for r in planned} == {"measured"}


@pytest.mark.full
def test_without_fused_convolutions_products_tell_why(library, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(conv_autotune, "why_vendor", lambda *_: NONE)
    words = [*SMALL, "--layers", "--rounds", "7", "--json", str(tmp_path / "x.json")]
    code, out, _ = command(capsys, *words)
    assert code == 0
    planned = [r for r in json.loads((tmp_path / "x.json").read_text())["rows"] if "plan" in r]
    assert {r["layer"] for r in planned} == {"conv1", "conv2", "conv3", "conv4"}
    assert {r["part"] for r in planned} == set(layers.PRODUCTS)
    assert {r["plan_reason"] for r in planned} == {NONE}
    assert f"vendor ({NONE})" in out
    code, _, err = command(capsys, *SMALL, "--layers", "--backends", "eager")
    assert code == 2
    assert f"--backends: means nothing to --layers here ({NONE})" in err


def test_a_layers_floor_is_the_larger_of_its_two():
    layer = layers_of(get_network("cnn-a+norm"), 1024)[1]
    row = layers._figures(layer, "product", {"torch": [50e-6] * 7}, torch.bfloat16, LIMITS)
    found = row["variants"]["torch"]
    values = 1024 * 32 * 32 * 32 * 2 + 32 * 32 * 9
    assert row["bytes"] == 2 * values
    assert found["gb_per_s"] == pytest.approx(2 * values / 50e-6 / 1e9, abs=0.1)
    assert found["tflop_per_s"] == pytest.approx(1024 * 18.874368e6 / 50e-6 / 1e12, abs=0.01)
    assert found["floor_share"] == pytest.approx(2 * values / 4.3e12 / 50e-6, abs=1e-4)
    fused = {"eager": [2e-4] * 7, "fused": [1e-4] * 7}
    row = layers._figures(layer, "chain forward", fused, torch.bfloat16, LIMITS)
    assert row["times_as_fast_as"]["eager"]["median"] == 2.0
    assert row["flop"] == 0
    content = content_of([row | {"network": "n", "batch": 1, "layer": "l", "part": "p"}], "a GPU")
    heads, cells = table.cells_of(content | {"mode": "layers"})
    assert dict(zip(heads, cells[0], strict=True))["us fused"] == "100.0"


@pytest.mark.full
def test_a_refused_chain_is_named(library, monkeypatch):
    monkeypatch.setattr(layers, "check", lambda *_: {"fused": "y errs by 1"})
    monkeypatch.setattr(conv_autotune, "why_vendor", lambda *_: NONE)
    rows = layers.rows_of_network("cnn-a", 2, torch.float32, torch.device("cpu"), 7, {})
    refused = [row for row in rows if "why" in row]
    assert [row["layer"] for row in refused] == ["conv1", "conv2", "conv3", "conv4", "fc1"]
    told = [row for row in rows if "why" not in row]
    assert all(row["share_of_step"].keys() == {"eager"} for row in told)


# loaders


def test_what_the_step_consumes_is_without_its_loading():
    seconds = {"step": [5.0] * 7, "resident": [1.0] * 7, "torch": [8.0] * 7}
    task = Task("cnn-a", 4, "resident", ())
    assert data_rate.row_of(task, "resident", seconds)["times_as_fast_as"]["step"]["median"] == 4.0
    row = data_rate.row_of(task, "torch", seconds)
    assert row["times_as_fast_as"]["step"]["median"] == 0.5
    assert "images_per_s" not in row
    on_gpu = Task("cnn-a", 4, "resident", (), "cuda")
    row = data_rate.row_of(on_gpu, "torch", seconds)
    assert (row["images_per_s"]["median"], row["step_images_per_s"]["median"]) == (0.5, 1.0)
    _, cells = table.cells_of(content_of([row], "a GPU", mode="data-only"))
    assert cells[0][-1] == "0.50 (0.50 to 0.50)"


def test_loaders_are_measured_in_turn(library, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(data_rate, "TURN_S", 0.01)
    monkeypatch.setattr(run.noise, "enough", lambda *_: 32)
    words = [*SMALL, "--data-only", "--rounds", "7", "--workers", "0"]
    code, out, _ = command(capsys, *words, "--json", str(tmp_path / "x.json"))
    assert code == 0
    content = json.loads((tmp_path / "x.json").read_text())
    dali = ["dali"] if has_dali() else []
    assert [row["loader"] for row in content["rows"]] == ["resident", *dali, "torch"]
    assert "times what the step consumes" in out
    one = [*words, "--loader", "resident", "--json", str(tmp_path / "y.json")]
    assert command(capsys, *one)[0] == 0
    assert len(json.loads((tmp_path / "y.json").read_text())["rows"]) == 1


# time to accuracy


def trial(seed, top1):
    return accuracy.Trial(seed, top1, [2.0 * (i + 1) for i in range(len(top1))])


def test_epochs_to_a_target_are_the_first_that_meets_it():
    assert trial(0, [0.5, 0.94, 0.93]).epochs_to(0.94) == 2
    assert trial(0, [0.5, 0.6]).epochs_to(0.94) is None


@pytest.mark.parametrize("on_gpu", [True, False])
def test_trials_are_summed_up(on_gpu):
    config = resolve({"arch": "cnn-a", "data": "digits", "epochs": 3})
    found = [trial(0, [0.5, 0.95, 0.96]), trial(1, [0.5, 0.6, 0.95]), trial(2, [0.1, 0.2, 0.3])]
    row = accuracy.row_of(config, 0.94, found, on_gpu)
    assert (row["n"], row["met"], row["target"]) == (3, 2, 0.94)
    assert row["epochs_to_target"] == {"mean": 2.5, "median": 2.5, "min": 2.0, "max": 3.0}
    assert row["final_top1"]["mean"] == pytest.approx(0.73667)
    assert ("seconds" in json.dumps(row)) == on_gpu
    if on_gpu:
        assert row["seconds_to_target"]["mean"] == 5.0
        assert row["seconds"]["median"] == 6.0
    gpu = "a GPU" if on_gpu else None
    heads, cells = table.cells_of(content_of([row], gpu, mode="time-to-accuracy"))
    shown = dict(zip(heads, cells[0], strict=True))
    assert shown["met"] == "2 of 3"
    assert shown["final top-1"] == "73.67%, median 95.00% (30.00% to 96.00%)"
    assert ("s to it" in shown) == on_gpu


def test_time_to_accuracy_trains_each_seed_afresh(library, capsys, tmp_path):
    words = "--time-to-accuracy 0.3 --arch murgolo-improved --data digits --epochs 2 --threads 1"
    words += " --train-subset 256 --test-subset 64 --batch-size 32 --seeds 2 --seed 3 --lr 0.02"
    path = tmp_path / "x.json"
    code, _, err = command(capsys, *words.split(), "--json", str(path))
    assert code == 0
    assert "murgolo-improved seed 3: top-1" in err
    row = json.loads(path.read_text())["rows"][0]
    assert [t["seed"] for t in row["trials"]] == [3, 4]
    assert row["trials"][0]["top1"] != row["trials"][1]["top1"]
    assert (row["batch"], row["epochs"], row["recipe"]) == (32, 2, "modern")
    # the same seed alone gives the same run: nothing is left of the one before
    alone = words.replace("--seeds 2 --seed 3", "--seeds 1 --seed 4")
    assert command(capsys, *alone.split(), "--json", str(path))[0] == 0
    assert json.loads(path.read_text())["rows"][0]["trials"][0] == row["trials"][1]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({"amp": True}, (True, "bf16")),
        ({"amp": True, "amp_dtype": "fp16"}, (True, "fp16")),
        ({}, (False, "fp32")),
    ],
)
def test_trials_train_in_the_format_that_was_asked_for_unmeasured(
    library, monkeypatch, words, expected
):
    monkeypatch.setattr("fastcnn.train.numerics.precision.cpu_computes_in", lambda dtype: True)
    met = []
    monkeypatch.setattr(accuracy, "trials", lambda config, *_: met.append(config.run) or [])
    given = {"time_to_accuracy": 0.5, "device": "cpu", "arch": ["cnn-a"], "threads": "1", **words}
    run.time_to_accuracy(run.Run(settings_of(given), ["bench"]))
    assert [(one.amp, one.amp_dtype) for one in met] == [expected]


def test_the_clock_holds_training_and_evaluation_alone(monkeypatch):
    clock = [0.0]

    def spend(seconds):
        clock[0] += seconds

    class Slow:
        def __init__(self, config):
            spend(1000)
            self.setup = type("Setup", (), {"device": torch.device("cpu")})

        def train_epoch(self, most=None):
            spend(2)

        def test_top1(self):
            spend(1)
            return 0.5

    monkeypatch.setattr(accuracy, "Training", Slow)
    monkeypatch.setattr(accuracy.time, "perf_counter", lambda: clock[0])
    config = resolve({"arch": "cnn-a", "data": "digits", "epochs": 2})
    found = list(accuracy.trials(config, 2, lambda what: True))
    assert [t.seconds for t in found] == [[3.0, 6.0]] * 2
    assert clock[0] == 3 * 1000 + 3 + 2 * 6


def test_a_spent_budget_keeps_the_seeds_that_were_trained(monkeypatch):
    monkeypatch.setattr(accuracy, "run_trial", lambda config: config.run.seed)
    monkeypatch.setattr(accuracy, "warm_up", lambda config: None)
    asked = []

    def has_time_for(what):
        asked.append(what)
        return len(asked) < 3

    config = resolve({"arch": "cnn-a", "data": "digits", "seed": 5})
    assert list(accuracy.trials(config, 4, has_time_for)) == [5, 6]
    assert asked == [f"cnn-a seed {seed}" for seed in (5, 6, 7, 8)]


def test_a_gpu_is_warmed_up_by_a_whole_epoch(monkeypatch):
    steps = []

    class Noted:
        def __init__(self, config):
            self.setup = SimpleNamespace(device=torch.device(config))

        def train_epoch(self, most=None):
            steps.append(most)

        def test_top1(self):
            return 0.5

    monkeypatch.setattr(accuracy, "Training", Noted)
    accuracy.warm_up("cuda")  # so that the last, smaller batch is known as well
    accuracy.warm_up("cpu")
    assert steps == [None, accuracy.WARM_UP_STEPS]


@pytest.mark.full
def test_nothing_measured_is_an_error(library, monkeypatch, capsys):
    words = "--arch mao-default --batch-size 4 --backends graph --rounds 7 --device cpu"
    code, _, err = command(capsys, *words.split())
    assert code == 2
    assert "nothing could be measured: --graph on: CUDA graphs need a GPU" in err
