"""`fastcnn bench --inference` on a CPU beside onnxruntime and OpenVINO on the exported network."""

import json
import sys

import pytest
import torch
from test_bench import command, content_of
from torch import nn

from fastcnn.bench import plot, table, throughput
from fastcnn.bench.inference import InferenceBench, LogitsCheck
from fastcnn.bench.options import CPU_BACKENDS, ENGINES, settings_of
from fastcnn.bench.rivals import engines
from fastcnn.bench.rivals.variants import Task
from fastcnn.bench.run import Run
from fastcnn.bench.steps import Steps
from fastcnn.errors import FastcnnError
from fastcnn.export import onnx_file

pytestmark = pytest.mark.full

CPU = torch.device("cpu")
TASK = Task("murgolo-improved", 4, "resident", ENGINES, images=24, inference=True)
SMALL = ["--arch", "mao-batchnorm", "--batch-size", "4", "--threads", "1"]
SMALL += ["--device", "cpu", "--rounds", "7"]


@pytest.fixture
def engine(request):
    """The name of an engine that is installed."""
    pytest.importorskip(request.param)
    return request.param


each_engine = pytest.mark.parametrize("engine", ENGINES, indirect=True)


@pytest.fixture(scope="module")
def bench():
    return InferenceBench(TASK)


@pytest.fixture
def without(monkeypatch):
    """Lets packages be missing."""
    return lambda *names: [monkeypatch.setitem(sys.modules, name, None) for name in names]


def why_wrong(bench, engine):
    check = LogitsCheck(bench)
    variant = bench.variant(engine, augment=False)
    return check.why_wrong(engine, variant, check.run(variant))


# the engines


@each_engine
def test_an_engine_is_right(bench, engine):
    assert why_wrong(bench, engine) == ""


def scaled(model):
    model.conv1.conv.weight.mul_(1.001)


def shifted(model):
    model.conv1.norm.running_mean.add_(0.01)


@each_engine
@pytest.mark.parametrize("plant", [scaled, shifted])
def test_an_engine_that_runs_another_network_is_not_timed(monkeypatch, engine, plant):
    original = engines.onnx_of

    @torch.no_grad()
    def other(model, size):
        plant(model)
        return original(model, size)

    monkeypatch.setattr(engines, "onnx_of", other)
    found = Steps(Task("murgolo-improved", 4, "resident", (engine,), images=24, inference=True))
    assert found.variants == []
    assert "logits of pass 4 errs by" in found.wrong[engine]


@each_engine
def test_images_of_each_pass_are_read_where_they_lie(bench, engine):
    model = bench.model("eager").eval()
    sets = [images.contiguous() for images in bench.sets[torch.float32][:2]]
    run = engines.start(engine, engines.onnx_of(model, 32), (4, 3, 32, 32), 10)
    found = [run(images).clone() for images in (*sets, sets[0])]
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    sets[0].copy_(sets[1])
    assert torch.equal(run(sets[0]), found[1])


@pytest.fixture
def network():
    return engines.onnx_of(nn.Sequential(nn.Flatten(1), nn.Linear(3 * 64, 10)), 8)


def test_onnxruntime_takes_torchs_threads_and_stops_them(network, monkeypatch):
    seen = []

    def session(model, options):
        seen.append(options)
        return original(model, options)

    original = onnx_file.session
    monkeypatch.setattr(onnx_file, "session", session)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    engines.start("onnxruntime", network, (2, 3, 8, 8), 10)
    [options] = seen
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_openvino_that_takes_other_threads_is_refused(network, monkeypatch):
    pytest.importorskip("openvino")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    with pytest.raises(FastcnnError, match=r"OpenVINO takes \d+ threads, torch 10000; give --thr"):
        engines.start("openvino", network, (2, 3, 8, 8), 10)


# which are taken


def backends_of(**given):
    run = Run(settings_of({"device": "cpu", "threads": "1", **given}), ["bench"])
    return run.backends, run.content


def test_engines_that_are_installed_are_taken_by_default(library, without):
    pytest.importorskip("onnxruntime")
    without("openvino")
    found, content = backends_of(inference=True)
    assert found == (*CPU_BACKENDS, "onnxruntime")
    assert content["engines"].keys() == {"onnxruntime"}
    why = "openvino is missing; pip install openvino onnx onnxscript"
    assert content["engines_left_out"] == {"openvino": why}
    assert table.tail_lines(content | {"rows": []}) == [f"left out: openvino: {why}"]
    assert backends_of()[0] == CPU_BACKENDS
    assert "engines" not in backends_of(inference=True, backends=["eager", "fused"])[1]


@pytest.mark.parametrize(
    ("words", "missing", "expected"),
    [
        ("--backends onnxruntime", (), "--backends onnxruntime: goes with --inference alone"),
        ("--inference --backends eager openvino", ("openvino",), "openvino: openvino is missing;"),
        ("--inference --backends onnxruntime", ("onnxscript",), "onnxscript is missing; pip ins"),
        ("--inference --backends onnxruntime --amp", (), "it computes in fp32; leave --amp out"),
        ("--layers --backends openvino", (), "--backends openvino: --layers takes eager compile"),
    ],
)
def test_an_engine_that_is_named_and_cannot_be_had_is_an_error(
    library, capsys, tmp_path, monkeypatch, without, words, missing, expected
):
    monkeypatch.setattr("fastcnn.train.numerics.precision.cpu_computes_in", lambda dtype: True)
    without(*missing)
    path = tmp_path / "bench.json"
    code, out, err = command(capsys, *SMALL, *words.split(), "--json", str(path))
    assert (code, out) == (2, "")
    assert expected in err
    assert err.count("\n") == 1
    assert not path.exists()


def test_engines_are_rivals_on_the_cpu_in_fp32():
    assert engines.why_not("onnxruntime", torch.device("cuda"), None).endswith("use --device cpu")
    assert engines.why_not("onnxruntime", CPU, torch.bfloat16).endswith("leave --amp out")


# rows, table, chart


def test_an_engine_is_compared_from_end_to_end(library, capsys, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "x.json"
    words = f"--inference --backends eager fused onnxruntime --json {path}"
    code, out, err = command(capsys, *SMALL, *words.split(), "--plot", str(tmp_path / "x.png"))
    assert code == 0, err
    content = json.loads(path.read_text())
    rows = {row["backend"]: row for row in content["rows"]}
    assert rows["fused"]["times_as_fast_as"]["onnxruntime"].keys() == set(throughput.PAIRS)
    # the command's allocator is not what an engine's user has
    assert rows["onnxruntime"]["times_as_fast_as"]["eager"].keys() == {"both plain", "both tuned"}
    version = content["engines"]["onnxruntime"]
    first, *lines = out.splitlines()
    assert first.endswith(f"fp32, onnxruntime {version}")
    told = [line.split()[2:4] for line in lines]
    assert ["fused", "onnxruntime"] in told
    assert ["onnxruntime", "eager"] in told
    assert (tmp_path / "x.png").exists()


def test_engines_have_the_colour_of_rivals(monkeypatch):
    drawn = {}

    class Axis:
        def __getattr__(self, name):
            return lambda *args, **more: drawn.setdefault(name, more)

    Axis.xaxis = Axis.spines = property(lambda self: self)
    Axis.__getitem__ = lambda self, key: self
    bars = {name: {"median": 1.0, "min": 1.0, "max": 1.0} for name in ("fused", *ENGINES)}
    plot._panel(Axis(), "a network", bars)
    assert drawn["barh"]["color"] == [plot.RIVAL, plot.RIVAL, plot.OURS]
    assert "grey: the rivals" in plot._title(content_of([], mode="inference"))
