"""Augmentations against oracles: NumPy and torchvision padding, torchvision's affine and crops;
distributions of what is drawn; normalisation."""

import json

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import make_images, noise
from scipy import stats
from torchvision.transforms import v2

from fastcnn.config import AugmentConfig
from fastcnn.data import augment
from fastcnn.data.augment import draw, jitter, resized_crop, rotate_shift
from fastcnn.data.draws import alternating_flip
from fastcnn.data.images import Images
from fastcnn.data.normalize import Normalization
from fastcnn.errors import UsageError
from fastcnn.ops.reference.augmentation import crop_flip, cut_out

OFF = AugmentConfig(crop_padding=0, flip="none")
P_LIMIT = 1e-4  # of the statistical tests, all with fixed seeds


def images(count=6, height=9, width=7, seed=0):
    return torch.from_numpy(noise((count, height, width, 3), seed))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    padding=st.integers(0, 8),
    mode=st.sampled_from(["reflect", "zero"]),
    seed=st.integers(0, 1000),
)
def test_crop_and_flip_equal_numpy_pad(height, width, padding, mode, seed):
    if mode == "reflect":
        padding = min(padding, min(height, width) - 1)
    pixels = images(5, height, width, seed)
    rng = np.random.default_rng(seed)
    index = rng.integers(0, 5, 11)
    crop = rng.integers(-padding, padding + 1, (11, 2))
    flip = rng.integers(0, 2, 11).astype(bool)
    choices = [torch.from_numpy(chosen) for chosen in (index, crop, flip)]
    result = crop_flip(pixels, *choices, reflect=mode == "reflect")
    widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(pixels.numpy(), widths, mode="reflect" if mode == "reflect" else "constant")
    for n in range(11):
        top, left = crop[n] + padding
        window = padded[index[n], top : top + height, left : left + width]
        expected = window[:, ::-1] if flip[n] else window
        assert np.array_equal(result[n].numpy(), expected)


@pytest.mark.parametrize(("mode", "theirs"), [("reflect", "reflect"), ("zero", "constant")])
def test_crop_equals_torchvision_pad(mode, theirs):
    pixels = images()
    padded = F.pad(pixels.permute(0, 3, 1, 2), 4, padding_mode=theirs).permute(0, 2, 3, 1)
    for top, left in ((-4, -4), (4, 4), (-3, 2), (0, 0)):
        crop = torch.tensor([[top, left]] * 6)
        result = crop_flip(pixels, torch.arange(6), crop, None, mode == "reflect")
        assert torch.equal(result, padded[:, top + 4 : top + 13, left + 4 : left + 11])


def test_nothing_drawn_returns_the_images():
    pixels = images()
    index = torch.tensor([3, 3, 0])
    assert draw(OFF, 0, 0, 6, 9, 7) == {}
    result = augment.distort(OFF, pixels, index, {})
    assert result.dtype == torch.uint8
    assert torch.equal(result, pixels[index])


@pytest.mark.parametrize(
    ("angle", "down", "right"), [(0, 0, 0), (30, 0, 0), (-77, 2, -3), (0, 3, 1)]
)
def test_rotation_and_shift_equal_torchvision(angle, down, right):
    pixels = images(2, 16, 12)
    result = rotate_shift(pixels, torch.tensor([[angle, down, right]] * 2, dtype=torch.float32))
    nchw = pixels.permute(0, 3, 1, 2).float()
    expected = F.affine(
        nchw,
        angle,
        [right, down],
        1.0,
        [0.0, 0.0],
        interpolation=v2.InterpolationMode.BILINEAR,
        fill=None,
    )
    torch.testing.assert_close(result.permute(0, 3, 1, 2), expected, atol=0.02, rtol=0)


def test_resized_crop_equals_torchvision():
    pixels = images(4, 16, 12)
    boxes = torch.tensor([[0, 0, 16, 12], [3, 2, 7, 9], [15, 11, 1, 1], [0, 5, 8, 4]])
    result = resized_crop(pixels, boxes).permute(0, 3, 1, 2)
    for n, (top, left, height, width) in enumerate(boxes.tolist()):
        expected = F.resized_crop(
            pixels[n].permute(2, 0, 1).float(), top, left, height, width, [16, 12], antialias=True
        )
        torch.testing.assert_close(result[n], expected, atol=0.02, rtol=0)


