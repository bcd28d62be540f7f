"""fastcnn predict: what the network sees of a user's files, and what is told of it."""

import csv
import io
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encoded, noise, write
from PIL import Image
from small_runs import start
from torch.nn import functional as F

from fastcnn.cli import main
from fastcnn.data.examine import View, cores
from fastcnn.errors import NumbersError
from fastcnn.predict import classifier as classifying
from fastcnn.predict import feed
from fastcnn.predict.classifier import Classifier, most_probable, open_classifier
from fastcnn.predict.paths import image_paths, images_below, listed
from fastcnn.text import shown
from fastcnn.train.checkpoints.checkpoint import load
from fastcnn.train.checkpoints.load_run import evaluation_data, load_trained
from fastcnn.train.run import evaluate_run

CPU = torch.device("cpu")
OPTIONS = {"threads": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, library):
    """A run on 32x32 digits, with batch norm."""
    torch.set_num_threads(1)
    return start(tmp_path_factory.mktemp("runs"), train_subset=256, epochs=2).folder.path


@pytest.fixture(scope="module")
def classifier(folder):
    return open_classifier(folder, None, {"device": "cpu"})


@pytest.fixture(scope="module")
def digits(folder, tmp_path_factory):
    """The run's test images as PNG files in a folder a class, and the labels by path."""
    root = tmp_path_factory.mktemp("digits")
    trained = load_trained(folder / "last.pt", CPU, "torch")
    _, images = evaluation_data(trained, None, "test", {}, CPU)
    for number, label in enumerate(images.labels.tolist()):
        pixels = images.pixels_of([number])[0]
        write(root / trained.classes[label] / f"{number:03}.png", encoded(pixels))
    return root


