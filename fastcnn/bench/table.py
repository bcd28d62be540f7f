"""What a run has measured, as a table on the terminal."""

from typing import Any

from fastcnn.bench.kernels.roofline import FLOOR
from fastcnn.bench.options import RIVALS
from fastcnn.bench.throughput import ONE, PAIRS

Content = dict[str, Any]
Cells = tuple[str, ...]
WIDTH = 200  # of a line that no terminal shows
# of a layer's part: torch's own product, the layer by eager torch, ...
VARIANTS = ("torch", "eager", "compile", "vendor", "cudnn", "fused")


def print_report(content: Content) -> None:
    """Print the table of a run, with its environment above it and what is missing below."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    for line in head_lines(content):
        console.print(line, markup=False)
    heads, rows = cells_of(content)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    words = _left(rows)
    for number, head in enumerate(heads):
        shown.add_column(head, justify="left" if number < words else "right")
    for row in rows:
        shown.add_row(*[_plain(cell) for cell in row])
    console.print(shown)
    for line in tail_lines(content):
        console.print(line, markup=False)


def _plain(cell: str) -> Any:
    from rich.text import Text

    return Text(cell)


def _left(rows: list[Cells]) -> int:
    """The first columns that hold words, which stand to the left."""
    first = rows[0] if rows else ()
    numeric = [i for i, cell in enumerate(first) if cell[:1].isdigit()]
    return numeric[0] if numeric else len(first)


def head_lines(content: Content) -> list[str]:
    """Where, when and with what."""
    machine = content["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {content['threads']} threads"
    driver = f", driver {machine['driver']}" if machine["gpu"] else ""
    lines = [
        f"{where}{driver}, torch {content['torch']}, CUDA {content['cuda']}, cuDNN "
        f"{content['cudnn']}, commit {content['commit']}, {content['date']}, "
        f"{content['precision']}"
    ]
    if engines := content.get("engines"):
        lines[0] += "".join(f", {name} {version}" for name, version in engines.items())
    if limits := content.get("limits"):
        lines.append(
            f"device: copy {limits['copy_bytes_per_s'] / 1e12:.2f} TB/s (read + write), matrix "
            f"product {limits['flop_per_s'] / 1e12:.0f} TFLOP/s"
        )
    return lines


def cells_of(content: Content) -> tuple[Cells, list[Cells]]:
    """The heads and rows of the table of a run in any mode."""
    rows = [row for row in content["rows"] if "why" not in row]
    on_gpu = content["machine"]["gpu"] is not None
    modes = {"layers": _of_layers, "data-only": _of_loaders, "time-to-accuracy": _of_trials}
    return modes.get(content["mode"], _of_steps)(rows, on_gpu)


def _of_steps(rows: list[Any], on_gpu: bool) -> tuple[Cells, list[Cells]]:
    return _on_a_gpu(rows) if on_gpu else _on_a_cpu(rows)


def _on_a_gpu(rows: list[Any]) -> tuple[Cells, list[Cells]]:
    rivals = [r for r in RIVALS if any(r in row["times_as_fast_as"] for row in rows)]
    heads: Cells = ("network", "loader", "backend", "batch", "images/s", "ms/step", "peak MiB")
    told = any("roofline_share" in row for row in rows)
    heads += ("launches", *([f"of {FLOOR}"] if told else []), *[f"x {rival}" for rival in rivals])
    cells = []
    for row in rows:
        share = row.get("roofline_share")
        ratios = [row["times_as_fast_as"].get(rival) for rival in rivals]
        cells.append(
            (
                *(row["network"], row["loader"], row["backend"], str(row["batch"])),
                with_spread(row["images_per_s"], ",.0f"),
                f"{row['ms_per_step']['median']:.3f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['launches']:,.0f}",
                *([f"{share[FLOOR]:.0%}" if share else ""] if told else []),
                *[with_spread(ratio[ONE]) if ratio else "" for ratio in ratios],
            )
        )
    return heads, cells


def _on_a_cpu(rows: list[Any]) -> tuple[Cells, list[Cells]]:
    heads: Cells = ("network", "loader", "backend", "times as fast as", "batch", *PAIRS)
    told = any("kept_bytes" in row for row in rows)
    heads += ("kept MiB",) if told else ()
    cells = []
    for row in rows:
        kept = [f"{row['kept_bytes'] / 2**20:,.1f}" if "kept_bytes" in row else ""] if told else []
        alone: dict[str, Any] = {"": {}}
        for rival, found in (told_ratios(row) or alone).items():
            names = (row["network"], row["loader"], row["backend"], rival, str(row["batch"]))
            ratios = [with_spread(found[pair]) if pair in found else "" for pair in PAIRS]
            cells.append((*names, *ratios, *kept))
    return heads, cells


def told_ratios(row: Any) -> dict[str, Any]:
    """The ratios of a row that a table tells: a rival's to eager alone."""
    found = row["times_as_fast_as"]
    return {r: found[r] for r in found if row["backend"] not in RIVALS or r == RIVALS[0]}


