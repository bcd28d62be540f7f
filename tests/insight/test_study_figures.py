"""Figures of a study: what is drawn, in both formats, for usual and extreme content."""

import math
import xml.etree.ElementTree as ElementTree

import pytest
from PIL import Image

from fastcnn.insight.drawing import study_bars, study_figures, study_lines
from fastcnn.insight.drawing.study_figures import (
    Bar,
    Curves,
    draw_bars,
    draw_curves,
    draw_histogram,
    draw_losses,
    draw_panels,
)

ODD = "<lr> & $a$ Σ\x1b犬 "


def history(values):
    """A run whose losses are `values`, and whose accuracies follow from them."""
    accuracy = [
        min(1.0, max(0.0, 1 - value / 4)) if math.isfinite(value) else 0.1 for value in values
    ]
    return {
        "epoch": [float(i + 1) for i in range(len(values))],
        "train_loss": list(values),
        "train_top1": accuracy,
        "val_loss": [value + 1 for value in values],
        "val_top1": [value / 2 for value in accuracy],
        "val_top5": [0.5 + value / 2 for value in accuracy],
        "lr": [0.1] * len(values),
    }


FULL = Bar("CNN A", 60.3, (59.0, 61.5), (59.1, 60.2, 61.6), 57.7, (56.1, 59.7))
TWO = Curves("CNN A", (history([2.0, 1.0, 0.5]), history([3.0, 2.0, 1.5])))
LOST = Curves("lost", (history([2.0, 1.0, math.nan]), history([2.0, math.inf, math.nan, math.nan])))
NEVER = Curves("never", (history([math.nan, math.nan]),))
FLAT = Curves("flat", (history([2.3026] * 4),))
ONE = Curves("one", (history([2.0]), history([3.0])))
EVERY = [TWO, LOST, NEVER, FLAT, ONE, Curves(ODD, (history([1.0, 0.9]),)), Curves("none", ())]


@pytest.fixture
def caught(monkeypatch):
    """Figures instead of their files."""
    figures = []
    for module in (study_bars, study_figures):
        monkeypatch.setattr(module, "save_both", lambda figure, *_: figures.append(figure))
    return figures


def texts(path):
    return "\n".join(ElementTree.parse(path).getroot().itertext())


def said(figure):
    """Every text of a caught figure."""
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


DRAWINGS = {
    "bars": lambda folder: draw_bars(folder, "f", "title", [FULL, Bar(ODD, 3.0)]),
    "curves": lambda folder: draw_curves(folder, "f", "title", EVERY, ("loss",)),
    "losses": lambda folder: draw_losses(folder, "f", "title", EVERY),
    "panels": lambda folder: draw_panels(folder, "f", "title", [TWO, LOST, EVERY[5]], "loss"),
    "histogram": lambda folder: draw_histogram(
        folder, "f", "title", {ODD: [0.1, 0.2, math.nan], "CNN A": []}, 0.15
    ),
}


@pytest.mark.parametrize("kind", DRAWINGS)
@pytest.mark.filterwarnings("error")
def test_both_formats_are_written_with_their_words_and_the_same_bytes_again(tmp_path, kind):
    png, svg = DRAWINGS[kind](tmp_path / "new")
    assert (png, svg) == (tmp_path / "new" / "f.png", tmp_path / "new" / "f.svg")
    with Image.open(png) as image:
        image.load()
        assert (image.format, image.mode) == ("PNG", "P")
        assert 500 <= image.width <= 1500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 3
    assert png.stat().st_size < 120_000
    words = texts(svg)
    for word in ("title", "CNN A", "<lr> & $a$ Σ�犬"):
        assert word in words
    first = png.read_bytes(), svg.read_bytes()
    again = DRAWINGS[kind](tmp_path / "again")
    assert first == (again[0].read_bytes(), again[1].read_bytes())
    assert b"dc:date" not in first[1]


