"""Image files become uint8 RGB; what is seen of them is resized by one function for all loaders.

Grey, palette, 16-bit and CMYK images become RGB; transparent parts become white, as on a page.
A photograph is turned the way its EXIF orientation says. Of an animation, the first frame counts.
A box is (top, left, height, width) in pixels of the image as it lies upright.
"""

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastcnn.packages import require
from fastcnn.text import REASON, first_line

MAX_PIXELS = 89_478_485  # Pillow's own limit, where it begins to warn of decompression bombs
EXTENSIONS = frozenset(
    (".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
)
PNG_START = 8  # bytes before the first chunk
PNG_DEPTH = 24  # where the bits of a channel are told
GREY_MODES = frozenset(("1", "L", "LA", "La", "I", "F"))
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # behind EXTENSIONS, no other


class BadImageError(ValueError):
    """One image that cannot be read; the message says why, the caller knows which."""


@dataclass(frozen=True)
class Decoded:
    """An image: pixels uint8 (H, W, 3), upright. grey: its file has no colours. plain: DALI gives
    these pixels too (is_plain), for nothing had to be decided, as with transparency."""

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


def is_plain(form: str | None, data: bytes) -> bool:
    """Whether DALI may be given `data`, an opaque image in Pillow's format `form`: a sound JPEG or
    a sound PNG of 8 bits a channel at most, which it reads as `decode` does.

    Pillow reads past damage at which DALI's parsers fail (a PNG file without its end), and where
    they fail DALI 2.4 may kill the process. So a file must be sound in all its parts, of a kind
    whose pixels are the same bit for bit; the others are decoded here. (BMP too: DALI fails at 16
    bits.)
    """
    if form == "JPEG":
        return _is_sound_jpeg(data)
    return form == "PNG" and data[PNG_DEPTH] <= 8 and _is_sound_png(data)


def _is_sound_png(data: bytes) -> bool:
    """Whether all chunks up to the last one are there, with their checksums."""
    at, view = PNG_START, memoryview(data)
    while at + 12 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data) or not name.isalpha() or name[2:3].islower():
            return False
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            return False
        if name == b"IEND":
            return True
        at = end
    return False


def _is_sound_jpeg(data: bytes) -> bool:
    """Whether segment follows on segment up to the pixels, and these have an end."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, at)
        if marker == 0xDA:  # start of scan
            return data.find(b"\xff\xd9", at) > 0
        if not 0xC0 <= marker <= 0xFE or 0xD0 <= marker <= 0xD9 or length < 2:
            return False
        at += 2 + length
    return False


def whole_boxes(shapes: np.ndarray, resize: str) -> np.ndarray:
    """Return int64 (N, 4): what evaluation sees of images of `shapes` (N, 2), height and width.

    resize "stretch": all of it; "crop": the largest square in the middle.
    """
    shapes = np.asarray(shapes, dtype=np.int64)
    if resize == "stretch":
        return np.concatenate([np.zeros_like(shapes), shapes], axis=1)
    side = shapes.min(axis=1, keepdims=True)
    return np.concatenate([(shapes - side) // 2, side, side], axis=1)


def resize_box(pixels: np.ndarray, box: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    """Return the box of an image uint8 (H, W, 3), stretched to `sides` (height, width).

    Bilinear and antialiased by torch, which takes a seventh of Pillow's time (500x375 to 224x224:
    0.16 and 1.14 ms, one core, 2026-11-21) and a twentieth of DALI's on a CPU. Nothing outside the
    box is looked at.
    """
    top, left, height, width = (int(value) for value in box)
    part = pixels[top : top + height, left : left + width]
    if (height, width) == sides:
        return part
    return _stretch(part[None], sides)[0]


def resize(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return images uint8 (n, H, W, 3) of one size, stretched to `side` pixels a side."""
    return pixels if pixels.shape[1:3] == (side, side) else _stretch(pixels, (side, side))


def _stretch(pixels: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
    # torch warns of arrays that it could not write to
    own = pixels if pixels.flags.writeable else pixels.copy()
    nchw = torch.from_numpy(own).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(nchw, sides, mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized.permute(0, 2, 3, 1).numpy())
