"""Which encoded images DALI may be given: those that it reads as decode.py does.

Pillow reads past damage at which DALI's parsers fail (a PNG file without its end), and where they
fail DALI 2.4 may kill the process. So a file must be sound in all its parts, of a kind whose pixels
are the same bit for bit; the others are decoded by decode.py. (BMP too: DALI fails at 16 bits.)
"""

import struct
import zlib

PNG_START = 8  # bytes before the first chunk
PNG_DEPTH = 24  # where the bits of a channel are told


def is_plain(form: str | None, data: bytes) -> bool:
    """Whether `data`, an opaque image in Pillow's format `form`, is a sound JPEG or a sound PNG of
    8 bits a channel at most."""
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