def test_nothing_of_a_usual_figure_is_cut_at_its_edges(tmp_path):
    long = "a label that is far too long for the place beside its bar, " * 3
    bars = [Bar(long, 99.9, (99.0, 100.0), (), None, (98.0, 100.0)), FULL]
    for png, _ in (
        draw_bars(tmp_path, "bars", long, bars),
        draw_losses(tmp_path, "losses", long, [Curves(long, TWO.histories)] * 3),
    ):
        with Image.open(png) as image:
            grey = image.convert("L")
        for edge in ((0, 0, 3, grey.height), (grey.width - 3, 0, grey.width, grey.height)):
            assert grey.crop(edge).getextrema()[0] > 250
        for edge in ((0, 0, grey.width, 1), (0, grey.height - 1, grey.width, grey.height)):
            assert grey.crop(edge).getextrema()[0] > 250


def widths(axis):
    return [round(patch.get_width(), 3) for patch in axis.patches]


def spans(axis):
    """The ends of the whiskers."""
    return [
        tuple(round(float(x), 3) for x in segment[:, 0])
        for container in axis.containers
        if container.__class__.__name__ == "ErrorbarContainer"
        for segment in container[2][0].get_segments()
    ]


def test_a_group_has_published_above_ours_with_range_interval_and_runs(tmp_path, caught):
    draw_bars(tmp_path, "f", "t", [FULL], "top-5, %")
    axis = caught[0].axes[0]
    assert widths(axis) == [57.7, 60.3]
    assert spans(axis) == [(56.1, 59.7), (59.0, 61.5)]
    published, ours = (patch.get_y() for patch in axis.patches)
    assert published < ours  # the axis points down
    assert axis.get_ylim()[0] > axis.get_ylim()[1]
    assert [x for x, _ in axis.collections[-2].get_offsets()] == [59.1, 60.2, 61.6]
    assert axis.get_xlim()[0] == 0
    for word in ("57.7", "60.3", "CNN A", "top-5, %", "published, line: range", "single runs"):
        assert word in said(caught[0])


def test_missing_bars_leave_their_place_and_say_so(tmp_path, caught):
    bars = [
        Bar("a", None, published=50.0),
        Bar("b", 40.0),
        Bar("c", math.nan),
        Bar("d", 70.0, published_range=(68.0, 74.0)),
    ]
    draw_bars(tmp_path, "f", "t", bars)
    axis = caught[0].axes[0]
    assert widths(axis) == [50.0, 40.0, 70.0]
    assert spans(axis) == [(68.0, 74.0)]
    written = {text.get_text(): text.get_position() for text in axis.texts}
    assert [text.get_text() for text in axis.texts].count("not run") == 2
    assert [text.get_text() for text in axis.texts].count("not published") == 2
    assert written["68–74"][0] > 74
    centers = [patch.get_y() + patch.get_height() / 2 for patch in axis.patches]
    assert [round(center) for center in centers] == [0, 1, 3]
    assert centers[0] < 0
    assert centers[1] > 1


def test_without_anything_published_there_are_our_bars_alone(tmp_path, caught):
    draw_bars(tmp_path, "f", "t", [Bar("a", 0.25), Bar("b", 1234.0)])
    assert "not published" not in said(caught[0])
    assert not any("published" in word for word in said(caught[0]))
    assert "0.25" in said(caught[0])
    assert "1,234" in said(caught[0])


@pytest.mark.parametrize("count", [1, 14, 30])
def test_every_bar_has_room(tmp_path, caught, count):
    draw_bars(tmp_path, "f", "t", [Bar(f"n{i}", 50 + i, published=50.0) for i in range(count)])
    figure = caught[0]
    names = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert names == [f"n{i}" for i in range(count)]
    assert figure.get_figheight() > 0.5 * count + 0.8


