"""The networks: published counts, analytic figures against the built modules, readings, builder."""

import re
import subprocess
import sys

import pytest
import torch
from conftest import TOLERANCE
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastcnn.archs import NETWORKS, get_network, reports, resnet, vgg
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.archs.spec import (
    Conv,
    Linear,
    Residual,
    flop,
    layer_table,
    parameters,
    totals,
    train_flop,
)
from fastcnn.errors import UsageError

# printed in the report or, for tiny-*, counted in its tables; resnet18: kuangliu/pytorch-cifar
COUNTS = {
    "cnn-a": 591_274,
    "cnn-b": 550_570,
    "cnn-c": 1_304_746,
    "murgolo-base": 116_906,
    "tiny-a": 10_993_704,
    "tiny-e": 55_479_272,
    "tiny-f": 1_121_256,
    "mao-default": 256_058,
    "resnet18": 11_173_962,
}

MAO_FIGURE_1 = """\
Conv2d-1	[-1, 24, 28, 28]	1,824
ReLU-2	[-1, 24, 28, 28]	0
MaxPool2d-3	[-1, 24, 14, 14]	0
Conv2d-4	[-1, 48, 12, 12]	10,416
ReLU-5	[-1, 48, 12, 12]	0
MaxPool2d-6	[-1, 48, 6, 6]	0
Conv2d-7	[-1, 96, 4, 4]	41,568
MaxPool2d-8	[-1, 96, 2, 2]	0
Flatten-9	[-1, 384]	0
Linear-10	[-1, 512]	197,120
ReLU-11	[-1, 512]	0
Linear-12	[-1, 10]	5,130
"""

SIZED = [(network, size) for network in NETWORKS.values() for size in network.image_sizes]
SIZED_IDS = [f"{network.name}-{size}" for network, size in SIZED]
every_size = pytest.mark.parametrize(("network", "size"), SIZED, ids=SIZED_IDS)


def build_meta(network, size):
    """Shapes without memory: enough for counts."""
    with torch.device("meta"):
        return build(network, size, network.classes)


def images(count, size):
    return torch.randn(count, 3, size, size).to(memory_format=torch.channels_last)


def kinds(name, layer=None):
    """Kinds of operations of a network, or of one of its layers, in order."""
    network = get_network(name)
    rows = layer_table(network, network.image_sizes[0], network.classes)
    return [row.name.split("-")[0] for row in rows if layer in (None, row.layer)]


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_published_parameter_counts(name, count):
    network = get_network(name)
    size = network.image_sizes[0]
    assert parameters(network, size, network.classes) == count
    assert sum(p.numel() for p in build_meta(network, size).parameters()) == count


def test_mao_figure_1():
    network = get_network("mao-default")
    rows = layer_table(network, 32, 10)
    lines = [f"{r.name}\t{[-1, *r.output_shape]}\t{r.parameters:,}\n" for r in rows]
    assert "".join(lines) == MAO_FIGURE_1
    found = totals(network, 32, 10)
    assert found[:3] == (256_058, 256_058, 0)
    assert [f"{mb:.2f}" for mb in found[3:]] == ["0.01", "0.47", "0.98", "1.46"]


@every_size
def test_counts_of_every_layer_are_those_of_the_module(network, size):
    model = build_meta(network, size)
    rows = layer_table(network, size, network.classes)
    for name, module in model.named_children():
        analytic = sum(row.parameters for row in rows if row.layer == name)
        assert analytic == sum(p.numel() for p in module.parameters()), name
    assert list(dict.fromkeys(row.layer for row in rows)) == [n for n, _ in model.named_children()]
    assert parameters(network, size, network.classes) == sum(p.numel() for p in model.parameters())


class Recorder(TorchFunctionMode):
    """Kind and output shape of every elementary operation of a forward pass."""

    KINDS = {  # noqa: RUF012 - read only
        "conv2d": "Conv2d",
        "batch_norm": "BatchNorm2d",
        "relu": "ReLU",
        "leaky_relu": "LeakyReLU",
        "max_pool2d": "MaxPool2d",
        "flatten": "Flatten",
        "linear": "Linear",
        "dropout": "Dropout",
        "mean": "GlobalAvgPool",
    }

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.__name__ in self.KINDS:
            self.seen.append((self.KINDS[func.__name__], tuple(out.shape[1:])))
        return out


@every_size
def test_forward_and_backward(network, size):
    # the fused backend's operations are not torch's
    model = build(network, size, network.classes, "torch")
    shapes, layouts = {}, {}

    def record(name):
        def hook(module, inputs, output):
            shapes[name] = tuple(output.shape[1:])
            layouts[name] = output.dim() == 2 or output.is_contiguous(
                memory_format=torch.channels_last
            )

        return hook

    for name, module in model.named_children():
        module.register_forward_hook(record(name))
    with Recorder() as recorder:
        logits = model(images(2, size))
    nn.functional.cross_entropy(logits, torch.tensor([0, network.classes - 1])).backward()

    rows = layer_table(network, size, network.classes)
    assert shapes == {row.layer: row.output_shape for row in rows}
    # BatchNorm1d is the same call; so is a bias's addition that of a residual, left out
    operations = [(row.name.split("-")[0].replace("1d", "2d"), row.output_shape) for row in rows]
    want = [operation for operation in operations if operation[0] != "Add"]
    assert recorder.seen == want
    assert all(layouts.values()), layouts
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if parameter.dim() == 4:
            assert parameter.is_contiguous(memory_format=torch.channels_last), name


