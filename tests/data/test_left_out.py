"""Bad and grey images: refused by name, or left out, counted and listed, in files and packed."""

import csv
import json
import logging
import re

import numpy as np
import pytest
from image_files import (
    IN_FILES,
    encoded,
    image,
    large_png,
    load,
    members_of,
    noise,
    write,
    write_folder,
    write_tar,
)
from small_runs import assert_same, final_state, stop_at_check

from fastcnn.cli import main
from fastcnn.data import examine, store
from fastcnn.errors import DataError

pytestmark = pytest.mark.usefixtures("own_cache")

PACKED = {"store": "packed"}
SKIP = {"on_bad_image": "skip", "bad_limit": 0.5}
GREY = encoded(noise((8, 8)))


@pytest.fixture(params=["packed", "files", "tar"])
def load_as(request, tmp_path):
    """Loads a folder in every way that images are kept."""

    def loaded(root, **options):
        if request.param != "tar":
            return load(root, **(IN_FILES if request.param == "files" else PACKED), **options)
        archive = tmp_path / "images.tar"
        if not archive.exists():
            # in an order of its own, as archives are
            members = dict(sorted(members_of(root).items(), key=lambda item: item[1]))
            write_tar(archive, members)
        return load(archive, **options)

    return loaded


def rows(images):
    return [(bytes(p), int(n)) for p, n in zip(pixels(images), images.labels, strict=True)]


def pixels(images):
    return images.pixels_of(range(len(images)))


def damaged(root):
    """12 images, of which one of each split is bad, and one of train is grey."""
    write_folder(root)
    write(root / "train/ant/1.png", b"")
    write(root / "test/bee/0.png", image()[:70])
    write(root / "train/bee/2.png", GREY)
    return root


def remaining(root):
    """The same without the bad ones."""
    (root / "train/ant/1.png").unlink()
    (root / "test/bee/0.png").unlink()
    return root


def test_what_is_left_out_leaves_no_hole(root, load_as):
    found = load_as(damaged(root), **SKIP)
    assert {path for path, _ in found.left_out.bad} == {"train/ant/1.png", "test/bee/0.png"}
    assert dict(found.left_out.bad)["train/ant/1.png"] == "empty"
    assert found.left_out.grey == 0
    expected = load(remaining(root))
    assert rows(found.train) == rows(expected.train)
    assert rows(found.test) == rows(expected.test)
    assert found.digest == expected.digest
    assert expected.left_out.bad == ()


def test_grey_images_are_left_out(root, load_as, caplog):
    caplog.set_level(logging.INFO)
    write(write_folder(root, ("train", "test", "val")) / "train/bee/2.png", GREY)
    write(root / "val/ant/0.png", GREY)
    found = load_as(root, grayscale="drop")
    assert "2 of 18 images left out, grey" in caplog.text
    assert found.left_out.grey == 2
    assert [len(images) for images in (found.train, found.test, found.val)] == [5, 6, 5]
    assert len(load_as(root).train) == 6
    for name in ("train/bee/2.png", "val/ant/0.png"):
        (root / name).unlink()
    expected = load(root)
    assert found.digest == expected.digest
    for name in ("train", "test", "val"):
        assert rows(getattr(found, name)) == rows(getattr(expected, name))


def test_grey_and_bad_together(root, load_as):
    found = load_as(damaged(root), grayscale="drop", **SKIP)
    assert (len(found.left_out.bad), found.left_out.grey) == (2, 1)
    assert (len(found.train), len(found.test)) == (4, 5)


def test_what_was_left_out_comes_back_with_a_cached_start(root, load_as, monkeypatch, caplog):
    first = load_as(damaged(root), **SKIP)
    monkeypatch.setattr(examine, "decode", None)
    caplog.clear()
    again = load_as(root, **SKIP)
    assert again.left_out == first.left_out
    assert again.digest == first.digest
    assert "2 of 12 images left out, unreadable: " in caplog.text
    with pytest.raises(DataError, match="2 unreadable image files: "):
        load_as(root)
    with pytest.raises(DataError, match=r"2 unreadable .* of 12, more than --bad-limit 0\.1 "):
        load_as(root, on_bad_image="skip", bad_limit=0.1)


