"""fastcnn from Python: it reads as the command line does, and does the same."""

import inspect
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, load, noise, write
from PIL import Image
from small_runs import SMALL, assert_same, final_state, start

import fastcnn
from fastcnn import api
from fastcnn.cli import parse
from fastcnn.commands.parser import read_values
from fastcnn.config import options_by_name
from fastcnn.errors import CheckpointError, DataError, UsageError
from fastcnn.train.interrupt import StopAtStepEdge
from fastcnn.train.run import evaluate_run

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "predict.md"
TIMES = {"seconds", "images_per_s"}
OWN = SMALL | {"epochs": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory, library):
    torch.set_num_threads(1)
    return fastcnn.train(OWN, output=tmp_path_factory.mktemp("runs"), name="own", quiet=True)


def python(code, cwd=None):
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert found.returncode == 0, found.stderr
    return found.stdout


@pytest.mark.parametrize("first", ["", "import fastcnn.train.host", "import fastcnn.train"])
def test_train_is_a_function_whatever_was_imported(first):
    code = (
        f"{first}\nimport fastcnn, inspect, sys, pickle\n"
        "print(callable(fastcnn.train), *inspect.signature(fastcnn.train).parameters)\n"
        "import fastcnn.train.host\n"
        "assert callable(fastcnn.train) and fastcnn.train.host.usable_cores()\n"
        "assert pickle.loads(pickle.dumps(fastcnn.train)) is fastcnn.train\n"
        "from fastcnn import train\n"
        "assert train is fastcnn.train and {'load', 'train'} <= set(dir(fastcnn))\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert python(code).split() == ["True", "config", "quiet", "options"]


def test_the_package_is_called_as_the_function_is():
    def plain(function):
        parameters = inspect.signature(function).parameters.values()
        return [(each.name, each.kind, each.default) for each in parameters]

    assert plain(fastcnn.train) == plain(api.train)
    assert fastcnn.load is api.load
    assert "fastcnn.api.train" in fastcnn.train.__doc__
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        fastcnn.trian  # noqa: B018


@pytest.mark.full
def test_the_guides_example_runs(tmp_path):
    text = GUIDE.read_text(encoding="utf-8")
    code = re.search(r"<!-- python example -->\n```python\n(.*?)```", text, re.DOTALL)[1]
    accuracy, *lines = python(code, cwd=tmp_path).splitlines()
    run = tmp_path / "runs" / "cnn-a-1"
    summary = json.loads((run / "summary.json").read_text())
    assert float(accuracy) == summary["test_top1"] > 0.5
    assert (run / "index.html").is_file()
    assert len(lines) == 10
    # they are the digits 0 to 9, most of them training images
    assert sum(line.split()[0] == str(number) for number, line in enumerate(lines)) >= 7


def test_training_is_that_of_the_command(model, tmp_path):
    wanted = start(tmp_path, "other", epochs=1, device="cpu").folder.path
    assert_same(final_state(model.folder), final_state(wanted))
    for name in ("curves.png", "confusion_matrix.png", "index.html"):
        assert (model.folder / name).is_file()
    assert model.summary == json.loads((model.folder / "summary.json").read_text())


def test_the_run_records_the_command_that_does_the_same(model):
    words = json.loads((model.folder / "environment.json").read_text())["command"]
    assert words[:2] == ["fastcnn", "train"]
    name, given = parse(words[1:])
    assert name == "train"
    assert read_values(given, options_by_name().values()) == OWN
    assert given["output"] == str(model.folder.parent)
    known = options_by_name()
    odd = {"amp": False, "nesterov": True, "milestones": [3, 5], "train_subset": None}
    wanted = ["fastcnn", "train", "--no-amp", "--nesterov", "--milestones", "3", "5"]
    assert api.equivalent_command(odd, known) == wanted


def test_options_stand_above_a_file_or_a_mapping(tmp_path, monkeypatch):
    seen = []

    def stop(config, place, command, quiet):
        seen.append((config.flat(), place, quiet))
        raise DataError("seen")

    monkeypatch.setattr(api, "start", stop)
    file = tmp_path / "study.yaml"
    file.write_text("arch: cnn-a\ndata: digits\nepochs: 5\nlr: 1e-3\noutput: there\n")
    same = {"arch": "cnn-a", "data": "digits", "epochs": 5, "lr": 1e-3, "output": "there"}
    for config in (file, str(file), same):
        with pytest.raises(DataError):
            fastcnn.train(config, epochs=np.int64(3), milestones=(1, 2), name=None)
    assert seen[0] == seen[1] == seen[2]
    flat, place, quiet = seen[0]
    wanted = {"arch": "cnn-a", "epochs": 3, "lr": 1e-3, "milestones": [1, 2], "optimizer": "adam"}
    assert {name: flat[name] for name in wanted} == wanted
    assert (place.output, place.name, quiet) == ("there", None, False)
    with pytest.raises(DataError):
        fastcnn.train(same, quiet=True)
    assert seen[3][2] is True


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"epoch": 3}, "unknown option 'epoch'; did you mean 'epochs'?"),
        ({"arch": "vgg61"}, "did you mean 'vgg16'?"),
        ({"lr": "fast"}, "--lr: expected a number, got 'fast'"),
        ({"amp": 1}, "--amp: expected true or false, got 1"),
        ({"resume": "x", "name": "y"}, "leave name and output out"),
        ({"resume": "x", "output": "y"}, "leave name and output out"),
    ],
)
def test_a_wrong_option_is_a_usage_error(options, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config, more in ((None, options), (options, {})):
        if "resume" in options and config:
            continue  # as of the command: what a file says of places, resuming passes over
        with pytest.raises(UsageError, match=re.escape(expected)):
            fastcnn.train(config, **more)
    with pytest.raises(UsageError, match=r"no-such\.yaml"):
        fastcnn.train("no-such.yaml")
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_resumed(tmp_path):
    first = fastcnn.train(OWN, output=tmp_path, quiet=True)
    more = fastcnn.train(resume=first.folder, epochs=2, allow_changes=True, quiet=True)
    assert more.folder == first.folder
    assert (first.summary["epochs"], more.summary["epochs"]) == (1, 2)
    with pytest.raises(UsageError, match="--allow-changes"):
        fastcnn.train(resume=first.folder, epochs=3, quiet=True)


def test_all_kinds_of_images_are_taken(model, tmp_path):
    arrays = noise((3, 20, 28, 3))
    root = tmp_path / "images"
    paths = [write(root / f"{n}.png", encoded(array)) for n, array in enumerate(arrays)]
    wanted = model.probabilities(paths)
    assert wanted.shape == (3, 10)
    assert wanted.dtype == np.float32
    assert len(np.unique(wanted.round(5), axis=0)) == 3
    bgr = np.ascontiguousarray(arrays[..., ::-1])
    kinds = {
        "a folder": root,
        "texts": [str(path) for path in paths],
        "PIL images": [Image.open(path) for path in paths],
        "an array": arrays,
        "arrays": list(arrays),
        "a view backwards": bgr[..., ::-1],
        "a tensor": torch.tensor(arrays),
        "tensors": tuple(torch.tensor(arrays)),
        "a generator": (array for array in arrays),
        "a mixture": [paths[0], arrays[1], Image.open(paths[2])],
        "nested": [arrays[:2], root / "2.png"],
    }
    for name, images in kinds.items():
        np.testing.assert_allclose(model.probabilities(images), wanted, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(model.probabilities(arrays[1]), wanted[1:2], atol=1e-6)
    np.testing.assert_allclose(model.probabilities(str(paths[2])), wanted[2:], atol=1e-6)
    assert model.probabilities([]).shape == (0, 10)
    assert model.predict([]) == []


@pytest.mark.parametrize("kind", ["png", "tif", "memory"])
def test_a_pil_image_is_turned_upright_and_stays_as_it_is(model, tmp_path, kind):
    pixels = noise((20, 40, 3))
    lying = Image.fromarray(np.rot90(pixels))
    lying.getexif()[0x0112] = 6  # to be turned by 90° clockwise
    turned = lying
    if kind != "memory":
        lying.save(tmp_path / f"a.{kind}", exif=lying.getexif())
        turned = Image.open(tmp_path / f"a.{kind}")
    wanted = model.probabilities(pixels)
    np.testing.assert_allclose(model.probabilities(turned), wanted, atol=1e-6)
    if kind != "tif":  # Pillow itself turns one while it loads it
        assert (turned.size, turned.getexif()[0x0112]) == ((20, 40), 6)
    untold = model.probabilities(Image.fromarray(np.rot90(pixels)))
    assert np.abs(untold - wanted).max() > 1e-3


def test_predictions_follow_the_probabilities(model, tmp_path):
    arrays = noise((4, 8, 8, 3))
    values = model.probabilities(arrays)
    for found, row in zip(model.predict(arrays, top=3), values, strict=True):
        best = sorted(range(10), key=lambda c: -row[c])[:3]
        assert found.top == tuple((model.classes[c], float(row[c])) for c in best)
        assert (found.label, found.probability) == found.top[0]
        assert found.path is None
    assert len(model.predict(arrays[0], top=99)[0].top) == 10
    path = write(tmp_path / "a.png", encoded(arrays[0]))
    [found] = model.predict(path)
    assert (found.path, len(found.top)) == (str(path), 5)
    for top in (0, "3", 2.5, None):
        with pytest.raises(UsageError, match=rf"top: expected a whole .*, got {top!r}"):
            model.predict(arrays, top=top)
    assert len(model.predict(arrays[0], top=np.int64(2))[0].top) == 2


def test_the_network_takes_what_preprocess_returns(model):
    images = noise((3, 50, 40, 3))
    x = model.preprocess(images)
    assert (x.shape, x.dtype) == ((3, 3, 32, 32), torch.float32)
    assert not model.network.training
    with torch.no_grad():
        found = model.network(x).softmax(1).numpy()
    np.testing.assert_allclose(found, model.probabilities(images), atol=1e-5)
    assert model.preprocess([]).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        (noise((3, 8, 8)), "got uint8 (3, 8, 8)"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), "got torch.uint8 (3, 8, 8)"),
        (np.zeros((8, 8, 3)), "got float64 (8, 8, 3)"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.bfloat16), "got torch.bfloat16 (8, 8, 3)"),
        (np.zeros((0, 8, 3), np.uint8), "got uint8 (0, 8, 3)"),
        (None, "got NoneType"),
        ([3], "got int"),
        (b"bytes", "got bytes"),
        ([b"bytes"], "got bytes"),
        (io.BytesIO(b"a file"), "got BytesIO"),
        ({"a.png": "b.png"}, "got dict"),
    ],
)
def test_what_is_no_image_is_a_usage_error(model, images, expected):
    with pytest.raises(UsageError, match=re.escape(expected)):
        model.predict(images)