@every_size
def test_flop_are_those_torch_counts(network, size):
    model = build_meta(network, size)
    with FlopCounterMode(display=False) as forward:
        loss = model(torch.empty(2, 3, size, size, device="meta")).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted = forward.get_total_flops(), backward.get_total_flops()
    assert 2 * flop(network, size, network.classes) == counted[0]
    assert 2 * train_flop(network, size, network.classes) == sum(counted)


@pytest.mark.parametrize(("name", "mflop"), [("vgg16", 1876), ("cnn-a", 148), ("cnn-c", 316)])
def test_train_flop_of_the_performance_targets(name, mflop):
    # the target's vgg16 has one linear layer less: 512 x 512
    assert train_flop(get_network(name), 32, 10) / 1e6 == pytest.approx(mflop, abs=1.6)


def test_flop_of_a_row():
    row = layer_table(get_network("mao-default"), 32, 10)[0]
    assert row.flop == 2 * 28 * 28 * 24 * 3 * 5 * 5
    assert row.mflop == row.flop / 1e6


def test_names_are_unique():
    networks = [*reports.NETWORKS, *vgg.NETWORKS, *resnet.NETWORKS]
    assert len(networks) == len(NETWORKS) == 27
    assert all(network.name == name for name, network in NETWORKS.items())


def test_unknown_name_gets_the_nearest():
    with pytest.raises(UsageError, match="unknown architecture 'vgg61'; did you mean 'vgg1") as e:
        get_network("vgg61")
    assert e.value.exit_code == 2
    with pytest.raises(UsageError, match="unknown architecture 'xyz'; `fastcnn archs` lists them"):
        get_network("xyz")


def test_report_keys():
    keys = {network.report for network in NETWORKS.values()}
    assert keys == {"marie2019", "murgolo", "skagerstrom2018", "mao2022", "bohnstedt2019", ""}


