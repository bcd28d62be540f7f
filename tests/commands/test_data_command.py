"""`fastcnn data`: what check, pack and show print, write and return."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from image_files import (
    IN_FILES,
    encoded,
    image,
    load,
    members_of,
    noise,
    tiny_members,
    write,
    write_folder,
    write_members,
    write_tar,
    write_zip,
)
from PIL import Image

from fastcnn.cli import main
from fastcnn.commands.data import DATA_ACTIONS
from fastcnn.config import DataConfig, options_by_name
from fastcnn.data import inspect as report
from fastcnn.data import load_dataset
from fastcnn.data.normalize import Normalization
from fastcnn.data.select import advised_side
from fastcnn.errors import DataError
from fastcnn.insight.drawing import data_figures, figures

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def run(capsys, *words):
    code = main(["data", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def checked(capsys, path, *words, code=0):
    found, out, err = run(capsys, "check", path, *words, "--json")
    assert found == code, err
    return json.loads(out)


# Words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "data: no action given; one of check, pack, show"),
        ("chekc x", "unknown action 'chekc'; did you mean 'check'?; one of check, pack, show"),
        ("shwo x", "did you mean 'show'?"),
        ("check", "data check: give a path or one of cifar10, tiny-imagenet, digits"),
        ("check digts", "--data digts: neither cifar10, tiny-imagenet, digits nor an existing"),
        ("check digits --samples 3", "data check: --samples belongs to fastcnn data show"),
        ("pack digits --output x", "data pack: --output belongs to fastcnn data show"),
        ("show digits --samples 0", "--samples: must be at least 1"),
        ("show digits --seed -1", "--seed: must be at least 0"),
        ("show digits --grayscale keep", "--grayscale: 'keep' is not one of rgb, drop"),
        ("check digits --image-sise 8", "did you mean '--image-size'?"),
    ],
)
def test_mistyped_words_are_one_line(capsys, words, expected):
    code, out, err = run(capsys, *words.split())
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert expected in err


def test_help_lists_the_actions(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["data", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "usage: fastcnn data {check,pack,show} DATA [options]" in text
    for name, meaning in DATA_ACTIONS.items():
        assert f"{name}: {meaning}" in text
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "check, pack or show the images of a data set" in capsys.readouterr().out


# Check


def archived(root, kind):
    """The folder itself, or a tar or zip of it."""
    if kind == "folder":
        return root
    write_archive = write_tar if kind == "tar" else write_zip
    return write_archive(root.with_suffix(f".{kind}"), members_of(root))


def odd_folder(root):
    """ant: 5 training images, bee: 2; three sizes, one grey, one transparent, one left out."""
    write_folder(root, count=2)
    write(root / "train/ant/2.png", encoded(noise((8, 12, 3))))
    write(root / "train/ant/3.png", encoded(noise((10, 8))))
    write(root / "train/ant/4.png", encoded(noise((8, 8, 4))))
    write(root / "train/ant/notes.txt", b"x")
    return root


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_check_of_a_sound_folder_or_archive(capsys, root, kind):
    path = archived(odd_folder(root), kind)
    found = checked(capsys, path)
    assert found["kind"] == ("image folder" if kind == "folder" else "archive")
    assert found["images"] == 11
    assert found["ignored_files"] == 1
    assert found["classes"] == {"ant": {"train": 5, "test": 2}, "bee": {"train": 2, "test": 2}}
    assert found["splits"]["train"] == {
        "images": 7,
        "min": 2,
        "median": 3.5,
        "max": 5,
        "fewest": "bee",
        "most": "ant",
    }
    assert found["sizes"] == [
        {"width": 8, "height": 8, "images": 9},
        {"width": 12, "height": 8, "images": 1},
        {"width": 8, "height": 10, "images": 1},
    ]
    assert (found["grey"], found["odd"], found["unreadable"]) == (1, 1, [])
    assert found["test_fraction"] is None
    assert found["advice"] == [
        "the images have 3 sizes: give --image-size 8",
        "--resize crop keeps the proportions of images that are not square",
        "grey images count as RGB; --grayscale drop leaves them out",
    ]
    code, out, err = run(capsys, "check", path, "--image-size", "8", "--grayscale", "drop")
    assert (code, err) == (0, "")
    assert f"{path}: {found['kind']}, 2 classes, 11 images\n" in out
    assert "  train: 7 images, 2 to 5 a class, median 3.5 (fewest: bee, most: ant)\n" in out
    assert "  test: 4 images, 2 a class\n" in out
    assert "  ant: train 5, test 2\n" in out
    assert "  8 x 8: 9 images (81.8%)\n" in out
    assert "no images of a class: 1 file, left out\n" in out
    assert "grey: 1 file\n" in out
    assert "neither JPEG, PNG, BMP nor PPM: 1 file\n" in out
    assert "unreadable: 0 files\n" in out
    assert "advice" not in out


def spoiled(root):
    write_folder(root, count=4)
    write(root / "train/ant/1.png", b"")
    write(root / "train/bee/2.png", image(1)[:-30])
    write(root / "test/bee/3.png", b"just text")
    return root


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
@pytest.mark.parametrize("words", [[], ["--on-bad-image", "skip"]])
def test_check_names_every_unreadable_file_and_ends_with_3(capsys, root, kind, words):
    path = archived(spoiled(root), kind)
    found = checked(capsys, path, *words, code=3)
    reasons = {bad["path"]: bad["reason"] for bad in found["unreadable"]}
    assert list(reasons) == ["train/ant/1.png", "train/bee/2.png", "test/bee/3.png"]
    assert reasons["train/ant/1.png"] == "empty"
    assert "cannot identify" in reasons["test/bee/3.png"]
    assert sum(size["images"] for size in found["sizes"]) == 13
    assert (found["grey"], found["odd"]) == (0, 0)
    # 3 of 16 are above the limit of skip, which the advice therefore names
    assert found["advice"][0].endswith("--on-bad-image skip --bad-limit 0.19")
    code, out, err = run(capsys, "check", path, *words)
    assert code == 3
    assert err == f"fastcnn: {path}: 3 files of 16 cannot be read\n"
    assert "unreadable: 3 files\n" in out
    for name, reason in reasons.items():
        assert f"  {name}: {reason}\n" in out


@pytest.mark.parametrize("make", [spoiled, lambda root: archived(spoiled(root), "zip")])
def test_check_and_training_name_a_folder_alike(capsys, root, make):
    path = make(root)
    given = f"{path.parent}/./{path.name}"
    _, out, err = run(capsys, "check", given)
    with pytest.raises(DataError) as refused:
        load(given)
    assert str(refused.value).startswith(f"{path}: 3 unreadable")
    assert out.startswith(f"{path}: ")
    assert err.startswith(f"fastcnn: {path}: 3 files")


def test_the_advice_of_check_is_accepted_by_pack(capsys, root):
    limit = checked(capsys, spoiled(root), code=3)["advice"][0].split()[-1]
    skip = ["--on-bad-image", "skip"]
    assert run(capsys, "pack", root)[0] == 3
    assert run(capsys, "pack", root, *skip)[0] == 3
    code, out, _ = run(capsys, "pack", root, *skip, "--bad-limit", limit)
    assert code == 0
    assert "13 images (train 6, test 7)" in out
    assert "left out, unreadable: 3 files" in out


def test_check_sees_a_file_that_is_mended_or_spoiled_since(capsys, root):
    path = spoiled(root) / "train/ant/1.png"
    assert len(checked(capsys, root, code=3)["unreadable"]) == 3
    write(path, image(5))
    assert len(checked(capsys, root, code=3)["unreadable"]) == 2
    write(root / "train/bee/0.png", b"x")
    assert len(checked(capsys, root, code=3)["unreadable"]) == 3


def test_check_says_that_a_folder_is_split_by_fraction(capsys, root):
    write_folder(root, ("",), count=10)
    assert checked(capsys, root, "--test-fraction", "0.3")["test_fraction"] == 0.3
    _, out, _ = run(capsys, "check", root)
    assert "split by --test-fraction 0.2: there is no test/" in out


def test_check_of_tiny_imagenet(capsys, tmp_path):
    members = tiny_members()
    root = write_members(tmp_path / "tiny", members)
    path = write_zip(tmp_path / "x.zip", {f"tiny/{name}": data for name, data in members.items()})
    for where, kind in ((root, "folder of Tiny ImageNet"), (path, "archive")):
        found = checked(capsys, where)
        assert found["kind"] == kind
        assert found["classes"]["bee"] == {"train": 3, "test": 2}
    assert checked(capsys, "tiny-imagenet", "--data-dir", root)["images"] == 15
    write(root / "val/images/val_1.JPEG", b"x")
    bad = checked(capsys, root, code=3)["unreadable"]
    assert [found["path"] for found in bad] == ["val/images/val_1.JPEG"]


def test_check_of_a_name(capsys):
    found = checked(capsys, "digits")
    assert found["images"] == 1797
    assert found["sizes"] == [{"width": 32, "height": 32, "images": 1797}]


def test_check_refuses_a_layout_that_training_refuses(capsys, root):
    write(root / "train/ant/0.png", image())
    write(root / "test/bee/0.png", image())
    code, out, err = run(capsys, "check", root)
    assert (code, out) == (3, "")
    assert "class 'ant' is in the train images, not in test" in err


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_check_names_one_class_as_training_does(capsys, root, kind):
    path = archived(write_folder(root, ("",), ("ant",)), kind)
    code, out, err = run(capsys, "check", path)
    assert (code, out) == (3, "")
    assert err == f"fastcnn: {path}: one class only (ant); two are needed\n"
    with pytest.raises(DataError) as refused:
        load(path)
    assert err == f"fastcnn: {refused.value}\n"


def test_one_image_is_singular(capsys, root):
    write_folder(root, ("",), ("ant", "bee"), count=2)
    write(root / "ant/1.png", image(side=16))
    _, out, _ = run(capsys, "check", root)
    assert "  16 x 16: 1 image (25.0%)\n" in out
    assert "  8 x 8: 3 images (75.0%)\n" in out


def test_many_classes_are_summed_up(capsys, root):
    write_folder(root, classes=[f"c{i:02}" for i in range(21)], count=1)
    write(root / "train/c07/more.png", image())
    _, out, _ = run(capsys, "check", root)
    assert "1 to 2 a class, median 1 (fewest: c00, most: c07)" in out
    assert "c03" not in out


def test_uneven_classes_and_many_sizes(capsys, root):
    write_folder(root, count=1)
    for i in range(11):
        write(root / f"train/ant/x{i}.png", encoded(noise((40 + i, 60, 3))))
    found = checked(capsys, root)
    assert found["advice"][0] == "the images have 12 sizes: give --image-size 40"
    assert found["advice"][-1] == "uneven classes: ant has 12 training images, bee 1"
    _, out, _ = run(capsys, "check", root)
    assert "  7 more, 8 x 8 to 60 x 50\n" in out


@pytest.mark.parametrize("sizes", [{0: 1}, {0: 1, 1: 500}, {2: 500}])
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_check_and_training_advise_the_same_size(capsys, root, kind, sizes):
    """Numbers of images and their sides: an outlier says nothing, not even the first image."""
    write_folder(root, count=8, side=24)
    for number, side in sizes.items():
        write(root / f"train/ant/{number}.png", image(side=side))
    path = archived(root, kind)
    assert "give --image-size 24" in checked(capsys, path)["advice"][0]
    code, _, err = run(capsys, "pack", path)
    assert code == 3
    assert err.endswith("e.g. --image-size 24\n")
    with pytest.raises(DataError, match=r"e\.g\. --image-size 24$"):
        load(path, **IN_FILES)


def test_the_size_that_is_advised_is_one_that_is_taken():
    def advised(*sides):
        return advised_side({(900, side): 1 for side in sides})

    assert [advised(1), advised(3, 5), advised(33), advised(100, 101, 102)] == [8, 8, 32, 96]
    assert advised(500) == 224
    for side in (1, 2000):
        options_by_name()["image_size"].check(advised(side))


# Pack


def test_pack_says_where_and_the_second_time_that_it_is_there(capsys, root, tmp_path):
    write_folder(root)
    code, out, err = run(capsys, "pack", root, "--image-size", "16")
    assert (code, err) == (0, "")
    assert f"{root}: packed 12 images (train 6, test 6) of 16 x 16 pixels in " in out
    assert " images/s\n" in out
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    total = sum(file.stat().st_size for file in entry.iterdir())
    assert f"  {entry}: {total:,} bytes\n" in out
    _, out, _ = run(capsys, "pack", root, "--image-size", "16")
    assert f"{root}: 12 images (train 6, test 6) of 16 x 16 pixels are packed already" in out
    _, out, _ = run(capsys, "pack", root, "--image-size", "16", "--json")
    again = json.loads(out)
    assert (again["new"], again["seconds"], again["images_per_s"]) == (False, None, None)
    _, out, _ = run(capsys, "pack", root, "--json")
    other = json.loads(out)
    assert other["new"]
    assert other["images_per_s"] > 0
    assert other["entry"] != again["entry"]


def test_training_takes_what_was_packed(capsys, root):
    write_folder(root)
    run(capsys, "pack", root)
    dataset = load_dataset(DataConfig(data=str(root)), 32)
    _, out, _ = run(capsys, "pack", root, "--json")
    assert report._entry_of(dataset.train) == report._entry_of(dataset.test)
    assert json.loads(out)["entry"] == str(report._entry_of(dataset.train))
    assert not json.loads(out)["new"]


def test_pack_of_an_archive_and_without_grey_images(capsys, root):
    path = archived(odd_folder(root), "zip")
    _, out, _ = run(capsys, "pack", path, "--image-size", "8", "--grayscale", "drop")
    assert "10 images (train 6, test 4)" in out
    assert "left out, grey: 1 file\n" in out


# Show


def test_show_counts_measures_and_draws(capsys, root, tmp_path):
    write_folder(root, ("train", "val", "test"))
    code, out, err = run(capsys, "show", root)
    assert (code, err) == (0, "")
    assert "2 classes, train 6, val 6, test 6 images of 8 x 8 pixels" in out
    assert "  mean of red, green, blue: 0." in out
    assert "  show-images/classes.png\n" in out
    for name in ("classes.png", "samples.png"):
        with Image.open(tmp_path / "here" / "show-images" / name) as drawn:
            assert drawn.format == "PNG"
            drawn.load()
    _, out, _ = run(capsys, "show", root, "--output", "a/b", "--json")
    found = json.loads(out)
    assert found["figures"] == ["a/b/classes.png", "a/b/samples.png"]
    assert found["classes"]["ant"] == {"train": 3, "val": 3, "test": 3}
    dataset = load_dataset(DataConfig(data=str(root)), 32)
    fitted = Normalization.fit(dataset.train, "zscore")
    assert (found["mean"], found["std"]) == (list(fitted.mean), list(fitted.std))
    pixels = dataset.train.pixels.astype(np.float64) / 255
    assert found["mean"] == pytest.approx(pixels.mean((0, 1, 2)))
    assert found["std"] == pytest.approx(pixels.std((0, 1, 2)))


def test_show_of_different_sizes_names_the_option(capsys, root, tmp_path):
    code, _, err = run(capsys, "show", odd_folder(root))
    assert code == 3
    assert "--image-size" in err
    assert list((tmp_path / "here").iterdir()) == []


@pytest.mark.full
def test_show_without_matplotlib_still_measures(tmp_path):
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from fastcnn.cli import main\n"
        "sys.exit(main(['data', 'show', 'digits']))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "note: data show: matplotlib is missing; see fastcnn doctor" in found.stderr
    assert "mean of red" in found.stdout


def test_samples_come_from_every_class_before_any_comes_twice():
    labels = np.array([0] * 50 + [1] * 3 + [2] * 20)
    chosen = report.draw_samples(labels, 10, 0)
    assert len(set(chosen.tolist())) == 10
    drawn = labels[chosen]
    assert (np.diff(drawn) >= 0).all()
    assert np.bincount(drawn).tolist() in ([4, 3, 3], [3, 3, 4])
    assert sorted(labels[report.draw_samples(labels, 3, 7)]) == [0, 1, 2]
    assert len(report.draw_samples(labels, 1000, 0)) == 73
    assert report.draw_samples(labels, 10, 0).tolist() == chosen.tolist()
    assert report.draw_samples(labels, 10, 1).tolist() != chosen.tolist()
    few = {tuple(sorted(labels[report.draw_samples(labels, 2, seed)])) for seed in range(30)}
    assert few == {(0, 1), (0, 2), (1, 2)}


def drawn(monkeypatch):
    """Catch the figure instead of writing it."""
    caught = []
    monkeypatch.setattr(figures, "save", lambda figure, path: caught.append(figure) or path)
    return caught


def counts_of(classes):
    return {f"class {i}": {"train": 10 + i % 7, "val": 2, "test": 3} for i in range(classes)}


@pytest.mark.parametrize(("classes", "panels"), [(2, 1), (50, 1), (51, 2), (200, 4)])
def test_histogram_names_every_class(tmp_path, monkeypatch, classes, panels):
    caught = drawn(monkeypatch)
    data_figures.draw_histogram(tmp_path, "x", counts_of(classes))
    axes = caught[0].axes
    assert len(axes) == panels
    names = [tick.get_text() for axis in axes for tick in axis.get_yticklabels()]
    assert names == list(counts_of(classes))
    widths = [bar.get_width() for axis in axes for bar in axis.containers[0]]
    assert widths == [10 + i % 7 for i in range(classes)]
    last = axes[-1].containers[2][-1]
    assert (last.get_x(), last.get_width()) == (12 + (classes - 1) % 7, 3)
    total = sum(sum(of_class.values()) for of_class in counts_of(classes).values())
    assert axes[0].get_title("left") == f"x: {total:,} images in {classes} classes"


def test_histogram_of_many_classes_is_sorted(tmp_path, monkeypatch):
    caught = drawn(monkeypatch)
    data_figures.draw_histogram(tmp_path, "x", counts_of(300))
    (axis,) = caught[0].axes
    heights = [bar.get_height() for bar in axis.containers[0]]
    assert heights == sorted(heights, reverse=True)
    expected = "classes by their training images: class 6 (16) … class 294 (10)"
    assert axis.get_xlabel() == expected


@pytest.mark.full
@pytest.mark.parametrize("classes", [2, 60, 300])
def test_long_names_leave_room_for_bars_and_images(tmp_path, classes):
    names = [f"{i:03}{'W' * 200}" for i in range(classes)]
    pixels, labels = noise((classes, 4, 4, 3))[:40], np.arange(classes)[:40]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counts = {name: {"train": 1, "test": 1} for name in names}
        data_figures.draw_histogram(tmp_path, "W" * 200, counts)
        data_figures.draw_samples(tmp_path, "W" * 200, pixels, labels, names)


def test_grid_shows_pixels_and_names(tmp_path, monkeypatch):
    caught = drawn(monkeypatch)
    pixels, labels = noise((12, 4, 6, 3)), np.arange(12) // 6
    names = ["$a$", "a name of more than eighteen", "unseen"]
    data_figures.draw_samples(tmp_path, "x", pixels, labels, names)
    axes = caught[0].axes
    assert len(axes) == 20
    assert np.array_equal(axes[7].images[0].get_array(), pixels[7])
    assert axes[0].get_title() == r"\$a\$"
    assert axes[6].get_title() == "a name of more th…"
    assert not axes[12].images
    assert caught[0].get_suptitle() == "x: 12 training images, drawn from 2 of 3 classes"
