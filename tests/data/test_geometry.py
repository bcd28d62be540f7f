"""The part of an image that is seen, and its resizing."""

import numpy as np
import pytest
from image_files import noise

from fastcnn.data.decode import resize, resize_box, whole_boxes
from fastcnn.data.examine import View


def test_boxes_of_evaluation():
    shapes = np.array([(6, 9), (9, 6), (5, 5), (4, 1)])
    stretched = [[0, 0, 6, 9], [0, 0, 9, 6], [0, 0, 5, 5], [0, 0, 4, 1]]
    assert whole_boxes(shapes, "stretch").tolist() == stretched
    middle = [[0, 1, 6, 6], [1, 0, 6, 6], [0, 0, 5, 5], [1, 0, 1, 1]]
    assert whole_boxes(shapes, "crop").tolist() == middle
    assert whole_boxes(np.zeros((0, 2)), "crop").shape == (0, 4)


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    small = View(8, "stretch")(stripes)
    # without antialiasing every column would be 0 or 255
    assert abs(small[:, 1:-1].astype(int) - 127.5).max() < 2


def test_nothing_outside_the_box_is_looked_at():
    pixels = noise((20, 30, 3))
    box = np.array([3, 5, 11, 13])
    alone = pixels[3:14, 5:18]
    expected = resize_box(alone, np.array([0, 0, 11, 13]), (8, 8))
    assert np.array_equal(resize_box(pixels, box, (8, 8)), expected)
    assert np.array_equal(resize_box(pixels, box, (11, 13)), alone)


def test_one_image_and_many_are_resized_alike(recwarn):
    pixels = noise((3, 20, 30, 3))
    pixels.flags.writeable = False  # as Pillow's are; torch would warn
    together = resize(pixels, 8)
    for image, expected in zip(pixels, together, strict=True):
        assert np.array_equal(View(8, "stretch")(image), expected)
    assert not list(recwarn)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_the_middle_square_is_seen(shape):
    pixels = noise((*shape, 3))
    square = pixels[:, 1:7] if shape == (6, 9) else pixels[1:7]
    assert np.array_equal(View(6, "crop")(pixels), square)
    assert not np.array_equal(View(6, "stretch")(pixels), square)
    assert View(None, "stretch")(pixels) is pixels
