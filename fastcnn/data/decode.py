"""Image files become uint8 RGB.

Grey, palette, 16-bit and CMYK images become RGB; transparent parts become white, as on a page.
A photograph is turned the way its EXIF orientation says. Of an animation, the first frame counts.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastcnn.data.plain import is_plain
from fastcnn.packages import require
from fastcnn.text import REASON, first_line

MAX_PIXELS = 89_478_485  # Pillow's own limit, where it begins to warn of decompression bombs
EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
GREY_MODES = frozenset(("1", "L", "LA", "La", "I", "F"))
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # behind EXTENSIONS, no other


class BadImageError(ValueError):
    """One image that cannot be read; the message says why, the caller knows which."""


@dataclass(frozen=True)
class Decoded:
    """An image: pixels uint8 (H, W, 3), upright. grey: its file has no colours. plain: DALI gives
    these pixels too (plain.py), for nothing had to be decided, as with transparency."""

    pixels: np.ndarray
    grey: bool
    plain: bool


def decode(data: bytes) -> Decoded:
    """Return the image in `data` in its own size.

    Raises BadImageError for an empty, cut, undecodable or too large (over MAX_PIXELS) image.
    """
    from PIL import Image

    if not data:
        raise BadImageError("empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImageError(f"{image.width} x {image.height} pixels, over {MAX_PIXELS}")
            grey = image.mode in GREY_MODES or image.mode.startswith("I;16")
            plain = not _transparent(image) and is_plain(image.format, data)
            return Decoded(np.asarray(_to_rgb(image)), grey, plain)
    except BadImageError:
        raise
    except Image.DecompressionBombError as error:
        raise BadImageError(f"more than {MAX_PIXELS} pixels") from error
    except Exception as error:  # a decoder may raise anything on garbage
        text = " ".join(str(error).split("<")[0].split())
        # a message may quote the file
        shown = "".join(filter(str.isprintable, text))[:REASON]
        raise BadImageError(shown or type(error).__name__) from error


def decoded_bytes(data: bytes) -> int:
    """Return the bytes of pixels that `decode` would make of `data`, by its header alone; 0 for
    what it refuses."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            pixels = image.width * image.height
    except Exception:  # as in decode, which says what
        return 0
    return 3 * pixels if pixels <= MAX_PIXELS else 0


def upright_rgb(image: Any) -> np.ndarray:
    """Return uint8 (H, W, 3) of an opened PIL image, as `decode` of its file, and leave it as it
    is. Raises BadImageError."""
    from PIL import ImageOps

    try:
        # a copy, and one that is upright: a plain copy forgets an orientation set in memory
        return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except BadImageError:
        raise
    except Exception as error:  # a file that is read only now may be cut
        raise BadImageError(first_line(error)) from error


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Keep Pillow from warning of a large image, which `decode` refuses. Raises PackageError
    where there is no Pillow to read images with."""
    require("PIL.Image", "PIL.ImageOps")
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield


def _to_rgb(image: Any) -> Any:
    from PIL import Image, ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "RGB" and "transparency" not in image.info:
        image.load()
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.clip(np.asarray(image), 0, 65535) // 257
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise BadImageError("floating-point pixels; expected 8 or 16 bits")
    if _transparent(image):
        image = image.convert("RGBA")
        page = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(page, image).convert("RGB")
    return image.convert("RGB")


def _transparent(image: Any) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