def run(capsys, *words):
    code = main(["predict", *map(str, words), "--threads", "1", "--device", "cpu"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def of(classifier, paths, size=256):
    """The probabilities of files, all of which can be read."""

    def refuse(name, reason):
        raise AssertionError(f"{name}: {reason}")

    found = feed.batches(map(str, paths), classifier.view, size, refuse)
    return np.concatenate([classifier(pixels) for _, pixels in found])


def plain_probabilities(folder, pixels):
    """By the checkpoint's own numbers: the network as it was trained, in fp64."""
    state = load(folder / "last.pt")["normalization"]
    assert state["mode"] == "zscore"
    model = load_trained(folder / "last.pt", CPU, "torch").model.double()
    mean, std = (torch.tensor(state[name], dtype=torch.float64) for name in ("mean", "std"))
    x = (torch.tensor(pixels).double() / 255 - mean) / std
    with torch.no_grad():
        return model(x.permute(0, 3, 1, 2)).softmax(1).numpy()


def test_accuracy_on_files_is_that_of_eval(capsys, folder, digits):
    code, out, err = run(capsys, folder, digits, "--format", "json")
    assert code == 0
    rows = json.loads(out)
    assert [row["path"] for row in rows] == sorted(map(str, digits.glob("*/*.png")))
    labels = [Path(row["path"]).parent.name for row in rows]
    told = [[each["class"] for each in row["predictions"]] for row in rows]
    wanted = evaluate_run(str(folder), overrides=OPTIONS)
    assert wanted["images"] == len(rows) == 40
    assert 0.2 < wanted["top1"] < 1  # else the figures could agree by chance
    assert np.mean([top[0] == label for label, top in zip(labels, told, strict=True)]) == (
        pytest.approx(wanted["top1"], abs=1e-9)
    )
    assert np.mean([label in top for label, top in zip(labels, told, strict=True)]) == (
        pytest.approx(wanted["top5"], abs=1e-9)
    )
    assert err.startswith("40 images in ")
    assert "images/s, decoding included\n" in err


def test_probabilities_are_those_of_the_plain_network(folder, digits, classifier):
    paths = sorted(digits.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    wanted = plain_probabilities(folder, pixels)
    np.testing.assert_allclose(of(classifier, paths), wanted, atol=1e-5)
    assert wanted.max(1).mean() < 0.99  # softer than a one-hot answer, or nothing is compared
    both = open_classifier(folder, None, {"device": "cpu", "test_flip": True})
    model = load_trained(folder / "last.pt", CPU, "torch").model
    x = classifier.normalised(pixels)
    with torch.no_grad():
        flipped = ((model(x) + model(x.flip(-1))) / 2).softmax(1).numpy()
    np.testing.assert_allclose(of(both, paths), flipped, atol=1e-5)
    assert np.abs(flipped - wanted).max() > 1e-3


def test_the_run_says_whether_images_are_seen_both_ways_unless_told(folder, tmp_path):
    state = load(folder / "last.pt")
    state["config"]["test_flip"] = True
    torch.save(state, tmp_path / "flip.pt")
    assert open_classifier(tmp_path / "flip.pt", None, {"device": "cpu"}).flip
    told = {"device": "cpu", "test_flip": False}
    assert not open_classifier(tmp_path / "flip.pt", None, told).flip
    assert not open_classifier(folder, None, {"device": "cpu"}).flip


def test_weights_choose_the_checkpoint(folder):
    for name in ("last", "best"):
        found = open_classifier(folder, name, {"device": "cpu"})
        assert found.trained.path == folder / f"{name}.pt"


def square(side=32, seed=3):
    """A smooth image, which survives any resize."""
    small = Image.fromarray(noise((5, 7, 3), seed))
    return np.asarray(small.resize((side + 8, side), Image.Resampling.BICUBIC))


def variants(root):
    """The same image stored in several modes, by name; and what it is as RGB."""
    pixels = square()
    rgb = Image.fromarray(pixels)
    grey = rgb.convert("L")
    palette = rgb.quantize(64)
    mask = Image.fromarray(noise(pixels.shape[:2]))
    clear = rgb.copy()
    clear.putalpha(mask)
    alpha = np.asarray(mask)[..., None] / 255
    turned = Image.fromarray(np.rot90(pixels, 1))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    cmyk = Image.fromarray(np.dstack([255 - pixels, np.zeros_like(pixels[..., :1])]), "CMYK")
    root.mkdir()
    grey.save(root / "grey.png")
    palette.save(root / "palette.png")
    clear.save(root / "clear.png")
    turned.save(root / "turned.png", exif=exif)
    cmyk.save(root / "cmyk.tif")
    return {
        "grey.png": np.repeat(np.asarray(grey)[..., None], 3, axis=2),
        "palette.png": np.asarray(palette.convert("RGB")),
        "clear.png": np.round(pixels * alpha + 255 * (1 - alpha)).astype(np.uint8),
        "turned.png": pixels,
        "cmyk.tif": pixels,
    }


def stretched(pixels, side=32):
    nchw = torch.tensor(pixels)[None].permute(0, 3, 1, 2)
    found = F.interpolate(nchw.float(), (side, side), mode="bilinear", antialias=True)
    return found.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def seen(classifier, path):
    """What the network sees of a file, in grey levels."""
    [(_, pixels)] = feed.batches([str(path)], classifier.view, 1, lambda *_: None)
    return pixels.astype(int)


def test_any_mode_and_orientation_is_seen_as_rgb(tmp_path, classifier):
    for name, pixels in variants(tmp_path / "images").items():
        found = seen(classifier, tmp_path / "images" / name)
        # by one level, for the orders of rounding
        np.testing.assert_allclose(found, stretched(pixels), atol=1, err_msg=name)
        assert stretched(pixels).std() > 20


@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_a_size_becomes_the_networks_as_the_run_did_it(tmp_path, classifier, resize):
    data = replace(classifier.trained.config.data, resize=resize)
    config = replace(classifier.trained.config, data=data)
    changed = replace(classifier, trained=replace(classifier.trained, config=config))
    pixels = np.concatenate([square(48, 5), square(48, 6)], axis=1)  # 48x112
    whole, middle = stretched(pixels), stretched(pixels[:, 32:80])
    wanted, other = (whole, middle) if resize == "stretch" else (middle, whole)
    found = seen(changed, write(tmp_path / "wide.png", encoded(pixels)))
    np.testing.assert_allclose(found, wanted, atol=1)
    assert np.abs(found - other).mean() > 10


def test_an_image_gives_the_same_in_a_batch_of_any_size(tmp_path, classifier):
    sides = [(8, 8), (32, 32), (50, 20), (20, 50), (33, 31), (100, 90), (31, 64)]
    paths = [
        write(tmp_path / f"{n}.png", encoded(noise((*side, 3), n))) for n, side in enumerate(sides)
    ]
    alone = np.concatenate([of(classifier, [path]) for path in paths])
    assert len(np.unique(alone.round(4), axis=0)) == len(paths)
    for size in (1, 2, 3, 7, 100):
        np.testing.assert_allclose(of(classifier, paths, size), alone, atol=1e-6)


def test_batches_have_the_size_asked_for(tmp_path):
    path = str(write(tmp_path / "a.png", encoded(noise((8, 8, 3)))))
    found = feed.batches([path] * 5 + ["gone"] + [path] * 2, View(8, "stretch"), 3, lambda *_: None)
    assert [len(pixels) for _, pixels in found] == [3, 3, 1]


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(capsys, folder, tmp_path, digits):
    good = sorted(digits.glob("*/*.png"))[:2]
    write(tmp_path / "odd" / "text.jpg", b"no image" * 9)
    write(tmp_path / "odd" / "empty.png", b"")
    write(tmp_path / "odd" / "two\nlines.png", b"x")
    (tmp_path / "bare").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    given = [good[0], tmp_path / "odd", tmp_path / "bare", tmp_path / "gone.png"]
    code, out, err = run(capsys, folder, *given, tmp_path / "pipe.png", good[1], "--format", "json")
    assert code == 3
    assert [row["path"] for row in json.loads(out)] == list(map(str, good))
    lines = err.splitlines()
    assert len(lines) == 8
    assert lines[0] == f"{tmp_path}/odd/empty.png: empty"
    assert lines[1] == f"{tmp_path}/odd/text.jpg: cannot identify image file"
    assert lines[2] == f"{tmp_path}/odd/two\\nlines.png: cannot identify image file"
    assert lines[3] == f"{tmp_path}/bare: no images in this folder"
    assert lines[4] == f"{tmp_path}/gone.png: No such file or directory"
    assert lines[5] == f"{tmp_path}/pipe.png: not a regular file"
    assert lines[6].startswith("2 images in ")
    assert lines[7] == "fastcnn: 6 of 8 could not be read; they are named above"


def test_nothing_readable_is_valid_output_and_exit_code_3(capsys, folder, tmp_path):
    code, out, err = run(capsys, folder, tmp_path / "gone", "--format", "json", "--quiet")
    assert (code, out) == (3, "[]\n")
    assert err.splitlines() == [
        f"{tmp_path}/gone: No such file or directory",
        "fastcnn: 1 of 1 could not be read; they are named above",
    ]


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["no/such/run", "a.png"], 4, "no checkpoint at"),
        (["RUN"], 2, "required: IMAGES; see fastcnn predict RUN IMAGES"),
        (["RUN", "a.png", "--top", "0"], 2, "--top: must be at least 1"),
        (["RUN", "a.png", "--format", "jsn"], 2, "did you mean 'json'?"),
        (["RUN", "a.png", "--batch-size", "0"], 2, "--batch-size: must be at least 1"),
        (
            ["RUN", "a.png", "--output", "no/such/folder/x"],
            2,
            "--output no/such/folder/x: there is no",
        ),
        (["RUN", "a.png", "--output", "/"], 2, "--output /: is a folder"),
        (["RUN", "a.png", "--topp", "3"], 2, "did you mean '--top'?"),
    ],
)
def test_a_wrong_use_is_one_line(capsys, folder, words, code, expected):
    found, out, err = run(capsys, *[folder if word == "RUN" else word for word in words])
    assert (found, out) == (code, "")
    assert err.count("\n") == 1
    assert expected in err


