"""Feature maps and filters against torch's own functions."""

import numpy as np
import pytest
import torch
from test_ood import images_of, trained_like
from torch.nn import functional as F

from fastcnn.archs import get_network
from fastcnn.archs.elementary import Elementary
from fastcnn.archs.spec import layer_table
from fastcnn.insight.analysis.feature_maps import feature_maps, first_filters, scaled, stages
from fastcnn.insight.analysis.gradcam import find_operations


def pairs(arch, name):
    rows = layer_table(get_network(arch), 32, 10)
    return stages(rows, find_operations(rows, name, "--maps"))


@pytest.mark.parametrize(
    ("arch", "name", "wanted"),
    [
        ("cnn-a", "conv1", [("Conv2d-1", "ReLU-2")]),
        ("cnn-a+norm", "conv2", [("Conv2d-4", "BatchNorm2d-5")]),
        # the norm comes behind the activation
        ("mao-batchnorm", "conv1", [("Conv2d-1", "BatchNorm2d-3")]),
        ("mao-batchnorm", "conv3", [("Conv2d-9",)]),
        (
            "resnet18",
            "block1",
            [("Conv2d-4", "BatchNorm2d-5"), ("Conv2d-7", "BatchNorm2d-8")],
        ),
        ("cnn-a", "ReLU-2", [("ReLU-2",)]),
        ("cnn-a", "MaxPool2d-5", [("MaxPool2d-5",)]),
        ("cnn-a", "Conv2d-3", [("Conv2d-3", "ReLU-4")]),
        ("cnn-a", "fc1", []),
        ("resnet18", "avgpool", []),
    ],
)
def test_a_convolution_is_shown_before_and_after_normalisation(arch, name, wanted):
    assert pairs(arch, name) == wanted


@torch.no_grad()
def test_maps_are_the_convolution_and_its_norm():
    trained = trained_like("cnn-a+norm", 32)
    image = images_of(32, 2)[1]
    names = ("Conv2d-1", "BatchNorm2d-2", "Conv2d-4")
    found = feature_maps(Elementary(trained.model), image, names)
    conv, norm = trained.model.conv1.conv, trained.model.conv1.norm
    product = F.conv2d(image[None], conv.weight, conv.bias, padding=1)
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    normed = F.batch_norm(product, *statistics, False, 0.0, norm.eps)
    second = trained.model.conv2.conv
    then = F.conv2d(normed.relu(), second.weight, second.bias, padding=1)
    assert list(found) == list(names)
    for values, true in zip(found.values(), (product, normed, then), strict=True):
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, true[0].numpy(), rtol=1e-4, atol=1e-5)


def test_filters_are_the_first_weights_each_by_its_own_extremes():
    trained = trained_like("murgolo-improved", 32)
    weight = trained.model.conv1.conv.weight
    weight.data[5] = 0.25
    found = first_filters(trained.model)
    assert found.shape == (32, 5, 5, 3)
    for number, image in enumerate(found):
        own = weight[number].detach().numpy()
        if number == 5:
            assert (image == 0.5).all()
            continue
        assert (image.min(), image.max()) == (0, 1)
        for channel in range(3):
            wanted = (own[channel] - own.min()) / (own.max() - own.min())
            np.testing.assert_allclose(image[..., channel], wanted, atol=1e-6)


def test_a_map_without_extent_is_black():
    found = scaled(np.array([[[2.0, 4.0], [3.0, 2.0]], [[7.0, 7.0], [7.0, 7.0]]]))
    assert found.tolist() == [[[0, 1], [0.5, 0]], [[0, 0], [0, 0]]]
