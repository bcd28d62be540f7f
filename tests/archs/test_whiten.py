"""Whitening filters: uncorrelated outputs of equal strength on the images they are made from."""

import collections
import itertools
import math

import pytest
import torch
from conftest import STRUCTURES
from torch import nn
from torch.nn import functional as F

from fastcnn.archs import NETWORKS
from fastcnn.archs import whiten as whitening
from fastcnn.archs.init import initialise
from fastcnn.archs.whiten import first_convolution, patch_groups, whiten
from fastcnn.config import DataConfig
from fastcnn.data import Normalization, load_dataset
from fastcnn.recipes import resolve
from fastcnn.train.setup import new_model, whitening_images


def smooth_images(count=300, side=16, seed=0):
    """Colour images (n, 3, side, side) whose neighbouring pixels are alike, of uneven strength."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, side + 4, side + 4, generator=generator)
    colour = torch.tensor([[1.0, 0.8, 0.6], [0.0, 0.5, -0.4], [0.0, 0.0, 0.3]])
    images = F.avg_pool2d(noise, 5, 1) * 3 + noise[..., 2:-2, 2:-2] * 0.3
    return (
        torch.einsum("nchw,cd->ndhw", images, colour)
        + torch.tensor([0.5, 0.0, -2.0])[:, None, None]
    )


def all_patches(images, kernel):
    """Every patch (n, D) fp64, one window at a time."""
    (r, s), (height, width) = kernel, images.shape[2:]
    places = itertools.product(range(height - r + 1), range(width - s + 1))
    return torch.cat([images[:, :, y : y + r, x : x + s].flatten(1) for y, x in places]).double()


def outputs(conv, patches):
    """What the filters make of patches, (n, filters) fp64, without the bias."""
    return patches @ conv.weight.detach().double().flatten(1).T


def drawn(kernel, filters, bias=False, scheme="he"):
    conv = nn.Conv2d(3, filters, kernel, bias=bias)
    initialise(nn.Sequential(conv), scheme, torch.Generator().manual_seed(1))
    return conv


KERNELS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 3), (5, 5), (7, 7)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_outputs_are_uncorrelated_and_of_equal_variance(kernel):
    images, size = smooth_images(), 3 * math.prod(kernel)
    conv = drawn(kernel, 2 * size)
    before = outputs(conv, all_patches(images, kernel)).var(0).mean()
    whiten(conv, images)
    found = outputs(conv, torch.cat(list(patch_groups(images, conv.weight.shape[2:]))))
    assert torch.equal(conv.weight[1::2], -conv.weight[::2])
    covariance = torch.cov(found[:, ::2].T)
    variances = covariance.diagonal()
    # λ / (λ + ε): 1 for the strong directions, less where there is little but ε
    assert (covariance - variances.diag()).abs().max() < 1e-5 * variances.max()
    assert (variances[:-1] >= variances[1:] * (1 - 1e-5)).all()
    assert variances[: max(1, size // 3)].min() > 0.9 * variances.max()
    assert variances.mean() == pytest.approx(before.item(), rel=0.5)


@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (5, 5)])
def test_a_part_of_many_images_stands_for_all(monkeypatch, kernel):
    images, size = smooth_images(2000), 3 * math.prod(kernel)
    monkeypatch.setattr(whitening, "GROUP_PIXELS", 1000)
    conv = drawn(kernel, 2 * size)
    whiten(conv, images)
    covariance = torch.cov(outputs(conv, all_patches(images, kernel))[:, ::2].T)
    variances = covariance.diagonal()
    assert (covariance - variances.diag()).abs().max() < 0.1 * variances.max()
    assert variances[: size // 3].min() > 0.8 * variances.max()


def test_scale_is_that_of_the_drawn_weights():
    images = smooth_images()
    patches = torch.cat(list(patch_groups(images, torch.Size((3, 3)))))
    for scheme, factor in (("he", 2 / 27), ("torch", 1 / 27 / 3), ("uniform", 0.05**2 / 3)):
        conv = drawn(3, 54, scheme=scheme)
        whiten(conv, images)
        variance = outputs(conv, patches).var(0).mean()
        expected = factor * patches.var(0).sum()
        assert variance.item() == pytest.approx(expected.item(), rel=0.1)


def test_patches_are_all_windows_or_of_many_images_a_part_of_each_place(monkeypatch):
    height, width = 7, 11
    place = torch.arange(height * width).view(1, 1, height, width)
    images = torch.arange(60).view(-1, 1, 1, 1) * 1000 + place
    windows = sorted(all_patches(images, (2, 3)).long().tolist())
    groups = [group.long().tolist() for group in patch_groups(images, torch.Size((2, 3)))]
    assert len(groups) == 6
    assert sorted(row for group in groups for row in group) == windows
    monkeypatch.setattr(whitening, "GROUP_PIXELS", 100)
    groups = [group.long().tolist() for group in patch_groups(images, torch.Size((2, 3)))]
    # each group has ten images of its own
    for number, group in enumerate(groups):
        assert {row[0] // 1000 for row in group} == set(range(number, 60, 6))
    found = [row for group in groups for row in group]
    assert all(row in windows for row in found)
    starts = collections.Counter(row[0] % 1000 for row in found)
    corners = [y * width + x for y in range(height - 1) for x in range(width - 2)]
    assert starts == dict.fromkeys(corners, 10)


def test_the_signs_that_a_library_gives_its_eigenvectors_do_not_matter(monkeypatch):
    images, convs = smooth_images(), (drawn(3, 54), drawn(3, 54))
    whiten(convs[0], images)
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: (eigh(matrix)[0], -eigh(matrix)[1]))
    whiten(convs[1], images)
    assert torch.equal(convs[0].weight, convs[1].weight)


def test_fewer_filters_are_the_strongest_and_further_ones_stay():
    images = smooth_images()
    full, few, many = drawn(2, 24), drawn(2, 7), drawn(2, 40)
    before = many.weight.detach().clone()
    for conv in (full, few, many):
        whiten(conv, images)
    directions = [F.normalize(c.weight.detach().flatten(1)) for c in (full, few, many)]
    torch.testing.assert_close(directions[1], directions[0][:7])
    torch.testing.assert_close(directions[2][:24], directions[0])
    assert torch.equal(many.weight[24:], before[24:])
    variance = torch.cov(all_patches(images, (2, 2)).T)
    strength = [row @ variance @ row for row in directions[0][::2].double()]
    assert strength == sorted(strength, reverse=True)


def test_a_bias_centres_the_output():
    images = smooth_images() + 3
    conv = drawn(3, 64, bias=True, scheme="torch")
    stays = conv.bias.detach()[54:].clone()
    whiten(conv, images)
    with torch.no_grad():
        mean = conv(images).mean((0, 2, 3))
    assert mean[:54].abs().max() < 0.05 * conv(images).std()
    assert torch.equal(conv.bias[54:], stays)


def test_grey_images_have_a_third_of_the_directions():
    images = smooth_images()[:, :1].expand(-1, 3, -1, -1)
    conv = drawn(3, 64)
    before = conv.weight.detach().clone()
    whiten(conv, images)
    assert torch.isfinite(conv.weight).all()
    assert torch.equal(conv.weight[18:], before[18:])
    assert not any(torch.equal(a, b) for a, b in zip(conv.weight[:18], before[:18], strict=True))
    assert conv.weight.abs().max() < 100 * before.abs().max()


@pytest.mark.parametrize("images", [torch.full((4, 3, 8, 8), 0.3), torch.randn(4, 3, 2, 2)])
def test_images_without_a_patch_that_varies_leave_the_draw(images):
    conv = drawn(3, 8)
    before = conv.weight.detach().clone()
    whiten(conv, images)
    assert torch.equal(conv.weight, before)


def test_scale_of_the_pixels_does_not_matter_to_the_directions():
    images, convs = smooth_images(), (drawn(3, 54), drawn(3, 54))
    whiten(convs[0], images)
    whiten(convs[1], images / 50)
    torch.testing.assert_close(convs[0].weight, convs[1].weight, rtol=1e-4, atol=1e-5)


def new_networks(name, normalize, *options):
    """The images a network sees, and the network by each of the options."""
    network = NETWORKS[name]
    dataset = load_dataset(DataConfig("digits"), network.image_sizes[0])
    normalization = Normalization.fit(dataset.train, normalize)
    models = []
    for given in options:
        config = resolve({"arch": name, "data": "digits", "normalize": normalize} | given)
        models.append(new_model(network, dataset, config, normalization, CPU, "torch"))
    return whitening_images(dataset.train, normalization, 0), *models


CPU = torch.device("cpu")
CASES = [(name, "zscore") for name in STRUCTURES]
MODES = ("unit", "centered", "mean-image", "levels")
CASES += [(name, mode) for name in ("cnn-a", "vgg11") for mode in MODES]


@pytest.mark.full
@pytest.mark.parametrize(("name", "normalize"), CASES)
def test_networks_start_with_whitening_filters(name, normalize):
    images, plain, white = new_networks(name, normalize, {}, {"whiten": True})
    first, drawn = first_convolution(white), plain.conv1.conv
    assert first is white.conv1.conv
    assert first.weight.is_contiguous(memory_format=torch.channels_last)
    old = plain.state_dict()
    changed = {key for key, value in white.state_dict().items() if not torch.equal(value, old[key])}
    assert changed == {"conv1.conv.weight"} | (
        {"conv1.conv.bias"} if first.bias is not None else set()
    )
    patches = torch.cat(list(patch_groups(images, first.weight.shape[2:])))
    moved = (first.weight != drawn.weight).flatten(1).any(1)
    rank = int((torch.linalg.eigvalsh(torch.cov(patches.T)) > 1e-7).sum())
    assert moved.sum() == min(2 * rank, len(moved))
    correlation = torch.corrcoef(outputs(first, patches)[:, moved][:, ::2].T)
    assert (correlation - torch.eye(len(correlation))).abs().max() < 0.02


def test_the_same_seed_gives_the_same_filters():
    options = {"whiten": True}
    _, first, again, other = new_networks("cnn-a", "unit", options, options, options | {"seed": 1})
    assert all(map(torch.equal, first.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(first.conv1.conv.weight, other.conv1.conv.weight)


def test_images_are_drawn_by_the_seed_and_normalised():
    dataset = load_dataset(DataConfig("digits"), 32)
    normalization = Normalization.fit(dataset.train, "mean-image")
    few = whitening_images(dataset.train, normalization, 3)
    assert few.shape == (len(dataset.train), 3, 32, 32)
    torch.testing.assert_close(few.mean(0), torch.zeros(3, 32, 32), rtol=0, atol=1e-5)
    large = load_dataset(DataConfig("digits"), 128)
    normalization = Normalization.fit(large.train, "zscore")
    first, again, other = (whitening_images(large.train, normalization, s) for s in (0, 0, 1))
    assert len(first) == 5000 * 32**2 // 128**2
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_covariance_does_not_depend_on_the_order_of_memory():
    images = smooth_images()
    convs = drawn(3, 54), drawn(3, 54)
    whiten(convs[0], images)
    whiten(convs[1], images.contiguous(memory_format=torch.channels_last))
    assert torch.equal(convs[0].weight, convs[1].weight)
