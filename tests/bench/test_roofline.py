"""The byte model of a training step against the table of the project's targets."""

import pytest

from fastcnn.archs import NETWORKS, get_network
from fastcnn.archs.spec import parameters, train_flop
from fastcnn.bench.kernels.roofline import COLUMNS, roofline

BANDWIDTH, RATE, BATCH, BF16 = 4.3e12, 790e12, 1024, 2  # one H200


def of(name, column, batch=BATCH, itemsize=BF16):
    return roofline(get_network(name), batch, itemsize, column, BANDWIDTH, RATE)


# MB an image, images/s: the table of the targets, to half of its last digit
@pytest.mark.parametrize(
    ("name", "column", "megabytes", "half_a_digit", "images_per_s"),
    [
        ("vgg16", "eager", 13.7, 0.05, 200e3),
        ("vgg16", "K1-K3", 6.9, 0.05, 292e3),
        ("vgg16", "K4", 6.35, 0.025, 304e3),
        ("vgg16", "K5", 5.3, 0.05, 328e3),
        ("cnn-a+norm", "eager", 4.6, 0.05, 0.91e6),
        ("cnn-a+norm", "K1-K3", 2.3, 0.05, 1.80e6),
        ("cnn-a+norm", "K4", 2.1, 0.05, 1.96e6),
        ("cnn-a+norm", "K5", 1.7, 0.05, 2.32e6),
        ("cnn-a", "eager", 3.05, 0.025, 1.36e6),
        ("cnn-a", "K4", 1.3, 0.05, 2.98e6),
        ("cnn-c+norm", "eager", 5.8, 0.05, 0.65e6),
        ("cnn-c+norm", "K1-K3", 2.9, 0.05, 1.18e6),
        ("cnn-c+norm", "K4", 2.6, 0.05, 1.26e6),
        ("cnn-c+norm", "K5", 2.2, 0.05, 1.44e6),
    ],
)
def test_the_table_of_the_targets(name, column, megabytes, half_a_digit, images_per_s):
    found = of(name, column)
    assert found.bytes / 1e6 == pytest.approx(megabytes, abs=half_a_digit)
    # the table's cnn-a without a norm is 0.9 % from the model; the others within their rounding
    within = 0.01 if (name, column) == ("cnn-a", "K4") else 0.005
    assert found.images_per_s == pytest.approx(images_per_s, rel=within)


@pytest.mark.parametrize(
    ("name", "mflop"), [("vgg16", 1876), ("cnn-a+norm", 148), ("cnn-a", 148), ("cnn-c+norm", 316)]
)
def test_the_flop_are_those_of_the_layer_table(name, mflop):
    network = get_network(name)
    assert of(name, "K5").flop == train_flop(network, network.image_sizes[0], network.classes)
    assert of(name, "K5").flop / 1e6 == pytest.approx(mflop, rel=2e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_each_stage_of_fusion_costs_no_more_than_the_one_before(name):
    network = get_network(name)
    size, classes = network.image_sizes[0], network.classes
    found = [of(name, column, batch=8) for column in COLUMNS]
    assert [r.seconds for r in found] == sorted((r.seconds for r in found), reverse=True)
    assert found[0].flop == train_flop(network, size, classes)


def test_small_batches_pay_more_for_the_parameters():
    large, small = of("vgg16", "K5"), of("vgg16", "K5", batch=128)
    # update and cast of a weight: 26 bytes a parameter and step
    weights = parameters(get_network("vgg16"), 32, 10)
    assert small.bytes - large.bytes == pytest.approx(26 * weights * (1 / 128 - 1 / 1024))


def test_fp32_moves_twice_the_activations_and_casts_nothing():
    half, single = of("cnn-a+norm", "K5"), of("cnn-a+norm", "K5", itemsize=4)
    weights = parameters(get_network("cnn-a+norm"), 32, 10) / BATCH
    assert single.bytes - 20 * weights == pytest.approx(2 * (half.bytes - 26 * weights))
