"""Grad-CAM against captum's, on networks written by hand and on the layers' own modules."""

import pytest
import torch
from captum.attr import LayerAttribution, LayerGradCam
from test_ood import images_of, mao, murgolo, trained_like

from fastcnn.archs import get_network
from fastcnn.archs.elementary import Elementary
from fastcnn.archs.spec import layer_table
from fastcnn.errors import UsageError
from fastcnn.insight.analysis.gradcam import choose_operation, enlarged, gradcam

CLASSES = torch.tensor([3, 9, 0, 5])


def table(name, size=32):
    return layer_table(get_network(name), size, 10)


def with_weights(plain, state):
    """A network written by hand, with our weights in its order."""
    plain.load_state_dict(dict(zip(plain.state_dict(), state.values(), strict=True)))
    return plain.eval()


def check(twin, operation, model, layer, images, classes=CLASSES, tolerance=1e-9):
    """Maps and enlarged maps are captum's, as parts of their largest value, which is not 0."""
    found = gradcam(twin, images, operation, classes)
    cam = LayerGradCam(model, layer)
    wanted = cam.attribute(images, target=classes, relu_attributions=True).detach()
    top = wanted.max()
    assert top > 0
    torch.testing.assert_close(found[:, None] / top, wanted / top, rtol=0, atol=tolerance)
    sides = tuple(images.shape[2:])
    large = LayerAttribution.interpolate(wanted, sides, interpolate_mode="bilinear")
    own = enlarged(found, sides)
    assert own.shape == (len(images), *sides)
    torch.testing.assert_close(own[:, None] / top, large / top, rtol=0, atol=tolerance)
    assert found.min() >= 0


BY_HAND = [
    ("murgolo-improved", murgolo, {"Conv2d-1": 0, "BatchNorm2d-2": 1, "ReLU-6": 5, "ReLU-9": 8}),
    ("murgolo-improved", murgolo, {"MaxPool2d-4": 3, "MaxPool2d-10": 9}),
    ("mao-batchnorm", mao, {"LeakyReLU-2": 1, "BatchNorm2d-7": 6, "Conv2d-9": 8}),
]


@pytest.mark.parametrize(("arch", "by_hand", "places"), BY_HAND)
def test_maps_are_those_of_captum_on_a_network_written_by_hand(arch, by_hand, places):
    model = trained_like(arch, 32).model
    plain = with_weights(by_hand(), model.state_dict())
    for operation, place in places.items():
        check(Elementary(model), operation, plain, plain[place], images_of(32, 4), tolerance=1e-5)
    plain, twin, images = plain.double(), Elementary(model).double(), images_of(32, 4).double()
    for operation, place in places.items():
        check(twin, operation, plain, plain[place], images)


def test_maps_are_those_of_captum_in_residual_blocks():
    model = trained_like("resnet18", 16).model.double()
    twin, rows = Elementary(model), table("resnet18", 16)
    images = images_of(16, 4).double()
    classes = model(images).argmax(1)  # for which something must speak
    inside = [row.name for row in rows if row.layer == "block3"]
    layers = {
        "ReLU-3": model.conv1,
        inside[1]: model.block3.projection,
        inside[4]: model.block3.conv1,
        inside[-1]: model.block3,
        choose_operation(rows, None): model.block8,
    }
    for operation, layer in layers.items():
        check(twin, operation, model, layer, images, classes)


def test_maps_are_those_of_captum_where_kernels_are_even():
    model = trained_like("tiny-f", 16).model.double()
    check(Elementary(model), "ReLU-3", model, model.conv1, images_of(16, 4).double())


def test_every_class_has_a_map_of_its_own_and_nothing_is_left_behind():
    trained = trained_like("murgolo-improved", 32)
    twin, images = Elementary(trained.model), images_of(32, 4)
    one = gradcam(twin, images, "ReLU-9", torch.full((4,), 2))
    other = gradcam(twin, images, "ReLU-9", torch.tensor([2, 7, 2, 7]))
    torch.testing.assert_close(one[::2], other[::2])
    assert not torch.allclose(one[1::2], other[1::2])
    assert not one.requires_grad
    assert not twin(images).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(gradcam(twin, images, "ReLU-9", torch.full((4,), 2)), one)


@pytest.mark.parametrize(
    ("arch", "name", "operation"),
    [
        ("cnn-a", None, "MaxPool2d-10"),
        ("cnn-a", "conv3", "ReLU-7"),
        ("cnn-a", "conv2", "MaxPool2d-5"),
        ("cnn-a", "relu-9", "ReLU-9"),
        ("mao-batchnorm", "conv1", "MaxPool2d-4"),
        ("resnet18", None, "ReLU-65"),
        # of vgg16's 32x32 images its last pool leaves a pixel
        ("vgg16", None, "ReLU-43"),
    ],
)
def test_a_layer_is_its_last_operation(arch, name, operation):
    assert choose_operation(table(arch), name) == operation


@pytest.mark.parametrize(
    ("arch", "name", "words"),
    [
        ("cnn-a", "conv9", "no layer 'conv9'; did you mean 'conv"),
        ("cnn-a", "ReLU-8", "no layer 'ReLU-8'; did you mean 'ReLU-"),
        ("cnn-a", "xyz", "no layer 'xyz'; one of conv1, "),
        ("cnn-a", "fc1", "--layer fc1: the output of ReLU-13 has no pixels; the last layer that"),
        ("cnn-a", "flatten", "can show is MaxPool2d-10"),
        ("vgg16", "conv13", "the output of MaxPool2d-44 has a single pixel; the last layer that"),
    ],
)
def test_what_has_no_map_is_refused(arch, name, words):
    with pytest.raises(UsageError) as caught:
        choose_operation(table(arch), name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
