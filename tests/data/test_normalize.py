"""Normalisation fitted on files equals that of the packed images, to the bit."""

import numpy as np
import pytest
from image_files import IN_FILES, encoded, load, noise, write, write_folder

from fastcnn.data import Normalization, images
from fastcnn.data.images import Images

pytestmark = pytest.mark.usefixtures("own_cache")


def both(root, **options):
    write(write_folder(root, count=40) / "train/ant/grey.png", encoded(noise((8, 12))))
    options = {"image_size": 12, **options}
    return load(root, **options).train, load(root, **IN_FILES, **options).train


@pytest.mark.parametrize("resize", ["stretch", "crop"])
@pytest.mark.parametrize("mode", ["zscore", "unit", "centered", "mean-image", "levels"])
def test_files_are_fitted_like_packed_images(root, mode, resize):
    packed, in_files = both(root, resize=resize)
    assert Normalization.fit(in_files, mode) == Normalization.fit(packed, mode)
    some = np.arange(0, len(packed), 3)
    fitted = Normalization.fit(in_files.take(some), mode)
    assert fitted == Normalization.fit(packed.take(some), mode)


def test_no_file_is_decoded_but_for_the_mean_image(root, monkeypatch):
    _, in_files = both(root)
    read = []
    real = images.read_stamped
    monkeypatch.setattr(images, "read_stamped", lambda *args: read.append(1) or real(*args))
    Normalization.fit(in_files, "zscore")
    assert not read
    Normalization.fit(in_files, "mean-image")
    assert len(read) == len(in_files)


def test_fit_is_the_mean_and_deviation():
    pixels = noise((130, 5, 7, 3))  # two whole chunks and a part of one
    fitted = Normalization.fit(Images(pixels, np.zeros(130, np.int64)), "mean-image")
    assert np.allclose(fitted.mean, pixels.mean((0, 1, 2)) / 255, atol=1e-12)
    assert np.allclose(fitted.std, pixels.std((0, 1, 2)) / 255, atol=1e-9)
    assert np.allclose(fitted.mean_image, pixels.mean(0) / 255, atol=1e-12)