def test_jitter_equals_torchvision():
    pixels = images(3)
    factors = torch.tensor([[1.4, 0.6, 1.3], [0.2, 1.8, 0.0], [1.0, 1.0, 1.0]])
    result = jitter(pixels, factors) / 255
    for n, (brightness, contrast, saturation) in enumerate(factors.tolist()):
        expected = F.adjust_brightness(pixels[n].permute(2, 0, 1).float() / 255, brightness)
        expected = F.adjust_contrast(expected, contrast)
        expected = F.adjust_saturation(expected, saturation).permute(1, 2, 0)
        torch.testing.assert_close(result[n], expected, atol=2e-4, rtol=0)


def test_crop_offsets_are_uniform_and_flips_fair():
    drawn = draw(AugmentConfig(), 1, 2, 20_000, 32, 32)
    offsets = (drawn["crop"] + 4).numpy()
    counts = np.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert stats.chisquare(counts).pvalue > P_LIMIT
    flips = int(drawn["flip"].sum())
    assert stats.binomtest(flips, 20_000, 0.5).pvalue > P_LIMIT


def test_affine_and_color_cover_their_ranges():
    config = AugmentConfig(rotation=15, shift=0.25, color_jitter=0.4)
    drawn = draw(config, 0, 0, 20_000, 32, 16)
    angle, down, right = drawn["affine"].numpy().T
    assert stats.kstest(angle, stats.uniform(-15, 30).cdf).pvalue > P_LIMIT
    for shift, side in ((down, 8), (right, 4)):
        assert (shift == shift.round()).all()
        assert set(shift) == set(range(-side, side + 1))
        inner = np.bincount((shift + side).astype(int))[1:-1]
        assert stats.chisquare(inner).pvalue > P_LIMIT
    for factor in drawn["color"].numpy().T:
        assert stats.kstest(factor, stats.uniform(0.6, 0.8).cdf).pvalue > P_LIMIT


@pytest.mark.parametrize(
    ("height", "width", "smallest"), [(32, 32, 0.08), (16, 24, 0.5), (8, 40, 0.3)]
)
def test_resized_boxes_are_distributed_as_torchvision(height, width, smallest):
    count = 3000
    source = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[height, width]]).expand(count, 2)
    ours = augment.resized_boxes(shapes, smallest, source).numpy()
    image = torch.zeros(3, height, width)
    transform = v2.RandomResizedCrop((height, width), scale=(smallest, 1.0))
    torch.manual_seed(1)
    theirs = [transform.make_params([image]) for _ in range(count)]
    theirs = np.array([[box[k] for k in ("top", "left", "height", "width")] for box in theirs])
    top, left, h, w = ours.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + h).max() <= height
    assert (left + w).max() <= width
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > P_LIMIT
    assert stats.ks_2samp(h * w, theirs[:, 2] * theirs[:, 3]).pvalue > P_LIMIT


def test_cutout_is_a_clipped_square_of_the_fill():
    centres, fill = torch.tensor([[0, 0], [8, 6], [4, 3]]), torch.tensor([2.0, 3.0, 4.0])
    x = torch.ones(3, 9, 7, 3)
    result = cut_out(x, centres, 4, fill)
    expected = np.ones((3, 9, 7, 3))
    expected[0, 0:2, 0:2] = expected[1, 6:9, 4:7] = expected[2, 2:6, 1:5] = (2, 3, 4)
    assert np.array_equal(result.numpy(), expected)
    assert (cut_out(x, centres, 40, fill) == fill).all()
    odd = cut_out(x, centres[2:], 3, fill * 0)[0, :, :, 0]
    assert odd.nonzero().shape[0] == 63 - 9


def test_cutout_centres_are_uniform():
    centres = draw(AugmentConfig(cutout=8), 0, 0, 20_000, 10, 8)["cutout"].numpy()
    counts = np.bincount(centres[:, 0] * 8 + centres[:, 1], minlength=80)
    assert stats.chisquare(counts).pvalue > P_LIMIT


def test_alternating_flip_shows_both_sides_every_two_epochs():
    config, samples = AugmentConfig(flip="alternating"), 500
    flips = [draw(config, 3, epoch, samples, 8, 8)["flip"] for epoch in range(4)]
    assert torch.equal(flips[0], ~flips[1])
    assert torch.equal(flips[0], flips[2])
    assert torch.equal(flips[1], flips[3])
    assert stats.binomtest(int(flips[0].sum()), samples, 0.5).pvalue > P_LIMIT
    for epoch in range(4):  # of the torch loader
        assert torch.equal(alternating_flip(3, epoch, samples), flips[epoch])
    assert not torch.equal(flips[0], draw(config, 4, 0, samples, 8, 8)["flip"])