def test_a_spread_is_the_mean_and_the_extremes_of_the_runs_that_got_there():
    found = study_lines.spread((history([2.0, 1.0, 0.5]), history([4.0, 2.0])), "train_loss", 10)
    assert found.epochs == (1, 2, 3)
    assert found.mean == (30, 15, 5)
    assert found.low == (20, 10, 5)
    assert found.high == (40, 20, 5)
    assert found.last == 12.5
    assert found.runs == 2
    assert found.lost == ()
    assert study_lines.spread((), "train_loss") is None
    assert study_lines.spread(({"epoch": [1.0]},), "train_loss") is None


def test_values_that_are_not_finite_end_a_run_and_are_not_averaged():
    found = study_lines.spread(LOST.histories, "train_loss")
    assert found.mean[:2] == (2.0, 1.0)
    assert all(map(math.isnan, found.mean[2:]))
    assert found.lost == ((2.0, 1.0), (1.0, 2.0))
    assert math.isnan(found.last)
    huge = study_lines.spread((history([1.5e308]), history([1.5e308])), "train_loss")
    assert huge.mean == (1.5e308,)
    assert study_lines.spread(NEVER.histories, "train_loss").lost == ()


def test_curves_of_one_variant(tmp_path, caught):
    draw_curves(tmp_path, "f", "t", [TWO])
    loss, top1, top5 = caught[0].axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[2.5, 1.5, 1.0], [3.5, 2.5, 2.0]]
    assert [line.get_color() for line in loss.lines] == [study_figures.TRAIN, study_figures.VAL]
    assert [list(line.get_ydata()) for line in top1.lines] == [
        [37.5, 62.5, 75.0],
        [18.75, 31.25, 37.5],
    ]
    assert [list(line.get_ydata()) for line in top5.lines] == [[68.75, 81.25, 87.5]]
    band = loss.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (0.5, 3.0)
    assert [axis.get_title("left") for axis in caught[0].axes] == ["loss", "top-1, %", "top-5, %"]
    words = said(caught[0])
    assert {"training", "validation", "line: mean of the runs, band: min to max"} <= {*words}


def test_curves_of_several_variants_have_a_colour_each(tmp_path, caught):
    draw_curves(tmp_path, "f", "t", [TWO, FLAT], ("top1",))
    (axis,) = caught[0].axes
    colors = [line.get_color() for line in axis.lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    assert axis.lines[0].get_linewidth() < axis.lines[1].get_linewidth()
    assert len(axis.collections) == 1  # the band of the validation of two runs
    assert "thick: validation, thin: training" in said(caught[0])


def test_one_run_has_no_band(tmp_path, caught):
    draw_curves(tmp_path, "f", "t", [FLAT])
    assert not caught[0].axes[0].collections
    assert not any("band" in word for word in said(caught[0]))


def test_one_epoch_is_a_point_with_its_extremes(tmp_path, caught):
    draw_curves(tmp_path, "f", "t", [ONE], ("loss",))
    (axis,) = caught[0].axes
    assert axis.lines[0].get_marker() == "o"
    assert axis.collections[1].get_segments()[0][:, 1].tolist() == [2.0, 3.0]
    caught[0].draw_without_rendering()
    low, high = axis.get_xlim()
    assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]


def test_a_lost_run_is_marked(tmp_path, caught):
    draw_losses(tmp_path, "f", "t", [LOST])
    (axis,) = caught[0].axes
    crosses = [line.get_xydata().tolist() for line in axis.lines if line.get_marker() == "x"]
    assert crosses == [[[2.0, 1.0]], [[1.0, 2.0]]]
    assert "a run's last finite value" in said(caught[0])


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 0.05], "log"),
        ([2.0, 0.5], "linear"),
        ([2.0, 0.0], "linear"),
        ([404.0, 0.01], "log"),
        ([math.nan], "linear"),
    ],
)
def test_losses_far_apart_have_a_logarithmic_axis(tmp_path, caught, values, expected):
    draw_losses(tmp_path, "f", "t", [Curves("a", (history(values),))])
    assert caught[0].axes[0].get_yscale() == expected


def test_losses_are_of_the_training(tmp_path, caught):
    draw_losses(tmp_path, "f", "t", [TWO, FLAT])
    lines = caught[0].axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[2.5, 1.5, 1.0], [2.3026] * 4]