def test_formats_tell_the_same(capsys, folder, digits, tmp_path):
    paths = sorted(digits.glob("*/*.png"))[:3]
    told = {}
    for form in ("table", "json", "csv"):
        file = tmp_path / form
        words = ["--format", form, "--output", file, "--top", "3", "--quiet"]
        assert run(capsys, folder, *paths, *words) == (0, "", "")
        told[form] = file.read_text()
    rows = json.loads(told["json"])
    assert [len(row["predictions"]) for row in rows] == [3, 3, 3]
    by_rank = [
        {
            "path": row["path"],
            "rank": str(rank),
            "class": each["class"],
            "probability": repr(each["probability"]),
        }
        for row in rows
        for rank, each in enumerate(row["predictions"], 1)
    ]
    assert list(csv.DictReader(io.StringIO(told["csv"]))) == by_rank
    head, *lines = told["table"].splitlines()
    assert head.split() == ["image", "top", "1", "top", "2", "top", "3"]
    for line, row in zip(lines, rows, strict=True):
        path, *cells = line.split()
        assert path == row["path"]
        assert cells == [
            word
            for each in row["predictions"]
            for word in (each["class"], f"{each['probability']:.1%}")
        ]
    assert len({line.index("%") for line in lines}) == 1  # one under the other


def test_there_are_no_more_predictions_than_classes(capsys, folder, digits):
    code, out, _ = run(capsys, folder, digits / "0", "--top", "99", "--format", "json")
    assert code == 0
    for row in json.loads(out):
        values = [each["probability"] for each in row["predictions"]]
        assert len({each["class"] for each in row["predictions"]}) == 10
        assert values == sorted(values, reverse=True)
        assert sum(values) == pytest.approx(1, abs=1e-5)