def test_what_cannot_be_read_is_a_data_error_that_names_it(model, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    write(good, encoded(noise((8, 8, 3))))
    write(bad, b"x")
    (tmp_path / "bare").mkdir()
    for given in ([good, bad], tmp_path):
        with pytest.raises(DataError, match=re.escape(f"{bad}: cannot identify image file")):
            model.predict(given)
    with pytest.raises(DataError, match="bare: no images in this folder"):
        model.predict(tmp_path / "bare")
    with pytest.raises(DataError, match="floating-point pixels"):
        model.predict(Image.new("F", (8, 8)))


def test_evaluate_is_eval(model):
    torch.set_num_threads(1)
    found = model.evaluate()
    assert torch.get_num_threads() == 1
    wanted = evaluate_run(str(model.folder), overrides={"device": "cpu", "threads": 1})
    assert {k: v for k, v in found.items() if k not in TIMES} == {
        k: v for k, v in wanted.items() if k not in TIMES
    }
    assert found["top1"] == model.summary["test_top1"]
    assert model.evaluate(split="train")["images"] == 64
    assert model.evaluate(data="digits")["images"] == len(load("digits").test) > 40  # taken whole


def test_a_run_is_loaded_by_its_folder_or_a_checkpoint(model):
    images = noise((2, 32, 32, 3))
    for target in (model.folder, str(model.folder), model.folder / "last.pt"):
        other = fastcnn.load(target, device="cpu", backend="torch")
        assert (other.classes, other.image_size) == (tuple("0123456789"), 32)
        assert (other.folder, other.summary) == (model.folder, model.summary)
        found, wanted = other.probabilities(images), model.probabilities(images)
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert "best.pt" in repr(fastcnn.load(model.folder, "best", device="cpu"))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        fastcnn.load(model.folder / "gone")
    with pytest.raises(UsageError, match=r"^--weights: 'x' is not one of last, best$"):
        fastcnn.load(model.folder, weights="x")
    with pytest.raises(UsageError, match="--backend: 'fusd' is not one of"):
        fastcnn.load(model.folder, backend="fusd")


@pytest.mark.parametrize("text", ["{", '{"tested_model": "x"}', '{"tested_model": ["last"]}'])
def test_a_damaged_summary_keeps_nobody_from_the_weights(model, tmp_path, caplog, text):
    shutil.copytree(model.folder, tmp_path / "run")
    (tmp_path / "run/summary.json").write_text(text)
    images = noise((2, 32, 32, 3))
    for weights in (None, "last"):
        caplog.clear()
        other = fastcnn.load(tmp_path / "run", weights, device="cpu")
        np.testing.assert_allclose(other.probabilities(images), model.probabilities(images))
        told = [r.getMessage() for r in caplog.records if "summary.json" in r.getMessage()]
        assert len(told) == (weights is None or text == "{")
        assert all(line.startswith("note: ") and "\n" not in line for line in told)


def test_a_thread_of_its_own_may_train():
    seen = []

    def enter():
        with StopAtStepEdge() as stop:
            stop.check()
            seen.append(stop)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert len(seen) == 1
