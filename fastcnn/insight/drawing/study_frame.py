"""What the figures of a study share: their text, title, legend and files."""

import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcnn.errors import CheckpointError
from fastcnn.insight.drawing.figures import INK, plain, save, shortened

WIDE = 8.6  # inches: a figure as wide as a page
NAME = 52  # characters of a name in a legend
NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")

Paths = tuple[Path, Path]


def save_both(figure: Any, folder: Path, name: str) -> Paths:
    """Write <name>.png and <name>.svg whole, the same bytes for the same figure.

    Raises CheckpointError where the disk refuses; what was there stays.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f".{name}.part.png", folder / f".{name}.part.svg"
    wanted = folder / f"{name}.png", folder / f"{name}.svg"
    try:
        _fewer_colors(save(figure, made[0]))
        figure.set_layout_engine("none")  # keep the places it found
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastcnn"}):
            save(figure, made[1], {"Date": None, "Creator": None})
        for one, other in zip(made, wanted, strict=True):
            one.replace(other)
    except OSError as error:
        raise CheckpointError(f"cannot write {wanted[0]}: {error.strerror or error}") from error
    finally:
        for one in made:
            one.unlink(missing_ok=True)
    return wanted


def _fewer_colors(path: Path) -> None:
    """Rewrite a PNG with a palette: a third of the bytes, for pages that hold many of them."""
    from PIL import Image

    with Image.open(path) as image:
        found = image.convert("RGB").quantize(
            256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE
        )
    found.save(path, optimize=True)


def wrapped(text: str, width: int, most: int) -> str:
    """Return a text in at most `most` lines, its end replaced by … where it is longer."""
    found = textwrap.wrap(NOT_XML.sub("�", text), width, max_lines=most, placeholder="…")
    return plain("\n".join(found))


def named(text: str) -> str:
    """Return a name as a legend shows it."""
    return plain(shortened(" ".join(NOT_XML.sub("�", text).split()), NAME))


def finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def entitle(figure: Any, title: str) -> None:
    """Write the title from the left edge, in lines as long as the figure is wide."""
    width = int(figure.get_figwidth() * 11.2)
    figure.suptitle(wrapped(title, width, 3), x=0.01, ha="left", fontsize=11, color=INK)


def add_legend(figure: Any, keys: Sequence[Any]) -> None:
    """Write a legend below the figure, and make it as much higher as its rows need."""
    if not keys:
        return
    # inches: of a letter on average, of a key and the gap beside it
    widest = 0.6 + 0.069 * max(len(key.get_label()) for key in keys)
    columns = max(1, min(len(keys), int(figure.get_figwidth() / widest)))
    rows = -(-len(keys) // columns)
    figure.set_figheight(figure.get_figheight() + 0.19 * rows)
    figure.legend(
        handles=list(keys),
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=8.5,
        labelcolor=INK,
    )