def _of_layers(rows: list[Any], on_gpu: bool) -> tuple[Cells, list[Cells]]:
    heads: Cells = ("network", "layer", "part", "batch", "of eager's step", "of fused's step")
    if on_gpu:
        heads += (*[f"us {variant}" for variant in VARIANTS], "GB/s", "TFLOP/s", "of floor")
    cells = []
    for row in rows:
        variants, shares = row["variants"], row.get("share_of_step", {})
        told = [format(shares[b], ".1%") if b in shares else "" for b in ("eager", "fused")]
        cell: Cells = (row["network"], row["layer"], row["part"], str(row["batch"]), *told)
        if on_gpu:
            last = variants.get("fused") or next(iter(variants.values()))
            cell += tuple(_time_us(variants.get(variant)) for variant in VARIANTS)
            cell += (f"{last['gb_per_s']:,.0f}", f"{last['tflop_per_s']:,.1f}")
            cell += (f"{last['floor_share']:.0%}",)
        ratio = row.get("times_as_fast_as", {})
        cell += tuple(with_spread(ratio[r]) if r in ratio else "" for r in ("vendor", "eager"))
        cells.append((*cell, _plan_of(row)))
    return (*heads, "x vendor", "x eager", "plan"), cells


def _time_us(figures: dict[str, Any] | None) -> str:
    return f"{figures['time_us']['median']:,.1f}" if figures else ""


def _plan_of(row: Any) -> str:
    """What the part of a convolution is given to, and why where no measurement has said so."""
    if "plan" not in row:
        return ""
    forward, data, weight = row["plan"]
    chosen = {"conv data gradient": data, "conv weight gradient": weight}
    chosen |= {"layer backward": f"{data}, {weight}"}
    word, reason = chosen.get(row["part"], forward), row["plan_reason"]
    return word if reason == "measured" else f"{word} ({reason})"


def _of_loaders(rows: list[Any], on_gpu: bool) -> tuple[Cells, list[Cells]]:
    heads: Cells = ("network", "loader", "batch", *(["images/s", "step's"] if on_gpu else []))
    cells = []
    for row in rows:
        cell: Cells = (row["network"], row["loader"], str(row["batch"]))
        if on_gpu:
            both = (row["images_per_s"], row["step_images_per_s"])
            cell += tuple(with_spread(figures, ",.0f") for figures in both)
        cells.append((*cell, with_spread(row["times_as_fast_as"]["step"])))
    return (*heads, "times what the step consumes"), cells


def _of_trials(rows: list[Any], on_gpu: bool) -> tuple[Cells, list[Cells]]:
    heads: Cells = ("network", "loader", "data", "recipe", "batch", "epochs", "target", "met")
    heads += ("epochs to it", *(["s to it", "s of all epochs"] if on_gpu else []), "final top-1")
    cells = []
    for row in rows:
        cell: Cells = (row["network"], row["loader"], row["data"], row["recipe"], str(row["batch"]))
        cell += (str(row["epochs"]), f"{row['target']:.2%}", f"{row['met']} of {row['n']}")
        cell += (_mean(row.get("epochs_to_target"), ".1f"),)
        if on_gpu:
            cell += (_mean(row.get("seconds_to_target"), ".2f"), _mean(row["seconds"], ".2f"))
        cells.append((*cell, _mean(row["final_top1"], ".2%")))
    return heads, cells


def _mean(figures: dict[str, float] | None, form: str) -> str:
    """A mean, the median behind it, and the extremes."""
    if figures is None:
        return ""
    mean, median, low, high = (format(figures[k], form) for k in ("mean", "median", "min", "max"))
    return f"{mean}, median {median} ({low} to {high})"


def with_spread(figures: dict[str, float], form: str = ".2f") -> str:
    """A median, and the extremes of the rounds."""
    median, low, high = (format(figures[key], form) for key in ("median", "min", "max"))
    return f"{median} ({low} to {high})"


def tail_lines(content: Content) -> list[str]:
    """How to read the table, and what is not in it."""
    lines = []
    if rounds := content.get("rounds"):
        lines.append(f"medians of {rounds} interleaved rounds (extremes of single rounds)")
    for row in content["rows"]:
        if "why" in row:
            lines.append(f"not timed: {_name(row)}: {row['why']}")
        if "note" in row:
            lines.append(f"note: {_name(row)}: {row['note']}")
    for name, why in content.get("engines_left_out", {}).items():
        lines.append(f"left out: {name}: {why}")
    if content.get("left_out"):
        lines.append(f"left out, no time left: {', '.join(content['left_out'])}")
    return lines


def _name(row: Any) -> str:
    parts = [row["network"], f"batch {row['batch']}"]
    return " ".join([*parts, *[row[k] for k in ("loader", "layer", "backend", "view") if k in row]])
