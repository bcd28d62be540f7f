"""Charts: places on the axes, gaps, texts, and in a browser the values where one points."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from browser import look, needs_browser
from hypothesis import given
from hypothesis import strategies as st

from fastcnn.insight.html.chart import HEIGHT, WIDTH, Chart, Series, draw
from fastcnn.insight.html.document import Page, Section, write_page
from fastcnn.insight.html.scale import counted, linear, logarithmic, number
from fastcnn.insight.html.table import Table

NAN, INF = math.nan, math.inf


def series(*values, name="a", colour=0, first=1):
    return Series(name, tuple(enumerate(map(float, values), first)), colour)


def chart(*lines, **options):
    return Chart("Loss", "What it shows", lines, **options)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.03, 0.97], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([48.5, 52], [48, 49, 50, 51, 52]),
        ([-3, 12], [-5, 0, 5, 10, 15]),
        ([7, 7], [2, 4, 6, 8, 10, 12]),
        ([0, 0], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([], [0, 0.2, 0.4, 0.6, 0.8, 1]),
        ([1e-5, 5e-5], [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]),
    ],
)
def test_a_linear_axis_has_few_round_ticks_around_its_values(values, ticks):
    found = linear(values)
    assert found.ticks == pytest.approx(ticks)
    assert (found.low, found.high) == pytest.approx((ticks[0], ticks[-1]))


def test_an_axis_from_zero_starts_there():
    assert linear([0.001, 0.001], zero=True).low == 0
    assert linear([-1, 3], zero=True).low <= -1


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.3, 4], [0.2, 0.5, 1, 2, 5]),
        ([0.00078, 7.5], [0.001, 0.01, 0.1, 1, 10]),
        ([1, 1], [1, 2]),
        ([1e-30, 1], [10.0**k for k in range(-30, 1, 6)]),
    ],
)
def test_a_logarithmic_axis_has_ticks_at_round_numbers(values, ticks):
    assert logarithmic(values).ticks == pytest.approx(ticks)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([1, 100], [20, 40, 60, 80, 100]),
        ([1, 3], [1, 2, 3]),
        ([1, 1000], [200, 400, 600, 800, 1000]),
        ([1], [1]),
    ],
)
def test_epochs_are_whole(values, ticks):
    assert counted(values).ticks == pytest.approx(ticks)


def test_ticks_read_as_people_write_numbers():
    values = (0, 0.30000000000000004, 1000, 0.0001, 0.00001, -2.5, 2e8)
    assert [number(v) for v in values] == ["0", "0.3", "1,000", "0.0001", "1e-5", "-2.5", "2e8"]


def points(path):
    return [tuple(map(float, pair.split())) for pair in path[1:].split("L")]


@pytest.mark.parametrize("log", [False, True])
def test_points_lie_where_the_ticks_say(log):
    """Read the values back from the drawing, by two of its ticks."""
    values = [4.2, 3.1, 0.9, 0.35, 0.4]
    drawn = draw(chart(series(*values, first=11), log=log))
    [path] = drawn.lines[0].paths

    def back(at, ticks, log=False):
        first, second = ((tick.at, float(tick.text)) for tick in (ticks[0], ticks[-1]))
        one, two = (math.log(v) if log else v for v in (first[1], second[1]))
        found = one + (two - one) * (at - first[0]) / (second[0] - first[0])
        return math.exp(found) if log else found

    assert [back(x, drawn.x_ticks) for x, _ in points(path)] == pytest.approx(
        [11, 12, 13, 14, 15], abs=0.02
    )
    assert [back(y, drawn.y_ticks, log) for _, y in points(path)] == pytest.approx(
        values, rel=0.01, abs=0.01
    )
    highest, lowest = drawn.y_ticks[-1], drawn.y_ticks[0]
    assert highest.at < lowest.at  # up is more


def test_what_is_no_number_is_a_gap():
    drawn = draw(chart(series(1, 2, NAN, 3, INF, 2, 1)))
    line = drawn.lines[0]
    assert [len(points(path)) for path in line.paths] == [2, 2]
    assert len(line.marks) == 1  # the point between two gaps
    data = json.loads(drawn.data)["series"][0]
    assert data["text"] == ["1", "2", "nan", "3", "inf", "2", "1"]
    assert [at is None for at in data["at"]] == [False, False, True, False, True, False, False]


def test_a_logarithmic_axis_has_no_place_for_zero():
    assert len(points(draw(chart(series(1, 2, 0), log=True)).lines[0].paths[0])) == 2


def test_a_single_epoch_is_a_mark_and_many_are_a_line():
    one = draw(chart(series(0.5)))
    assert (one.lines[0].paths, len(one.lines[0].marks)) == ((), 1)
    many = draw(chart(series(*range(1000))))
    assert len(points(many.lines[0].paths[0])) == 1000
    assert many.lines[0].marks == ()


def test_lines_of_other_lengths_share_the_axis():
    drawn = draw(chart(series(1, 2, 3, name="a"), series(5, name="b", colour=1)))
    assert [line.last for line in drawn.lines] == ["3", "5"]
    assert drawn.last == "last epochs"
    assert json.loads(drawn.data)["series"][1]["text"] == ["5", "–", "–"]
    assert draw(chart(series(1, 2))).last == "epoch 2"


def test_more_lines_than_colours_are_told_apart_by_dashes():
    lines = draw(chart(*(series(1, 2, colour=i) for i in range(20)))).lines
    assert len({(line.colour, line.dash) for line in lines}) == 20


floats = st.floats(allow_nan=True, allow_infinity=True)


@given(st.lists(st.lists(floats, max_size=6), max_size=3), st.booleans(), st.booleans())
def test_no_values_break_a_chart(values, log, zero):
    lines = (series(*line, colour=i) for i, line in enumerate(values))
    drawn = draw(chart(*lines, log=log, zero=zero and not log))
    json.loads(drawn.data, parse_constant=pytest.fail)
    assert 1 <= len(drawn.y_ticks) <= 12
    places = [place for line in drawn.lines for path in line.paths for place in points(path)]
    places += [mark for line in drawn.lines for mark in line.marks]
    assert all(drawn.left - 0.1 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)


HOSTILE = "</script><b>\"&'"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    curves = (
        chart(
            series(4, 3, NAN, 1.5, name="train"),
            series(5, 4, 3, 2.25, name=HOSTILE, colour=1),
            form="{:.2f}",
        ),
        chart(series(0.5)),
        chart(series(*(1 / e for e in range(1, 1001)), name="many"), log=True),
        Chart(HOSTILE, HOSTILE, (), x_name=HOSTILE),
    )
    section = Section("Curves", "curves", (), Table((), ()), charts=curves)
    return write_page(tmp_path_factory.mktemp("charts") / "page.html", Page("t", "l", (section,)))


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.names = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.names.append(tag)


def test_names_are_taken_for_no_tags(page):
    names = Tags(page.read_text()).names
    assert names.count("b") == 4  # the titles, nothing of what they hold
    assert names.count("script") == 5  # the values of four charts and one script


def test_a_page_without_charts_has_no_script(tmp_path):
    section = Section("Curves", "curves", (), Table((), ()))
    text = write_page(tmp_path / "page.html", Page("t", "l", (section,))).read_text()
    assert "<script" not in text
    assert "<svg" not in text


PROBE = """
const figures = [...document.querySelectorAll("figure.chart")];
const plot = figures[0].querySelector(".plot"), box = plot.getBoundingClientRect();
const shown = (figure) => [figure.querySelector(".at").textContent,
  ...[...figure.querySelectorAll(".value")].map((value) => value.textContent),
  figure.querySelector(".pointer").getAttribute("visibility")];