def test_of_equal_probabilities_the_first_class_comes_first():
    order = most_probable(np.array([[0.2, 0.3, 0.2, 0.3]]), 3)
    assert order.tolist() == [[1, 3, 0]]


@pytest.mark.parametrize("text", [b"a.png\nb c.png\n\n", b"a.png\r\nb c.png", b"a.png\0b c.png\0"])
def test_a_list_has_a_path_a_line_or_is_separated_by_nul(text):
    assert listed(text) == ["a.png", "b c.png"]


def test_a_nul_lets_a_name_have_a_line_break():
    assert listed(b"two\nlines.png\0b\r") == ["two\nlines.png", "b\r"]


def test_paths_come_from_standard_input(capsys, folder, digits, monkeypatch):
    paths = list(map(str, sorted(digits.glob("*/*.png"))[:2]))
    lines = "\n".join([*paths, str(digits / "1")]).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    code, out, _ = run(capsys, folder, "-", "--format", "json")
    assert code == 0
    wanted = [*paths, *map(str, sorted((digits / "1").glob("*.png")))]
    assert [row["path"] for row in json.loads(out)] == wanted
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    code, _, err = run(capsys, folder, "-")
    assert (code, err) == (3, "fastcnn: standard input: no paths of images; give one a line\n")


def test_a_folder_is_looked_through(tmp_path):
    for name in (
        "b/2.PNG",
        "b/1.jpeg",
        "a.webp",
        "notes.txt",
        ".hidden.png",
        ".git/x.png",
        "c/d/e",
    ):
        write(tmp_path / "root" / name, b"x")
    (tmp_path / "root" / "c" / "again").symlink_to(tmp_path / "root")
    write(tmp_path / "elsewhere" / "z.gif", b"x")
    (tmp_path / "root" / "linked").symlink_to(tmp_path / "elsewhere")
    root = f"{tmp_path}/root"
    wanted = [f"{root}/{name}" for name in ("a.webp", "b/1.jpeg", "b/2.PNG", "linked/z.gif")]
    assert images_below(root) == wanted
    empty = f"{root}/c"
    assert image_paths(["x.txt", empty + "/d", root]) == ["x.txt", empty + "/d", *wanted]


def test_a_path_that_is_not_utf8_keeps_its_bytes(capfdbinary, folder, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(encoded(noise((8, 8, 3))))
    for form in ("csv", "table", "json"):
        words = ["predict", str(folder), os.fsdecode(name), "--format", form, "--threads", "1"]
        assert main([*words, "--output", str(tmp_path / form)]) == 0
    assert name in (tmp_path / "csv").read_bytes()
    [row] = json.loads((tmp_path / "json").read_text("utf-8"))
    assert os.fsencode(row["path"]) == name
    (tmp_path / "table").read_text("utf-8")


def test_control_characters_do_not_reach_a_terminal():
    assert shown("a\x1b[31m\nb é") == "a\\x1b[31m\\nb é"


@pytest.mark.parametrize("to_file", [False, True])
@pytest.mark.parametrize("form", ["json", "csv", "table"])
def test_ctrl_c_leaves_what_was_done(capsys, folder, digits, monkeypatch, form, to_file, tmp_path):
    original, calls = Classifier.__call__, iter(range(9))

    def stopped(self, pixels):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return original(self, pixels)

    monkeypatch.setattr(Classifier, "__call__", stopped)
    words = ["--batch-size", "4", "--top", "1", "--format", form]
    words += ["--output", tmp_path / "found"] if to_file else []
    code, out, err = run(capsys, folder, digits, *words)
    assert (code, err) == (130, "fastcnn: interrupted\n")
    if to_file:
        assert (out, [path.name for path in tmp_path.iterdir()]) == ("", ["found"])
        out = (tmp_path / "found").read_text()
    rows = json.loads(out) if form == "json" else out.splitlines()[1:]
    assert len(rows) == 8


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("run/last.pt", "is a file of the run"),
        ("run/index.html", "is a file of the run"),
        ("run/analysis/classes.csv", "is a file of the run"),
        ("alone/mine", "is the checkpoint itself"),
        ("images/a.png", "is one of the images"),
        ("link.png", "is one of the images"),
        ("images/", "is a folder"),
    ],
)
def test_the_result_takes_no_place_of_what_is_read(capsys, folder, tmp_path, name, why):
    (tmp_path / "run" / "analysis").mkdir(parents=True)
    for own in ("config.yaml", "last.pt"):
        shutil.copy(folder / own, tmp_path / "run" / own)
    (tmp_path / "run/index.html").write_text("a page")
    (tmp_path / "run/analysis/classes.csv").write_text("a table")
    target = write(tmp_path / "alone/mine", b"weights") if "alone" in name else tmp_path / "run"
    write(tmp_path / "images/a.png", encoded(noise((8, 8, 3))))
    (tmp_path / "link.png").symlink_to(tmp_path / "images/a.png")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = run(capsys, target, tmp_path / "images", "--output", f"{tmp_path}/{name}")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert why in err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_former_result_stays_until_the_new_one_is_whole(
    capsys, folder, digits, monkeypatch, tmp_path
):
    path = write(tmp_path / "found.csv", b"former")
    (tmp_path / "link.csv").symlink_to(path)
    original, seen = Classifier.__call__, []

    def looked(self, pixels):
        seen.append(path.read_bytes())
        if len(seen) == 2:
            raise NumbersError("broken")
        return original(self, pixels)

    monkeypatch.setattr(Classifier, "__call__", looked)
    words = [folder, digits, "--format", "csv", "--batch-size", "30", "--output"]
    assert run(capsys, *words, path)[0] == 6
    assert (seen, path.read_bytes()) == ([b"former"] * 2, b"former")
    assert run(capsys, *words, tmp_path / "link.csv")[0] == 0
    assert path.read_text().startswith("path,rank")
    assert (tmp_path / "link.csv").is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["found.csv", "link.csv"]