@pytest.mark.parametrize(
    ("options", "one_kernel"),
    [
        ({}, True),
        ({"cutout": 4, "flip": "alternating", "crop_mode": "zero"}, True),
        ({"rotation": 1.0}, False),
        ({"shift": 0.1}, False),
        ({"resized_crop": 0.5}, False),
        ({"color_jitter": 0.1}, False),
    ],
)
def test_what_one_kernel_does(options, one_kernel):
    assert augment.is_one_kernel(AugmentConfig(**options)) == one_kernel
    drawn = draw(AugmentConfig(**options), 0, 0, 5, 8, 8)
    assert (drawn.keys() <= {"crop", "flip", "cutout"}) == one_kernel


def test_draws_depend_on_seed_and_epoch_and_not_on_each_other():
    everything = AugmentConfig(rotation=5, shift=0.1, cutout=4, color_jitter=0.1)
    base = draw(everything, 0, 0, 50, 16, 16)
    alone = draw(AugmentConfig(), 0, 0, 50, 16, 16)
    assert set(alone) == {"crop", "flip"}
    for name, values in alone.items():
        assert torch.equal(values, base[name])
    for other in (draw(everything, 1, 0, 50, 16, 16), draw(everything, 0, 1, 50, 16, 16)):
        assert not any(torch.equal(other[name], base[name]) for name in base)


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    draw(AugmentConfig(resized_crop=0.5, rotation=1, color_jitter=0.5, cutout=3), 0, 0, 9, 16, 16)
    assert torch.equal(torch.get_rng_state(), state)


def test_reflection_needs_a_larger_image():
    with pytest.raises(UsageError, match="--crop-padding 8"):
        augment.check(AugmentConfig(crop_padding=8), 8, 9)
    augment.check(AugmentConfig(crop_padding=7), 8, 9)
    augment.check(AugmentConfig(crop_padding=8, crop_mode="zero"), 8, 9)


# Normalisation


def test_fit_measures_every_channel_exactly():
    pixels = noise((300, 5, 6, 3))
    pixels[..., 1] //= 3
    fitted = Normalization.fit(Images(pixels, np.zeros(300, dtype=np.int64)), "mean-image")
    scaled = pixels.astype(np.float64) / 255
    np.testing.assert_allclose(fitted.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(fitted.std, scaled.std((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(fitted.mean_image, scaled.mean(0), rtol=1e-12)


def test_constant_channel_gets_unit_deviation():
    pixels = np.full((100, 4, 4, 3), 77, dtype=np.uint8)
    fitted = Normalization.fit(Images(pixels, np.zeros(100, dtype=np.int64)), "zscore")
    assert fitted.std == (1.0, 1.0, 1.0)
    assert fitted.apply(torch.from_numpy(pixels)).abs().max() < 1e-6


MODES = {
    "zscore": lambda x, n: (x - np.array(n.mean)) / np.array(n.std),
    "unit": lambda x, n: x,
    "centered": lambda x, n: x - 0.5,
    "mean-image": lambda x, n: x - np.array(n.mean_image),
    "levels": lambda x, n: 255 * (x - np.array(n.mean)),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes(mode):
    train = make_images(40)
    fitted = Normalization.fit(train, mode)
    assert fitted.mode == mode
    assert (fitted.mean_image is None) == (mode != "mean-image")
    pixels = torch.from_numpy(train.pixels[:5])
    expected = MODES[mode](train.pixels[:5] / 255, fitted)
    for source in (pixels, pixels.float()):
        result = fitted.apply(source)
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        atol = 1e-6 * (255 if mode == "levels" else 1)
        np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=atol)
    assert torch.equal(pixels, torch.from_numpy(train.pixels[:5]))
    half = fitted.apply(pixels, torch.bfloat16)
    assert torch.equal(half, fitted.apply(pixels).bfloat16())


def test_zscore_gives_mean_0_and_deviation_1():
    train = make_images(200)
    x = Normalization.fit(train, "zscore").apply(torch.from_numpy(train.pixels)).double()
    assert x.mean((0, 1, 2)).abs().max() < 1e-6
    assert (x.std((0, 1, 2), correction=0) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_fill_is_what_the_mean_becomes(mode):
    fitted = Normalization.fit(make_images(40), mode)
    colour = fitted.mean_image if mode == "mean-image" else [[fitted.mean] * 8] * 8
    mean = torch.tensor(colour)[None].float() * 255
    fill = torch.tensor(fitted.fill).expand(1, 8, 8, 3)
    torch.testing.assert_close(fitted.apply(mean), fill, atol=1e-6, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_plain_round_trip(mode, tmp_path):
    fitted = Normalization.fit(make_images(10), mode)
    plain = fitted.to_plain()
    assert Normalization.from_plain(json.loads(json.dumps(plain))) == fitted
    torch.save(plain, tmp_path / "plain.pt")
    loaded = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert Normalization.from_plain(loaded) == fitted