const seen = {};
const point = (part, type, kind) => plot.dispatchEvent(new PointerEvent(type, {bubbles: true,
  clientX: box.left + part * box.width, clientY: box.top + 9, pointerType: kind}));
const press = (at, key, shift) => figures[at].querySelector(".plot").dispatchEvent(
  new KeyboardEvent("keydown", {key: key, shiftKey: shift, cancelable: true}));
seen.before = shown(figures[0]);
point(.01, "pointermove", "mouse"); seen.left = shown(figures[0]);
point(.42, "pointermove", "mouse"); seen.second = shown(figures[0]);
const line = plot.querySelector(".rule").getBoundingClientRect();
const dot = plot.querySelector(".pointer .mark").getBoundingClientRect();
seen.rule = (line.left + line.right) / 2 - box.left;
seen.dot = (dot.left + dot.right) / 2 - box.left;
seen.places = JSON.parse(figures[0].querySelector("script").textContent).at;
point(.67, "pointermove", "mouse"); seen.gap = shown(figures[0]);
seen.marks = [...plot.querySelectorAll(".pointer .mark")].map((mark) =>
  mark.getAttribute("visibility"));
point(.5, "pointerleave", "mouse"); seen.after = shown(figures[0]);
point(.01, "pointerdown", "touch"); point(.01, "pointerleave", "touch");
seen.touched = shown(figures[0]);
plot.focus(); seen.focused = document.activeElement === plot;
press(0, "Home"); press(0, "ArrowRight"); seen.right = shown(figures[0]);
press(0, "ArrowLeft"); press(0, "ArrowLeft"); seen.stopped = shown(figures[0]);
press(0, "Escape"); seen.escaped = shown(figures[0]);
seen.taken = [press(0, "ArrowLeft"), press(0, "Tab")];
press(2, "Home"); press(2, "ArrowRight", true); seen.wide = shown(figures[2]);
press(1, "ArrowRight"); seen.one = shown(figures[1]);
seen.colours = [...plot.querySelectorAll(".line")].map((node) => getComputedStyle(node).stroke);
seen.letters = Math.min(...[...document.querySelectorAll(".plot text")].map((node) =>
  node.getBoundingClientRect().height));