def test_a_pipe_is_written_to_and_no_file_takes_its_place(capsys, folder, digits, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    words = [folder, digits / "1", "--format", "json", "--output", tmp_path / "pipe"]
    assert run(capsys, *words)[0] == 0
    assert (tmp_path / "pipe").is_fifo()
    assert len(json.loads(os.read(reader, 1 << 16))) == len([*(digits / "1").iterdir()])
    os.close(reader)


def test_the_bar_leaves_the_result_on_standard_output(capsys, folder, digits, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    code, out, _ = run(capsys, folder, digits, "--format", "csv", "--top", "1")
    assert code == 0
    assert len(out.splitlines()) == 41
    assert "predicting" in sys.stderr.getvalue()
    assert "path,rank" not in sys.stderr.getvalue()


def test_files_are_read_ahead_but_not_all(tmp_path, monkeypatch):
    path = str(write(tmp_path / "a.png", encoded(noise((8, 8, 3)))))
    seen, original = [], feed.read
    monkeypatch.setattr(feed, "read", lambda path: (seen.append(1), original(path))[1])
    given = (path for _ in range(100_000))
    found = feed.batches(given, View(8, "stretch"), 8, lambda *_: None)
    next(found)
    assert 8 <= len(seen) <= 64 * (2 * cores() + 2)
    found.close()


def test_order_holds_though_threads_end_in_another(tmp_path):
    sides = [600, 8, 300, 8, 8, 500] * 3
    paths = []
    for number, side in enumerate(sides):
        pixels = np.full((side, side, 3), number, np.uint8)
        paths.append(str(write(tmp_path / f"{number}.png", encoded(pixels))))
    [(names, pixels)] = feed.batches(paths, View(8, "stretch"), 99, lambda *_: None)
    assert names == paths
    assert pixels[:, 0, 0, 0].tolist() == list(range(len(sides)))


def test_broken_weights_are_no_prediction(folder):
    broken = open_classifier(folder, None, {"device": "cpu"})
    next(broken.network.parameters()).fill_(float("nan"))
    with pytest.raises(NumbersError, match=r"last\.pt: logits that are not finite"):
        broken(np.zeros((1, 32, 32, 3), np.uint8))


def test_half_precision_is_a_choice(folder, monkeypatch):
    monkeypatch.setattr("fastcnn.train.numerics.precision.cpu_computes_in", lambda dtype: True)
    half = open_classifier(folder, None, {"device": "cpu", "amp": True, "backend": "torch"})
    assert half.precision.name == "bf16"
    found = half(noise((2, 32, 32, 3)))
    assert found.dtype == np.float32
    assert classifying.open_classifier(folder, None, {"device": "cpu"}).precision.name == "fp32"