def test_thirty_variants_look_different():
    assert len(set(study_lines.styles(30))) == 30


def test_panels_share_their_axes_and_print_the_last_values(tmp_path, caught):
    longer = Curves("longer", (history([3.9, 0.0, 0.0, 0.0, 0.0, 0.1]),))
    draw_panels(tmp_path, "f", "t", [TWO, longer, LOST], "top1")
    assert [axis.get_title("left") for axis in caught[0].axes] == ["CNN A", "longer", "lost"]
    printed = [[text.get_text() for text in axis.texts] for axis in caught[0].axes]
    assert printed == [["75.0", "37.5"], ["97.5", "48.8"], ["10.0", "5.0"]]
    caught[0].draw_without_rendering()
    limits = {(axis.get_xlim(), axis.get_ylim()) for axis in caught[0].axes}
    assert len(limits) == 1
    (across, along) = limits.pop()
    assert across[1] >= 6
    assert along[0] <= 1.25
    assert along[1] >= 100


def test_panels_of_losses_say_what_is_not_finite(tmp_path, caught):
    draw_panels(tmp_path, "f", "t", [TWO, LOST], "loss")
    assert [text.get_text() for text in caught[0].axes[0].texts] == ["1.000", "2.000"]
    assert {text.get_text() for text in caught[0].axes[1].texts} == {"not finite"}


@pytest.mark.parametrize("count", [1, 2, 5, 7, 30])
def test_there_is_a_panel_for_every_variant_and_no_more(tmp_path, caught, count):
    draw_panels(tmp_path, "f", "t", [FLAT] * count, "top1")
    axes = caught[0].axes
    assert len(axes) == count
    columns = len({axis.get_subplotspec().colspan.start for axis in axes})
    lowest = [axis for axis in axes if axis.get_xlabel()]
    assert len(lowest) == min(columns, count)
    assert caught[0].get_figwidth() <= 11


def test_a_histogram_shows_shares_of_each_group_and_the_threshold(tmp_path, caught):
    groups = {"in": [0.9, 1.0, 1.0, math.inf], "out": [0.0, 0.2]}
    draw_histogram(tmp_path, "f", "t", groups, 0.5, "greatest softmax")
    (axis,) = caught[0].axes
    inside, outside = (patch.get_xy() for patch in axis.patches)
    assert inside[:, 1].max() == pytest.approx(200 / 3)
    assert outside[:, 1].max() == 50
    assert list(axis.lines[0].get_xdata()) == [0.5, 0.5]
    words = said(caught[0])
    assert {"in, n = 3", "out, n = 2", "threshold 0.5", "greatest softmax"} <= {*words}


@pytest.mark.parametrize("values", [[], [0.5], [3.0, 3.0]])
def test_a_histogram_of_few_values(tmp_path, caught, values):
    draw_histogram(tmp_path, "f", "t", {"in": values, "out": []}, None)
    (axis,) = caught[0].axes
    assert not axis.lines
    assert axis.patches[0].get_xy()[:, 1].max() == (100 if values else 0)


def test_a_threshold_beyond_the_values_is_shown(tmp_path, caught):
    draw_histogram(tmp_path, "f", "t", {"in": [1.0, 2.0]}, 9.0)
    assert caught[0].axes[0].get_xlim()[1] >= 9


def test_a_legend_makes_the_figure_higher(tmp_path, caught):
    draw_losses(tmp_path, "f", "t", [FLAT])
    draw_losses(tmp_path, "f", "t", [FLAT] * 30)
    assert caught[1].get_figheight() > caught[0].get_figheight() + 0.5
    caught[1].draw_without_rendering()
    (axis,), (legend,) = caught[1].axes, caught[1].legends
    assert legend.get_window_extent().y1 <= axis.get_tightbbox().y0
    assert axis.get_window_extent().height > 0.5 * 100 * caught[0].get_figheight()