seen.cut = [...document.querySelectorAll(".plot")].flatMap((one) => {
  const inside = one.getBoundingClientRect();
  return [...one.querySelectorAll("text")].filter((node) => {
    const own = node.getBoundingClientRect();
    return own.left < inside.left - .5 || own.right > inside.right + .5;
  }).map((node) => node.textContent); });
seen.width = box.width / root.clientWidth;
return seen;
"""


@needs_browser
def test_in_a_browser_a_chart_tells_its_values(page):
    seen = look(page, [(390, "light"), (1280, "light"), (1280, "dark")], PROBE)
    assert seen.console == []
    for found in seen.found:
        assert found["before"] == ["epoch 4", "1.50", "2.25", "hidden"]
        assert found["left"] == ["epoch 1", "4.00", "5.00", "visible"]
        assert found["second"] == ["epoch 2", "3.00", "4.00", "visible"]
        at = found["places"][1] / WIDTH * found["width"] * found["window"]
        assert (found["rule"], found["dot"]) == pytest.approx((at, at), abs=1)
        assert found["gap"] == ["epoch 3", "nan", "3.00", "visible"]
        assert found["marks"] == ["hidden", "inherit"]
        assert found["after"] == found["before"] == found["escaped"]
        assert found["touched"] == found["left"]
        assert found["focused"]
        assert found["right"] == found["second"]
        assert found["stopped"] == found["left"]
        assert found["taken"] == [False, True]  # arrows do not scroll the page, other keys work
        assert found["wide"] == ["epoch 11", "0.09091", "visible"]
        assert found["one"] == ["epoch 1", "0.5", "visible"]
        assert found["page"] == found["window"]
        assert found["names"] == ["Loss", "Loss", "Loss", HOSTILE]
        assert found["cut"] == []
        assert len(set(found["ids"])) == len(found["ids"])
        assert found["letters"] >= 10  # pixels: still read on a phone
    phone, desk, dark = seen.found
    assert phone["width"] > 0.9
    assert desk["width"] < 0.4  # two in a row
    assert contrasts(desk) >= 3 <= contrasts(dark)
    assert desk["ground"] != dark["ground"]


def contrasts(found):
    """The least contrast of a line with the page (WCAG 2.1, 1.4.11 asks for 3)."""

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear_parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear_parts, strict=True))

    ground = luminance(found["ground"])
    pairs = [sorted((ground, luminance(colour))) for colour in found["colours"]]
    return min((light + 0.05) / (dark + 0.05) for dark, light in pairs)