def test_listing_networks_needs_no_torch():
    code = (
        "import sys\n"
        "from fastcnn.archs import NETWORKS\n"
        "from fastcnn.archs.spec import parameters, train_flop\n"
        "for network in NETWORKS.values():\n"
        "    parameters(network, network.image_sizes[0], network.classes)\n"
        "    train_flop(network, network.image_sizes[0], network.classes)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "resnet18"])  # works on 1x1
def test_too_small_an_image_names_layer_and_smallest_size(name):
    network = get_network(name)
    pattern = rf"{name}: 2x2 images .* layer \w+\d; the smallest size .* (\d+)x\1$"
    with pytest.raises(UsageError, match=pattern) as error:
        build(network, 2, 10)
    smallest = int(re.search(r"(\d+)x\d+$", str(error.value))[1])
    layer_table(network, smallest, 10)
    with pytest.raises(UsageError):
        layer_table(network, smallest - 1, 10)


@pytest.mark.parametrize(
    ("name", "smallest", "layer"),
    [("vgg16", 32, "conv13"), ("murgolo-base", 15, "conv3"), ("mao-kernels", 30, "conv3")],
)
def test_smallest_sizes(name, smallest, layer):
    with pytest.raises(UsageError, match=f"layer {layer}; .* {smallest}x{smallest}"):
        build(get_network(name), smallest - 1, 10)


def test_has_norm():
    without = {"cnn-a", "cnn-b", "cnn-c", "murgolo-base", "murgolo-no-batchnorm"}
    without |= {"tiny-a", "tiny-c"}
    without |= {f"mao-{v}" for v in ("default", "filters", "fc", "kernels", "leaky", "dropout")}
    assert {name for name, network in NETWORKS.items() if not network.has_norm} == without


def test_the_number_of_classes_is_the_datas():
    model = build(get_network("cnn-a"), 32, 7)
    assert model(images(2, 32)).shape == (2, 7)
    count = parameters(get_network("cnn-a"), 32, 7)
    assert COUNTS["cnn-a"] - count == 3 * 129


# readings


def test_mao_batchnorm_follows_each_activation():
    conv = ["Conv2d", "LeakyReLU", "BatchNorm2d", "MaxPool2d"]
    last = ["Conv2d", "MaxPool2d", "Flatten"]
    head = ["Linear", "LeakyReLU", "BatchNorm1d", "Dropout", "Linear"]
    assert kinds("mao-batchnorm") == [*conv, *conv, *last, *head]


def test_mao_variants():
    head = ["Linear", "ReLU", "Linear"]
    assert kinds("mao-fc")[-5:] == ["Linear", "ReLU", *head]
    assert kinds("mao-dropout")[-4:] == ["Linear", "LeakyReLU", "Dropout", "Linear"]
    assert kinds("mao-kernels") == kinds("mao-filters") == kinds("mao-default")
    sides = [layer.kernel for layer in get_network("mao-kernels").layers[:3]]
    assert sides == [7, 5, 3]
    filters = [layer.filters for layer in get_network("mao-batchnorm").layers[:3]]
    assert filters == [64, 128, 256]


def test_murgolo_variants():
    norm = ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    plain = ["Conv2d", "ReLU", "MaxPool2d"]
    body = [*plain, *plain, "Flatten", "Linear", "ReLU"]
    assert kinds("murgolo-base") == [*plain, *body, "Linear"]
    for name in ("improved", "no-scheduler", "no-l2"):
        assert kinds(f"murgolo-{name}") == [*norm, *body, "Dropout", "Linear"]
    assert kinds("murgolo-no-batchnorm") == [*plain, *body, "Dropout", "Linear"]
    assert kinds("murgolo-no-dropout") == [*norm, *body, "Linear"]


def test_a_bias_that_a_norm_cancels_is_left_out():
    assert not Conv(8, norm=True, post_slope=0.0).has_bias
    assert not Linear(8, norm=True).has_bias
    assert Conv(8, norm=True, pre_slope=0.01).has_bias
    assert Conv(8, norm=True, bias=True).has_bias
    assert Conv(8).has_bias
    # mao-batchnorm keeps every bias of mao-filters
    norms = 2 * (64 + 128 + 512)
    counts = [parameters(get_network(f"mao-{v}"), 32, 10) for v in ("filters", "batchnorm")]
    assert counts[1] - counts[0] == norms


def test_tiny_norm_stands_before_the_relu():
    assert kinds("tiny-b", "conv1") == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds("tiny-d", "conv3") == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    assert kinds("tiny-d", "fc1") == ["Linear", "BatchNorm1d", "ReLU", "Dropout"]
    assert kinds("tiny-c", "fc1") == ["Linear", "ReLU", "Dropout"]


@pytest.mark.parametrize(
    ("name", "l2", "penalised"),
    [
        ("tiny-d", 0.0, []),
        ("tiny-e", 1e-3, ["conv3", "conv6", "conv9", "fc1", "fc2", "fc3"]),
        ("tiny-f", 5e-3, ["conv3", "conv6", "conv9"]),
    ],
)
def test_l2_stands_where_table_2_marks_it(name, l2, penalised):
    layers = build_meta(get_network(name), 64).named_children()
    found = {n: layer.l2 for n, layer in layers if n != "flatten"}
    assert found == {n: l2 if n in penalised else 0.0 for n in found}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Conv(8, pre_slope=0.0), "pre_slope"),
        (lambda: Linear(8, pre_slope=0.0), "pre_slope"),
        (lambda: Conv(8, 2, stride=2), "odd kernel"),
    ],
)
def test_records_that_make_no_sense(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# against the same networks in torch.nn


def load_in_order(target, source):
    """Copy a state dict between networks of the same layers under other names."""
    target.load_state_dict(
        dict(zip(target.state_dict(), source.state_dict().values(), strict=True))
    )


def test_mao_default_is_the_printed_code():
    plain = nn.Sequential(
        nn.Conv2d(3, 24, 5, stride=1, padding="valid"),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=2),
        nn.Conv2d(24, 48, 3, stride=1, padding="valid"),
        nn.ReLU(),
        nn.MaxPool2d(2, stride=2),
        nn.Conv2d(48, 96, 3, stride=1, padding="valid"),
        nn.MaxPool2d(2, stride=2),
        nn.Flatten(start_dim=1),
        nn.Linear(2 * 2 * 96, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )
    model = build(get_network("mao-default"), 32, 10)
    load_in_order(plain, model)
    x = images(3, 32)
    torch.testing.assert_close(model(x), plain(x.contiguous()), **TOLERANCE[torch.float32])


@pytest.mark.full
def test_vgg16_is_torchvisions():
    torchvisions = pytest.importorskip("torchvision.models.vgg")
    plain = torchvisions.make_layers(torchvisions.cfgs["D"], batch_norm=True).double()
    model = build(get_network("vgg16"), 32, 10).double()
    initialise(model, "he", torch.Generator().manual_seed(0))
    features = model[: list(dict(model.named_children())).index("flatten")]
    convs = [m for m in plain if isinstance(m, nn.Conv2d)]
    for conv in convs:
        nn.init.zeros_(conv.bias)
    for ours, conv in zip(features, convs, strict=True):
        conv.weight.data.copy_(ours.conv.weight)
    x = images(4, 32).double()
    for mode in (True, False):
        y, want = features.train(mode)(x), plain.train(mode)(x)
        torch.testing.assert_close(y, want, **TOLERANCE[torch.float64])


def test_resnet18_has_the_standard_blocks():
    layers = get_network("resnet18").layers
    blocks = [(b.filters, b.stride) for b in layers if isinstance(b, Residual)]
    assert blocks == [(64, 1), (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), (512, 1)]
    assert kinds("resnet18", "block3")[:2] == ["Conv2d", "BatchNorm2d"]
    assert kinds("resnet18", "block1")[-2:] == ["Add", "ReLU"]