@pytest.mark.parametrize(("limit", "allowed"), [(0.1667, True), (0.1666, False), (0.0, False)])
def test_limit(root, load_as, limit, allowed):
    damaged(root)
    if allowed:
        assert len(load_as(root, on_bad_image="skip", bad_limit=limit).left_out.bad) == 2
        return
    with pytest.raises(DataError, match=f"2 unreadable .* of 12, more than --bad-limit {limit:g}"):
        load_as(root, on_bad_image="skip", bad_limit=limit)


def test_every_unreadable_file_is_listed(root, load_as):
    write_folder(root, count=8)
    for i in range(7):
        write(root / f"train/ant/{i}.png", b"not, an image")
    with pytest.raises(DataError, match=r"7 unreadable .*; and 4 more, all listed in ") as error:
        load_as(root)
    assert "\n" not in str(error.value)
    listed = re.search(r"listed in (\S+\.csv)", str(error.value))[1]
    with open(listed, newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["path", "reason"]
    expected = [[f"train/ant/{i}.png", "cannot identify image file"] for i in range(7)]
    assert sorted(table[1:]) == expected


@pytest.mark.parametrize(
    ("data", "options"), [(b"", SKIP), (GREY, {"grayscale": "drop"}), (b"x", SKIP)]
)
def test_a_class_without_images_is_an_error(root, load_as, data, options):
    write_folder(root)
    for i in range(3):
        write(root / f"test/bee/{i}.png", data)
    with pytest.raises(DataError, match="class 'bee' has no test images left"):
        load_as(root, **options)


def test_nothing_left_is_an_error(root, load_as):
    for path in members_of(write_folder(root)):
        write(root / path, b"text")
    with pytest.raises(DataError, match="12 unreadable"):
        load_as(root)
    with pytest.raises(DataError, match="has no train images left"):
        load_as(root, on_bad_image="skip", bad_limit=1.0)


def test_sizes_of_what_is_left_out_do_not_count(root, load_as):
    write(write_folder(root) / "train/ant/0.png", encoded(noise((20, 20))))
    assert load_as(root, grayscale="drop").train.sides == (8, 8)
    with pytest.raises(DataError, match="different sizes"):
        load_as(root)


def test_sizes_are_compared_in_a_known_scan_too(root):
    write(write_folder(root) / "train/ant/2.png", encoded(noise((20, 20))))
    load(root, grayscale="drop", **IN_FILES)
    with pytest.raises(DataError, match=r"train/ant/2\.png has 20 x 20 .*train/ant/0\.png 8 x 8"):
        load(root, **IN_FILES)


@pytest.mark.parametrize("copied", [1, 1 << 24])
def test_gaps_anywhere_are_closed(root, monkeypatch, copied):
    monkeypatch.setattr(store, "COPIED_BYTES", copied)
    monkeypatch.setattr(examine, "CHUNK", 3)
    write_folder(root, count=20)
    bad = [0, 1, 5, 9, 10, 11, 19]
    for i in bad:
        write(root / f"train/ant/{i}.png", b"")
        write(root / f"train/bee/{i}.png", b"")
    found = load(root, **PACKED, **SKIP)
    kept = sorted(str(i) for i in range(20) if i not in bad)
    expected = [noise((8, 8, 3), seed=base + int(i)) for base in (0, 10) for i in kept]
    assert np.array_equal(pixels(found.train), expected)
    assert found.train.labels.tolist() == [0] * 13 + [1] * 13


# A run on a folder of which one file in a hundred is bad

BAD = {
    "train/ant/empty.png": b"",
    "train/ant/cut.jpg": encoded(noise((32, 32, 3)), "JPEG")[:500],
    "train/bee/garbage.png": bytes(range(256)) * 20,
    "test/ant/text.jpg": b"this is a text",
    "train/bee/huge.png": large_png(20_000),
}


@pytest.fixture(scope="module")
def corrupt(tmp_path_factory):
    """500 images, 5 of them bad."""
    root = write_folder(
        tmp_path_factory.mktemp("corrupt") / "images", ("train",), count=200, side=32
    )
    write_folder(root, ("test",), count=48, side=32)
    write(root / "test/ant/more.png", image(7, 32))
    write(root / "train/bee/grey.png", encoded(noise((32, 32))))
    write(root / "train/bee/more.png", image(9, 32))
    for path, data in BAD.items():
        write(root / path, data)
    assert len(members_of(root)) == 504
    return root


def words(root, tmp_path, **options):
    fixed = {
        "arch": "murgolo-improved",
        "data": root,
        "batch_size": 64,
        "epochs": 1,
        "threads": 1,
        "backend": "torch",
        "output": tmp_path,
        "name": "run",
    }
    named = {**fixed, **options}.items()
    return [
        "train",
        "--quiet",
        *(word for k, v in named for word in (f"--{k.replace('_', '-')}", str(v))),
    ]


STORES = [pytest.param({"loader": "resident"}, id="packed"), pytest.param(IN_FILES, id="files")]


@pytest.mark.parametrize("options", STORES)
def test_a_corrupt_folder_is_refused_by_name(corrupt, tmp_path, capsys, options):
    assert main(words(corrupt, tmp_path, **options)) == 3
    line = capsys.readouterr().err
    assert re.search(r"5 unreadable image files: train/\S+: .*; and 2 more, all listed in", line)
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.parametrize("options", STORES)
def test_a_corrupt_folder_is_trained_on_without_the_bad(corrupt, tmp_path, capsys, options):
    limit = {"on_bad_image": "skip", "bad_limit": 0.009}
    assert main(words(corrupt, tmp_path, **options, **limit)) == 3
    assert "more than --bad-limit 0.009" in capsys.readouterr().err
    wanted = words(corrupt, tmp_path, **options, on_bad_image="skip", grayscale="drop")
    assert main(wanted) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["bad_images"], summary["grey_images_dropped"]) == (5, 1)
    assert summary["images"] == {"train": 401, "test": 97}
    with open(tmp_path / "run" / "bad_images.csv", newline="") as file:
        listed = dict(list(csv.reader(file))[1:])
    assert listed.keys() == BAD.keys()
    assert listed["train/bee/huge.png"] == "more than 89478485 pixels"
    assert listed["train/ant/empty.png"] == "empty"


