"""`fastcnn export`: files that others read, against the trained network; what is never written."""

import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from small_runs import fixed_validation, start
from test_export_zoo import close, logits

from fastcnn.cli import main
from fastcnn.commands.export import told
from fastcnn.config import DataConfig
from fastcnn.data import Normalization, load_dataset
from fastcnn.export import metadata, onnx_file, safetensors_file, torch_file
from fastcnn.export.network import exported_network
from fastcnn.train.checkpoints import checkpoint
from fastcnn.train.checkpoints.load_run import load_trained

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose best epoch is its first."""
    with pytest.MonkeyPatch.context() as patch:
        fixed_validation(patch, [0.5, 0.25])
        outcome = start(tmp_path_factory.mktemp("run"), backend="torch", normalize="mean-image")
    return outcome.folder.path


@pytest.fixture(scope="module")
def trained(folder):
    return load_trained(folder / "last.pt", CPU, "torch")


@pytest.fixture(scope="module")
def digits():
    """Real images, uint8 (9, 32, 32, 3)."""
    return load_dataset(DataConfig(data="digits"), 32).test.pixels_of(range(100, 109))


@pytest.fixture(scope="module")
def wanted(trained, digits):
    """Their logits, by the trained network."""
    return logits(trained.model, normalised(trained, digits))


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    """The file of each format, by its ending, that take pixels where they can."""
    place = tmp_path_factory.mktemp("files")
    for name, words in {
        "cnn-a.onnx": ["onnx", "--preprocess"],
        "cnn-a.pt2": ["torch", "--preprocess"],
        "cnn-a.safetensors": ["safetensors"],
    }.items():
        words = [*words, "--output", str(place / name), "--images", "12", "--threads", "1"]
        assert main(["export", str(folder), "--format", *words]) == 0
    return place


def normalised(trained, pixels):
    """By the definition of the mode, in numpy."""
    assert trained.normalization.mode == "mean-image"
    mean = np.array(trained.normalization.mean_image)
    return torch.from_numpy((pixels / 255 - mean).astype(np.float32)).permute(0, 3, 1, 2)


def run(capsys, *words):
    code = main(["export", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# What the files compute and tell


def snippet(title):
    text = (ROOT / "docs" / "guides" / "export.md").read_text("utf-8")
    [code] = re.findall(rf"<!-- {title} -->\n```python\n(.*?)```", text, re.DOTALL)
    return code


# no part of this project may be found by who uses the files
WITHOUT = """
import sys, json, numpy
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "fastcnn":
            raise ImportError("fastcnn")
