"""A line chart as SVG, whose values a small script shows where one points.

Places and texts are computed here; the template draws them, and the script only picks among them,
so that a reader without it misses nothing but the values between the last ones.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from fastcnn.insight.html.scale import Scale, counted, drawable, linear, logarithmic, number

WIDTH, HEIGHT = 400, 250  # of the view box: at a phone's width its texts are still read
TOP, BOTTOM = 8, 36
LETTER = 6.8  # width of a tick's letter
COLOURS = 8  # in template/page.css; further lines are dashed
DASHES = ("", "6 3", "2 3", "8 3 2 3")
MARKED = 2  # points from which on a line is seen without marks
NONE = "–"


@dataclass(frozen=True)
class Series:
    """A line: points (x, y), x rising. A y that is not finite is a gap; colour: 0, 1, …"""

    name: str
    points: tuple[tuple[float, float], ...]
    colour: int


@dataclass(frozen=True)
class Chart:
    """Lines over whole numbers x. alt: what they show, for who cannot see it; form: how a value is
    written; zero: the axis begins at 0; log: it is logarithmic, and what is not positive a gap."""

    title: str
    alt: str
    series: tuple[Series, ...]
    x_name: str = "epoch"
    form: str = "{:.4g}"
    zero: bool = False
    log: bool = False

    @property
    def drawn(self) -> "Drawing":
        return draw(self)


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """paths: one for each stretch without a gap; marks: single points (x, y)."""

    name: str
    colour: int
    dash: str
    paths: tuple[str, ...]
    marks: tuple[tuple[float, float], ...]
    last: str


@dataclass(frozen=True)
class Drawing:
    """What the template draws, in units of the view box. last: whose values the lines' `last` are;
    data: JSON for the script, with nothing that HTML could take for a tag."""

    left: float
    right: float
    top: float
    bottom: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    last: str
    data: str
    width: int = WIDTH
    height: int = HEIGHT


def draw(chart: Chart) -> Drawing:
    """Lay a chart out."""
    kept = [_drawable(series, chart.log) for series in chart.series]
    xs = sorted({x for series in chart.series for x, _ in series.points if drawable(x)})
    x_scale, y_scale = counted(xs), _scale(chart, [y for points in kept for _, y in points])
    y_texts = [number(tick) for tick in y_scale.ticks]
    left = 10 + LETTER * max(map(len, y_texts))
    right = WIDTH - 4 - LETTER * max(len(number(tick)) for tick in x_scale.ticks) / 2
    across, down = right - left, HEIGHT - BOTTOM - TOP

    def at_x(x: float) -> float:
        return round(left + across * x_scale.place(x), 1)

    def at_y(y: float) -> float:
        return round(TOP + down * (1 - y_scale.place(y)), 1)

    lines, shown = [], []
    for series, points in zip(chart.series, kept, strict=True):
        places = {x: (at_x(x), at_y(y)) for x, y in points}
        texts = {x: chart.form.format(y) for x, y in series.points}
        lines.append(_line(series, places, texts[max(texts)] if texts else NONE))
        heights = [places[x][1] if x in places else None for x in xs]
        shown.append({"at": heights, "text": [texts.get(x, NONE) for x in xs]})
    data = {
        "name": chart.x_name,
        "width": WIDTH,
        "x": [number(x) for x in xs],
        "at": [at_x(x) for x in xs],
        "series": shown,
    }
    return Drawing(
        left,
        right,
        TOP,
        HEIGHT - BOTTOM,
        tuple(Tick(at_x(tick), number(tick)) for tick in x_scale.ticks),
        tuple(Tick(at_y(y), text) for y, text in zip(y_scale.ticks, y_texts, strict=True)),
        tuple(lines),
        _last(chart),
        json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _drawable(series: Series, log: bool) -> list[tuple[float, float]]:
    return [(x, y) for x, y in series.points if drawable(x) and drawable(y, log)]


def _last(chart: Chart) -> str:
    """Where the values are from that stand there before one points: "epoch 3"."""
    ends = {series.points[-1][0] for series in chart.series if series.points}
    if len(ends) == 1:
        return f"{chart.x_name} {number(ends.pop())}"
    return f"last {chart.x_name}s" if ends else ""


def _scale(chart: Chart, values: Sequence[float]) -> Scale:
    return logarithmic(values) if chart.log else linear(values, chart.zero)


def _line(series: Series, places: dict[float, tuple[float, float]], last: str) -> Line:
    """`places`: those of the series' points that can be drawn, by x."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for x, _ in series.points:
        if x in places:
            stretches[-1].append(places[x])
        else:
            stretches.append([])
    paths = ("M" + "L".join(f"{x:g} {y:g}" for x, y in s) for s in stretches if len(s) > 1)
    few = len(places) <= MARKED
    marks = (place for s in stretches for place in s if few or len(s) == 1)
    dash = DASHES[series.colour // COLOURS % len(DASHES)]
    return Line(series.name, series.colour % COLOURS, dash, tuple(paths), tuple(marks), last)
