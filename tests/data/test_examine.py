"""One image examined: what is known of it, and why it cannot be read."""

import hashlib

import numpy as np
import pytest
from image_files import encoded, noise

from fastcnn.data import examine
from fastcnn.data.examine import View, channel_sums
from fastcnn.data.sources.base import Encoded


def record_of(data, view=None, keep_pixels=False):
    return examine.examine(lambda: data, view or View(None, "stretch"), keep_pixels)


def exact_sums(pixels):
    flat = pixels.reshape(-1, 3).astype(object)  # whole numbers of any size
    return [*flat.sum(0), *(flat * flat).sum(0)]


@pytest.mark.parametrize("summed", [7, 1 << 16])
def test_sums_are_exact(monkeypatch, summed):
    monkeypatch.setattr(examine, "SUMMED_PIXELS", summed)
    for pixels in (noise((33, 17, 3)), np.full((300, 300, 3), 255, np.uint8), noise((1, 1, 3))):
        assert channel_sums(pixels).tolist() == exact_sums(pixels)


def test_record_of_an_image():
    pixels = noise((6, 9, 3))
    data = encoded(pixels)
    for view in (View(None, "stretch"), View(8, "stretch"), View(8, "crop")):
        kept, measured = record_of(data, view, True), record_of(data, view)
        for record in (kept, measured):
            assert (record.reason, record.shape) == ("", (6, 9))
            assert record.sha256 == hashlib.sha256(data).digest()
            assert (record.grey, record.plain) == (False, True)
        assert np.array_equal(kept.pixels, view(pixels))
        assert measured.pixels is None
        assert measured.sums.tolist() == exact_sums(view(pixels))


def test_record_of_a_bad_image():
    record = record_of(b"text")
    assert record.reason.startswith("cannot identify")
    assert record.sha256 == hashlib.sha256(b"text").digest()
    assert record.pixels is None


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("bad\0 chunk\x1b[31m\nmore"), "bad chunk[31m more"),
        (ValueError(), "ValueError"),
        (ValueError("\0"), "ValueError"),
        (ValueError("long" * 1000), "long" * 50),
        (examine.BadImageError(), "unreadable"),
    ],
)
def test_a_reason_is_one_printable_line(monkeypatch, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("PIL.Image.open", fail)
    assert record_of(b"x").reason == reason


def test_few_large_images_are_in_memory_at_once(monkeypatch):
    """A task holds a megabyte of files, not 64 of them."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(2))
    made = []
    data = encoded(noise((8, 8, 3)))

    def sources():
        for i in range(200):
            made.append(i)
            yield Encoded("train", i, str(i), lambda: data)

    chunks = examine.examine_all(sources(), View(None, "stretch"), 4 << 20, keep_pixels=True)
    assert len(next(chunks)) == 1
    assert len(made) <= 8
    chunks.close()
