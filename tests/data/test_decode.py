"""Image kinds become RGB."""

import io

import numpy as np
import pytest
from image_files import encoded, large_png, load, noise, write, write_folder
from PIL import Image

from fastcnn.data.decode import (
    EXTENSIONS,
    FORMATS,
    BadImageError,
    decode,
    decoded_bytes,
    is_plain,
    no_warnings,
)

pytestmark = pytest.mark.usefixtures("own_cache")


# Image kinds


GREY = noise((5, 7))


def test_grey_and_palette():
    expected = np.repeat(GREY[..., None], 3, 2)
    assert np.array_equal(decode(encoded(GREY)).pixels, expected)
    palette = Image.fromarray(noise((5, 7, 3))).quantize(16)
    file = io.BytesIO()
    palette.save(file, "PNG")
    assert np.array_equal(decode(file.getvalue()).pixels, np.asarray(palette.convert("RGB")))
    assert np.array_equal(
        decode(encoded(GREY > 127)).pixels, np.repeat((GREY > 127)[..., None], 3, 2) * 255
    )


def test_transparent_is_white():
    rgba = noise((5, 7, 4))
    rgba[0, :, 3], rgba[1:, :, 3] = 0, 255
    result = decode(encoded(rgba)).pixels
    assert (result[0] == 255).all()
    assert np.array_equal(result[1:], rgba[1:, :, :3])
    half = np.full((1, 1, 4), 128, dtype=np.uint8)
    half[..., :3] = 0
    assert abs(int(decode(encoded(half)).pixels[0, 0, 0]) - 127) <= 1


def test_transparent_palette_colour_is_white():
    image = Image.fromarray(noise((5, 7, 3))).quantize(4)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=2)
    result = decode(file.getvalue()).pixels
    assert (result[np.asarray(image) == 2] == 255).all()


def test_sixteen_bits():
    deep = GREY.astype(np.uint16) * 257
    assert np.array_equal(decode(encoded(deep)).pixels[..., 1], GREY)
    assert np.array_equal(decode(encoded(deep, "TIFF")).pixels[..., 1], GREY)
    between = np.array([[65000, 65535, 256]], dtype=np.uint16)
    assert decode(encoded(between)).pixels[0, :, 0].tolist() == [252, 255, 0]


def test_cmyk():
    file = io.BytesIO()
    Image.new("CMYK", (7, 5), (0, 255, 255, 0)).save(file, "JPEG", quality=100)
    red = decode(file.getvalue()).pixels
    assert red.shape == (5, 7, 3)
    assert red[..., 0].min() > 240
    assert red[..., 1:].max() < 15


def test_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    block = np.zeros((16, 32, 3), dtype=np.uint8)
    block[:8] = 255
    turned = decode(encoded(block, "JPEG", exif=exif, quality=95)).pixels
    assert turned.shape == (32, 16, 3)
    assert turned[:, 10:].min() > 200
    assert turned[:, :6].max() < 55


def test_renamed_kind_is_read_by_content(root):
    write(write_folder(root) / "train/ant/0.png", encoded(noise((8, 8, 3)), "BMP"))
    assert np.array_equal(load(root).train.pixels[0], noise((8, 8, 3)))


def test_floating_point_is_refused():
    with pytest.raises(BadImageError, match="floating-point"):
        decode(encoded(GREY.astype(np.float32), "TIFF"))


@pytest.mark.parametrize(
    ("data", "grey", "plain"),
    [
        (encoded(GREY), True, True),
        (encoded(GREY > 127), True, True),
        (encoded(GREY.astype(np.uint16) * 257), True, False),
        (encoded(GREY, "PPM"), True, False),
        (encoded(GREY, "BMP"), True, False),
        (encoded(noise((5, 7, 2))), True, False),
        (encoded(noise((5, 7, 3))), False, True),
        (encoded(noise((5, 7, 3)), "JPEG"), False, True),
        (encoded(noise((5, 7, 4))), False, False),
        (encoded(noise((5, 7, 3)), "GIF"), False, False),
    ],
)
def test_greyness_and_plainness(data, grey, plain):
    decoded = decode(data)
    assert (decoded.grey, decoded.plain) == (grey, plain)
    assert decoded_bytes(data) == decoded.pixels.nbytes == decoded_bytes(data[:-1])


def test_what_is_refused_by_its_header_takes_no_bytes():
    with no_warnings():
        for data in (b"", b"text", large_png(10_000), large_png(20_000)):
            assert decoded_bytes(data) == 0


def test_no_format_but_those_of_images_is_opened():
    """An EPS file would be run by Ghostscript, whatever it is called."""
    assert {form for form in FORMATS if form in Image.registered_extensions().values()} == {
        Image.registered_extensions()[extension] for extension in EXTENSIONS
    }
    for form in ("EPS", "PCX", "TGA", "ICO"):
        with pytest.raises(BadImageError, match="cannot identify image file"):
            decode(encoded(noise((16, 16, 3)), form))


def test_no_program_is_started_for_an_eps(monkeypatch):
    started = []
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: started.append(a))
    with pytest.raises(BadImageError):
        decode(encoded(noise((16, 16, 3)), "EPS"))
    assert not started


def test_of_a_file_that_is_cut_or_spoilt_no_part_is_plain():
    """Whatever Pillow makes of it: DALI may die of a file that it cannot parse."""
    for good in (encoded(noise((5, 7, 3))), encoded(noise((5, 7, 3)), "JPEG")):
        form = "PNG" if good[1:4] == b"PNG" else "JPEG"
        assert is_plain(form, good)
        assert is_plain(form, good + b"behind the end")
        assert not any(is_plain(form, good[:length]) for length in range(26, len(good) - 1))
    good = encoded(noise((5, 7, 3)))
    for place in range(25, len(good)):
        spoilt = good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :]
        assert not is_plain("PNG", spoilt)
