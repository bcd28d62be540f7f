"""A bar chart of a run: one panel a network, batch and loader, one bar a backend."""

from pathlib import Path
from typing import Any

from fastcnn.bench.options import RIVALS
from fastcnn.errors import UsageError

INK, FAINT = "#1f2430", "#d5d9e0"
RIVAL, OURS = "#8a94a6", "#c2571a"
COLUMNS = 2  # of panels
USER = "as a user runs it"


def draw(content: dict[str, Any], path: Path) -> Path:
    """Draw images/s of a GPU, times as fast as eager on a CPU, to a PNG file.

    Raises UsageError where nothing was measured that a bar could show.
    """
    # the figure class alone, without pyplot, needs no display
    from matplotlib.figure import Figure

    panels = panels_of(content)
    if not panels:
        raise UsageError(f"--plot {path}: nothing was measured that a bar could show")
    columns = min(COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len(bars) for bars in panels.values())
    figure = Figure(
        figsize=(6.2 * columns, lines * (0.9 + 0.42 * most) + 0.8), layout="constrained"
    )
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for axis, (title, bars) in zip(axes, panels.items(), strict=False):
        _panel(axis, title, bars)
    for axis in axes[len(panels) :]:
        axis.remove()
    figure.suptitle(_title(content), x=0.01, ha="left", fontsize=9, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, format="png")
    return path


Bars = dict[str, dict[str, float]]  # by backend: median, min, max


def panels_of(content: dict[str, Any]) -> dict[str, Bars]:
    """What each bar shows, by panel and backend."""
    panels: dict[str, Bars] = {}
    for row in content["rows"]:
        if "why" not in row and (figures := _figures(row)):
            title = f"{row['network']}, batch {row['batch']}"
            title += "" if content["mode"] == "inference" else f", loader {row['loader']}"
            panels.setdefault(title, {})[row["backend"]] = figures
    return panels


def _figures(row: dict[str, Any]) -> dict[str, float] | None:
    if "images_per_s" in row:
        return row["images_per_s"]
    if row["backend"] == "eager":
        return {"median": 1.0, "min": 1.0, "max": 1.0}
    found = row["times_as_fast_as"].get("eager", {})
    return found.get(USER) or found.get("both plain")


def _title(content: dict[str, Any]) -> str:
    machine = content["machine"]
    what = "images/s" if machine["gpu"] else "times as fast as eager, as a user runs it"
    measured = "inference" if content["mode"] == "inference" else "training step"
    return (
        f"{measured}, {what}\nmedians, extremes of the rounds; grey: the rivals\n"
        f"{machine['gpu'] or machine['cpu']}, {content['precision']}, torch {content['torch']}, "
        f"{content['date']}, n = {content['rounds']}"
    )


def _panel(axis: Any, title: str, bars: Bars) -> None:
    names = list(bars)[::-1]
    medians = [bars[name]["median"] for name in names]
    errors = [
        [max(0.0, bars[name]["median"] - bars[name]["min"]) for name in names],
        [max(0.0, bars[name]["max"] - bars[name]["median"]) for name in names],
    ]
    colors = [RIVAL if name in RIVALS else OURS for name in names]
    axis.barh(names, medians, xerr=errors, color=colors, ecolor=INK, error_kw={"linewidth": 0.9})
    most = max(bars[name]["max"] for name in names)
    for at, median in enumerate(medians):
        text = f"{median:,.0f}" if most > 100 else f"{median:.2f}"
        axis.text(0.015 * most, at, text, va="center", fontsize=9, color="white")
    axis.set_xlim(0, 1.05 * most)
    axis.locator_params(axis="x", nbins=5)
    if most > 100:
        axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.grid(axis="x", color=FAINT, linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