@pytest.mark.full
def test_a_run_goes_on_from_files_or_packed(corrupt, tmp_path, capsys, monkeypatch):
    options = {"on_bad_image": "skip", "loader": "torch", "workers": 0, "epochs": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(words(corrupt, tmp_path, name="whole", store="files", **options)) == 0
    with monkeypatch.context() as patch:
        stop_at_check(patch, 3)
        assert main(words(corrupt, tmp_path, name="cut", store="files", **options)) != 0
    (cut / "bad_images.csv").unlink()
    resume = ["train", "--resume", str(cut), "--quiet", "--allow-changes"]
    assert main([*resume, "--grayscale", "drop"]) == 2
    assert "grayscale cannot change in mid-run" in capsys.readouterr().err
    assert main([*resume, "--on-bad-image", "refuse"]) == 3
    assert main([*resume, "--store", "packed", "--bad-limit", "0.5"]) == 0
    assert_same(final_state(cut), final_state(whole))
    summaries = [json.loads((path / "summary.json").read_text()) for path in (whole, cut)]
    assert summaries[0]["bad_images"] == summaries[1]["bad_images"] == 5
    assert (cut / "bad_images.csv").read_text() == (whole / "bad_images.csv").read_text()


def test_what_was_left_out_is_announced(corrupt, tmp_path, capsys, caplog):
    wanted = words(corrupt, tmp_path, loader="auto", on_bad_image="skip", grayscale="drop")
    wanted.remove("--quiet")
    assert main(wanted) == 0
    said = "".join(capsys.readouterr())
    assert "images left out: 5 unreadable (see bad_images.csv), 1 grey" in said
    assert "\n--loader auto is resident: " in said


def test_evaluation_takes_the_view_from_the_run(corrupt, tmp_path, capsys):
    options = {"image_size": 24, "resize": "crop", "on_bad_image": "skip"}
    assert main(words(corrupt, tmp_path, loader="resident", **options)) == 0
    other = write_folder(tmp_path / "other", count=6, side=40)
    write(other / "test/ant/0.png", b"")
    evaluate = ["eval", str(tmp_path / "run"), "--data", str(other), "--threads", "1"]
    evaluate += ["--backend", "torch", "--json"]
    capsys.readouterr()
    assert main([*evaluate, "--on-bad-image", "refuse"]) == 3
    assert "test/ant/0.png: empty" in capsys.readouterr().err
    assert main([*evaluate, "--on-bad-image", "skip", "--bad-limit", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["bad_images"]) == (11, 1)
    in_files = ["--store", "files", "--loader", "torch", "--bad-limit", "0.1"]
    assert main([*evaluate, *in_files]) == 0
    again = json.loads(capsys.readouterr().out)
    assert (again["top1"], again["loss"]) == (found["top1"], found["loss"])