sys.meta_path.insert(0, Refuse())
pixels = numpy.load("pixels.npy")
{onnx}
numpy.save("onnx.npy", logits)
numpy.save("onnx-1.npy", session.run(None, {{"images": pixels[:1]}})[0])
told = [json.loads(session.get_modelmeta().custom_metadata_map["classes"])]
{torch}
numpy.save("torch.npy", logits.detach())
numpy.save("torch-1.npy", network(torch.from_numpy(pixels[:1])).detach())
extra = {{"metadata.json": ""}}
torch.export.load("cnn-a.pt2", extra_files=extra)
told.append(json.loads(json.loads(extra["metadata.json"])["classes"]))
print(json.dumps([told, [name for name in sys.modules if name.startswith("fastcnn")]]))
"""


@pytest.mark.full
def test_the_lines_in_the_guide_work_without_fastcnn(files, digits, wanted):
    np.save(files / "pixels.npy", digits)
    code = WITHOUT.format(onnx=snippet("onnx in use"), torch=snippet("torch in use"))
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=files,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    classes = [str(digit) for digit in range(10)]
    assert json.loads(found.stdout.splitlines()[-1]) == [[classes, classes], []]
    for name in ("onnx", "torch"):
        assert close(np.load(files / f"{name}.npy"), wanted)
        assert close(np.load(files / f"{name}-1.npy"), wanted[:1])


def metadata_of(files):
    model = onnx.load(files / "cnn-a.onnx")
    extra = {torch_file.METADATA: ""}
    torch.export.load(files / "cnn-a.pt2", extra_files=extra)
    return {
        "onnx": {entry.key: entry.value for entry in model.metadata_props},
        "torch": json.loads(extra[torch_file.METADATA]),
        "safetensors": safetensors_file.read(files / "cnn-a.safetensors")[1],
    }


def test_every_file_tells_the_same_of_the_run(files, folder, trained):
    summary = json.loads((folder / "summary.json").read_text())
    for name, told_there in metadata_of(files).items():
        assert json.loads(told_there["classes"]) == list(trained.classes)
        plain = json.loads(told_there["normalization"])
        assert Normalization.from_plain(plain) == trained.normalization
        assert json.loads(told_there["config"])["arch"] == told_there["arch"] == "murgolo-improved"
        assert told_there["image_size"] == "32"
        assert float(told_there["test_top1"]) == summary["test_top1"]
        assert (told_there["test_images"], told_there["test_flip"]) == ("40", "false")
        taken = json.loads(told_there["input"])
        pixels = name != "safetensors"
        assert taken["dtype"] == ("uint8" if pixels else "float32")
        assert taken["shape"] == ["batch", *((32, 32, 3) if pixels else (3, 32, 32))]


def test_an_onnx_file_names_what_goes_in_and_out(files):
    model = onnx.load(files / "cnn-a.onnx", load_external_data=False)
    [given], [result] = model.graph.input, model.graph.output
    found = {}
    for value in (given, result):
        tensor = value.type.tensor_type
        shape = [d.dim_param or d.dim_value for d in tensor.shape.dim]
        found[value.name] = (onnx.TensorProto.DataType.Name(tensor.elem_type), shape)
    assert found == {
        "images": ("UINT8", ["batch", 32, 32, 3]),
        "logits": ("FLOAT", ["batch", 10]),
    }
    # one file has it all
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert sorted(path.name for path in files.glob("*onnx*") if path.suffix != ".npy") == [
        "cnn-a.onnx"
    ]


def test_no_file_tells_of_the_machine(files):
    for name in ("cnn-a.onnx", "cnn-a.pt2", "cnn-a.safetensors"):
        content = (files / name).read_bytes()
        assert len(content) > 400_000
        for word in (str(ROOT), "site-packages", ".py", "stack_trace"):
            assert word.encode() not in content, (name, word)


def test_safetensors_are_the_weights_as_trained(files, folder, trained, digits, wanted):
    path = files / "cnn-a.safetensors"
    weights = safetensors.torch.load_file(path)
    state = checkpoint.load(folder / "last.pt")["model"]
    assert weights.keys() == state.keys()
    assert all(torch.equal(weights[name], state[name]) for name in state)
    network = safetensors_file.reader(path)
    assert not network.training
    assert np.array_equal(logits(network, normalised(trained, digits)), wanted)


def test_other_weights_on_demand(folder, tmp_path, capsys):
    states = [checkpoint.load(folder / f"{name}.pt")["model"] for name in ("best", "last")]
    name = "conv2.conv.weight"
    assert not torch.equal(states[0][name], states[1][name])
    path = tmp_path / "best.safetensors"
    words = ("--format", "safetensors", "--output", path, "--images", 3)
    assert run(capsys, folder, "--weights", "best", *words)[0] == 0
    found, told_there = safetensors_file.read(path)
    assert torch.equal(found[name], states[0][name])
    # the summary speaks of the last epoch
    assert "test_top1" not in told_there
    assert run(capsys, folder / "last.pt", *words)[0] == 0
    found, told_there = safetensors_file.read(path)
    assert torch.equal(found[name], states[1][name])
    assert "test_top1" in told_there


@pytest.mark.parametrize("opset", [None, 18])
def test_the_opset_is_the_one_asked_for(opset, trained):
    network = exported_network(trained, True)
    found = onnx.load_from_string(onnx_file.encode(network, {}, opset)).opset_import[0].version
    assert found == opset if opset else found >= 18


# What is not written


def test_a_file_that_is_off_is_not_written(folder, tmp_path, capsys, monkeypatch):
    original = safetensors_file.encode

    def off(weights, told_there):
        name = "fc2.linear.weight"
        return original({**weights, name: weights[name] * 1.001}, told_there)

    monkeypatch.setattr(safetensors_file, "encode", off)
    path = tmp_path / "net.safetensors"
    for former in (None, b"a good one"):
        if former:
            path.write_bytes(former)
        code, out, err = run(capsys, folder, "--format", "safetensors", "--output", path)
        assert code == 6
        assert out == ""
        line = err.splitlines()[-1]
        assert line.startswith(f"fastcnn: {path}: not written, its logits differ")
        assert [p.read_bytes() for p in tmp_path.iterdir()] == ([former] if former else [])


def test_a_full_disk_is_one_line(folder, tmp_path, capsys, monkeypatch):
    def full(file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"a good one")
    code, _, err = run(capsys, folder, "--format", "safetensors", "--output", path)
    assert code == 4
    assert f"fastcnn: cannot write {path}: No space left on device (" in err.splitlines()[-1]
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"a good one"]


def test_broken_weights_are_named(folder, tmp_path, capsys):
    state = checkpoint.load(folder / "last.pt")
    state["model"]["fc2.linear.bias"][3] = float("nan")
    checkpoint.save(state, tmp_path / "last.pt")
    code, _, err = run(capsys, tmp_path, "--format", "safetensors")
    assert code == 6
    assert "not finite" in err.splitlines()[-1]
    assert not list(tmp_path.glob("*.safetensors"))


def test_images_that_are_gone_can_be_replaced(folder, tmp_path, capsys):
    state = checkpoint.load(folder / "last.pt")
    state["config"]["data"] = str(tmp_path / "gone" / "birds")
    state["network"]["classes"] = [f"bird {number}" for number in range(10)]
    checkpoint.save(state, tmp_path / "last.pt")
    words = (tmp_path, "--format", "safetensors", "--images", 20)
    code, _, err = run(capsys, *words)
    assert code == 3
    assert "gone/birds: no such file" in err
    assert "--data digits" in err
    assert not list(tmp_path.glob("*.safetensors"))
    code, out, _ = run(capsys, *words, "--data", "digits", "--json")
    assert code == 0
    found = json.loads(out)
    path = tmp_path / "murgolo-improved.safetensors"
    assert found["path"] == str(path)
    assert found["bytes"] == path.stat().st_size
    assert found["input"] is None
    assert found["checked_on"] == "test images of digits"
    assert found["comparison"]["batches"] == [1, 7, 12]
    assert found["comparison"]["error"] == 0
    # the name of the data, not where they were
    assert json.loads(safetensors_file.read(path)[1]["config"])["data"] == "birds"


@pytest.mark.parametrize("text", ["{", '{"tested_model": 3}', '{"test_top1": 1, "images": [3]}'])
def test_a_damaged_summary_is_told_and_left(folder, tmp_path, capsys, text):
    for name in ("config.yaml", "last.pt"):
        shutil.copy(folder / name, tmp_path / name)
    (tmp_path / "summary.json").write_text(text)
    words = ("--format", "safetensors", "--images", 8)
    code, _, err = run(capsys, tmp_path, *words)
    assert code == 0
    assert err.count("summary.json") == (text[-2:] != "]}")
    _, metadata = safetensors_file.read(tmp_path / "murgolo-improved.safetensors")
    assert "test_top1" not in metadata


# Words


def test_the_result_in_words():
    comparison = {
        "images": 600,
        "batches": [1, 7, 256, 256, 80],
        "error": 0.00125,
        "scale": 25,
        "equal": 0.995,
        "relative": 5e-5,
        "tolerance": 1e-4,
    }
    result = {
        "path": "runs/a/cnn-a.onnx",
        "bytes": 2372843,
        "arch": "cnn-a",
        "input": metadata.describe_input(32, True),
        "checked_on": "test images of digits",
        "comparison": comparison,
    }
    assert told(result).splitlines() == [
        "runs/a/cnn-a.onnx: 2,372,843 bytes, cnn-a",
        "takes uint8 images (batch, 32, 32, 3): RGB pixels, 0 to 255",
        "checked on 600 test images of digits (batches of 1, 7, 256, 80): max error of a logit "
        "0.0013, 5.0e-05 of the largest (allowed 0.0001), 99.50% equal predictions",
    ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "--format: none given; one of onnx, torch, safetensors"),
        ("--format onxx", "did you mean 'onnx'?"),
        ("--format safetensors --preprocess", "--preprocess: safetensors holds weights alone"),
        ("--format onnx --names torchvision", "--names torchvision: --format onnx"),
        ("--format torch --opset 20", "--opset: --format torch has none"),
        ("--format onnx --opset 17", "--opset: expected 18 to 23, got 17"),
        ("--format onnx --opset 24", "--opset: expected 18 to 23, got 24"),
        ("--format onnx --images 0", "--images: must be at least 1"),
        ("--format safetensors --output last.pt", "ends with .safetensors"),
        ("--format safetensors --output nowhere/x.safetensors", "there is no folder nowhere"),
        ("--format safetensors --output .safetensors", "ends with .safetensors"),
        ("--format safetensors --names torchvision", "torchvision has no murgolo-improved of"),
    ],
)
def test_mistakes_are_one_line(words, expected, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, folder, *words.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert expected in err


def test_a_missing_run_is_a_checkpoints_error(tmp_path, capsys):
    code, _, err = run(capsys, tmp_path / "none", "--format", "safetensors")
    assert code == 4
    assert "no checkpoint at" in err


@pytest.mark.parametrize(
    ("name", "package"),
    [("onnx", "onnxruntime"), ("onnx", "onnxscript"), ("safetensors", "safetensors")],
)
def test_a_missing_package_is_named(name, package, capsys, monkeypatch):
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *rest: None if n == package else original(n, *rest)
    )
    code, _, err = run(capsys, "run", "--format", name)
    assert code == 2
    assert err == (
        f"fastcnn: --format {name}: the package {package} is missing; "
        "pip install 'fastcnn[export]'\n"
    )
