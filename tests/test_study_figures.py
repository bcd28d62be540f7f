"""Figures of a study: both formats, the numbers they show, extremes, the same bytes twice."""

import math
import xml.etree.ElementTree as ET

import pytest
from PIL import Image

from fastcnn.insight.study_bars import Bar, draw_bars, draw_histogram
from fastcnn.insight.study_figures import Curves, draw_curves, draw_losses, draw_panels
from fastcnn.insight.study_lines import spread

NAMES = ("train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "lr")


def history(epochs=5, start=2.3, rate=0.8):
    rows = {"epoch": [float(i + 1) for i in range(epochs)]}
    for name in NAMES:
        falling = [start * rate**i for i in range(epochs)]
        rows[name] = falling if "loss" in name or name == "lr" else [1 - v / 2.5 for v in falling]
    return rows


def curves(label="CNN A", runs=2, **options):
    return Curves(label, tuple(history(rate=0.8 - 0.05 * i, **options) for i in range(runs)))


def bars(count=3):
    return [
        Bar(f"row {i}", 50.0 + i, (48.0 + i, 52.0 + i), (49.0, 51.5), 55.0, (50.0, 60.0))
        for i in range(count)
    ]


DRAWN = {
    "bars": lambda folder, n: draw_bars(folder, "x", "Title", bars(n)),
    "curves": lambda folder, n: draw_curves(
        folder, "x", "Title", [curves(f"row {i}") for i in range(n)]
    ),
    "panels": lambda folder, n: draw_panels(
        folder, "x", "Title", [curves(f"row {i}") for i in range(n)], "top1"
    ),
    "losses": lambda folder, n: draw_losses(
        folder, "x", "Title", [curves(f"row {i}") for i in range(n)]
    ),
    "histogram": lambda folder, n: draw_histogram(
        folder, "x", "Title", {f"row {i}": [0.1 * i, 0.2] for i in range(min(n, 2))}, 0.15
    ),
}


def texts(path):
    """What an SVG says."""
    root = ET.parse(path).getroot()
    return ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("count", [1, 3, 14])
@pytest.mark.parametrize("kind", DRAWN)
def test_both_formats_and_every_label(tmp_path, kind, count):
    png, svg = DRAWN[kind](tmp_path, count)
    with Image.open(png) as image:
        assert image.format == "PNG"
        assert 500 < image.width < 1600
    assert png.stat().st_size < 200_000
    said = " ".join(texts(svg))
    assert "Title" in said
    wanted = range(min(count, 2) if kind == "histogram" else count)
    if kind != "curves" or count > 1:
        assert all(f"row {i}" in said for i in wanted)


@pytest.mark.parametrize("kind", DRAWN)
def test_the_same_figure_is_the_same_bytes(tmp_path, kind):
    first = [path.read_bytes() for path in DRAWN[kind](tmp_path / "a", 2)]
    second = [path.read_bytes() for path in DRAWN[kind](tmp_path / "b", 2)]
    assert first == second


def test_bars_tell_ours_and_published(tmp_path):
    _, svg = draw_bars(tmp_path, "x", "Title", [Bar("A", 61.25, None, (), 59.3, (54.9, 62.6))])
    said = texts(svg)
    assert "61.2" in said
    assert "59.3" in said
    assert any("published" in text for text in said)


def test_bars_without_anything_published_do_not_speak_of_it(tmp_path):
    _, svg = draw_bars(tmp_path, "x", "Title", [Bar("A", 61.25), Bar("B", None)])
    said = texts(svg)
    assert not any("published" in text for text in said)
    assert "not run" in said


def test_panels_tell_the_last_value(tmp_path):
    one = Curves("A", (history(3),))
    _, svg = draw_panels(tmp_path, "x", "Title", [one], "loss")
    assert f"{2.3 * 0.8**2:.3f}" in texts(svg)


@pytest.mark.parametrize("label", ["a $b$ & <c> é", "x" * 80, "line\nbreak", "\x00 control"])
def test_any_label(tmp_path, label):
    draw_bars(tmp_path, "b", label, [Bar(label, 1.0)])
    _, svg = draw_losses(tmp_path, "l", label, [curves(label)])
    ET.parse(svg)


@pytest.mark.parametrize(
    "histories",
    [
        (history(1),),
        (history(1), history(4)),
        (history(3, rate=1.0),),
        (history(3) | {"train_loss": [2.0, math.nan, math.inf]},),
        (history(2, start=1e30),),
        (),
    ],
    ids=["one epoch", "uneven", "constant", "not finite", "huge", "no run"],
)
def test_extremes(tmp_path, histories):
    one = Curves("A", histories)
    for path in (
        *draw_curves(tmp_path, "c", "Title", [one]),
        *draw_losses(tmp_path, "l", "Title", [one, one]),
        *draw_panels(tmp_path, "p", "Title", [one], "loss"),
    ):
        assert path.stat().st_size > 500


def test_spread_is_the_mean_and_the_extremes_by_epoch():
    first, second = history(3), history(2, start=4.6)
    found = spread([first, second], "train_loss")
    assert found.epochs == (1.0, 2.0, 3.0)
    assert found.mean[0] == pytest.approx((2.3 + 4.6) / 2)
    assert (found.low[1], found.high[1]) == (first["train_loss"][1], second["train_loss"][1])
    assert found.mean[2] == first["train_loss"][2]
    assert found.last == pytest.approx((first["train_loss"][2] + second["train_loss"][1]) / 2)


def test_spread_marks_where_a_run_was_lost():
    lost = history(3) | {"train_loss": [2.0, math.nan, math.nan]}
    found = spread([lost, history(3)], "train_loss", 100)
    assert found.lost == ((1.0, 200.0),)
    assert found.mean[1] == pytest.approx(100 * history(3)["train_loss"][1])
    assert math.isnan(found.last)


def test_a_histogram_of_one_value_and_of_none(tmp_path):
    draw_histogram(tmp_path, "one", "Title", {"in": [0.5, 0.5], "out": [0.5]}, None)
    _, svg = draw_histogram(tmp_path, "none", "Title", {"in": [], "out": []}, 0.25)
    assert any("threshold 0.25" in text for text in texts(svg))
