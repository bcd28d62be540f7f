"""fastcnn.archs.layers against the same network written in torch.nn, with the same weights."""

import pytest
import torch
from conftest import TOLERANCE
from torch import nn

from fastcnn.archs.layers import ConvNormAct, GlobalAvgPool, LinearNormAct, ResidualBlock
from fastcnn.archs.spec import Conv, Linear, Pool, Residual

CHANNELS = 5
DOUBLE = torch.float64

CONVS = [
    Conv(7, 3, norm=True, post_slope=0.0),
    Conv(7, 3, norm=True, post_slope=0.01, pool=Pool()),
    Conv(7, 3, norm=True, pre_slope=0.01, pool=Pool(3, 2)),
    Conv(7, 3, norm=True, pre_slope=0.0, post_slope=0.2, pool=Pool(3, 2, 1)),
    Conv(7, 3, norm=True, post_slope=0.0, bias=True),
    Conv(7, 3, stride=2, norm=True),
    Conv(7, 3, stride=2, padding="valid", post_slope=0.0),
    Conv(7, 5, padding="valid", post_slope=0.0, pool=Pool()),
    Conv(7, 5, post_slope=0.01, pool=Pool(3, 2)),
    Conv(7, 3, post_slope=0.01, pool=Pool(3, 2, 1), bias=False),
    Conv(1, 1),
    Conv(7, 2, norm=True, post_slope=0.0, pool=Pool()),
    Conv(7, 4, post_slope=0.0),
    Conv(7, (2, 1), post_slope=0.0),
    Conv(7, (1, 2), norm=True, post_slope=0.0),
]
LINEARS = [
    Linear(7),
    Linear(7, post_slope=0.0),
    Linear(7, norm=True, post_slope=0.0, dropout=0.5),
    Linear(7, norm=True, pre_slope=0.01, dropout=0.3),
    Linear(7, norm=True, post_slope=0.0, bias=True),
]
SEED = 3


def activation(slope):
    return [] if slope == 1 else [nn.ReLU() if slope == 0 else nn.LeakyReLU(slope)]


def rest(record, norm):
    """What follows a product: the modules, the norm among them."""
    return [*activation(record.pre_slope), *norm, *activation(record.post_slope)]


def plain_conv(layer, record):
    padding = record.padding if record.stride == 1 or record.padding == "valid" else 1
    conv = nn.Conv2d(
        CHANNELS,
        record.filters,
        record.kernel,
        record.stride,
        padding,
        bias=layer.conv.bias is not None,
        dtype=DOUBLE,
    )
    conv.load_state_dict(layer.conv.state_dict())
    pool = record.pool
    pools = [nn.MaxPool2d(pool.size, pool.stride, pool.padding)] if pool else []
    return nn.Sequential(conv, *rest(record, plain_norm(layer, nn.BatchNorm2d)), *pools)


def plain_linear(layer, record):
    linear = nn.Linear(CHANNELS, record.units, bias=layer.linear.bias is not None, dtype=DOUBLE)
    linear.load_state_dict(layer.linear.state_dict())
    dropout = [nn.Dropout(record.dropout)] if record.dropout else []
    return nn.Sequential(linear, *rest(record, plain_norm(layer, nn.BatchNorm1d)), *dropout)


def plain_norm(layer, kind):
    if layer.norm is None:
        return []
    norm = kind(layer.norm.num_features, dtype=DOUBLE)
    norm.load_state_dict(layer.norm.state_dict())
    return [norm]


def randomise(model):
    """Weights in fp64 that no symmetry hides; running statistics as well."""
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith(("mean", "var")):
                buffer.uniform_(0.5, 1.5)
    return model.to(memory_format=torch.channels_last)


def assert_same(ours, plain, x):
    """Outputs, gradients and running statistics, in training and then in evaluation."""
    for mode in (True, False):
        results = []
        for model in (ours.train(mode), plain.train(mode)):
            model.zero_grad()
            torch.manual_seed(SEED)
            leaf = x.clone().requires_grad_()
            y = model(leaf)
            y.square().sum().backward()
            gradients = [p.grad for p in model.parameters()]
            buffers = [b for name, b in model.named_buffers() if "num_batches" not in name]
            results.append((y, leaf.grad, gradients, buffers))
        torch.testing.assert_close(*results, **TOLERANCE[torch.float64])


def images(height=9, width=11):
    x = torch.randn(3, CHANNELS, height, width, dtype=torch.float64)
    return x.to(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("record", CONVS, ids=str)
def test_conv_norm_act_is_torch_nn(record):
    layer = randomise(ConvNormAct(CHANNELS, record))
    assert_same(layer, plain_conv(layer, record), images())


@pytest.mark.parametrize("record", LINEARS, ids=str)
def test_linear_norm_act_is_torch_nn(record):
    layer = randomise(LinearNormAct(CHANNELS, record))
    x = torch.randn(6, CHANNELS, dtype=torch.float64)
    assert_same(layer, plain_linear(layer, record), x)


class PlainBlock(nn.Module):
    """Basic block as in He et al. 2016, in torch.nn."""

    def __init__(self, channels, filters, stride, shortcut):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, filters, 3, stride, 1, bias=False),
            nn.BatchNorm2d(filters),
            nn.ReLU(),
            nn.Conv2d(filters, filters, 3, 1, 1, bias=False),
            nn.BatchNorm2d(filters),
        )
        self.shortcut = nn.Identity()
        if shortcut:
            conv = nn.Conv2d(channels, filters, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(filters))

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))


@pytest.mark.parametrize(
    ("filters", "stride", "shortcut"),
    [(CHANNELS, 1, False), (7, 1, True), (CHANNELS, 2, True), (7, 2, True)],
)
def test_residual_block_is_torch_nn(filters, stride, shortcut):
    block = randomise(ResidualBlock(CHANNELS, Residual(filters, stride)))
    assert (block.projection is not None) == shortcut
    plain = PlainBlock(CHANNELS, filters, stride, shortcut).double()
    state = block.state_dict().values()
    plain.load_state_dict(dict(zip(plain.state_dict(), state, strict=True)))
    assert_same(block, plain, images())


def test_same_padding_of_an_even_kernel_is_bottom_and_right():
    layer = ConvNormAct(1, Conv(1, 2, bias=False))
    x = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    with torch.no_grad():
        layer.conv.weight.copy_(torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]]))
        assert torch.equal(layer(x), x)
        layer.conv.weight.copy_(torch.tensor([[[[0.0, 0.0], [0.0, 1.0]]]]))
        want = torch.tensor([[[[5.0, 6, 0], [8, 9, 0], [0, 0, 0]]]])
        assert torch.equal(layer(x), want)


def test_one_value_a_channel_is_torchs_error():
    x = torch.randn(1, CHANNELS, 1, 1)
    layer = ConvNormAct(CHANNELS, Conv(7, 1, norm=True))
    with pytest.raises(ValueError, match="more than 1 value per channel") as torchs:
        nn.Sequential(nn.Conv2d(CHANNELS, 7, 1), nn.BatchNorm2d(7))(x)
    with pytest.raises(ValueError, match="more than 1 value per channel") as ours:
        layer(x)
    assert str(ours.value) == str(torchs.value)
    layer.eval()(x)


def test_residual_of_a_layer_that_pools_is_refused():
    layer = ConvNormAct(CHANNELS, Conv(CHANNELS, pool=Pool()))
    with pytest.raises(ValueError, match="pools"):
        layer(images().float(), images().float())


def test_batches_are_not_counted_but_stay_in_the_state():
    layer = ConvNormAct(CHANNELS, Conv(7, norm=True)).double()
    layer(images())
    assert layer.state_dict()["norm.num_batches_tracked"] == 0
    assert list(layer.state_dict()) == [
        "conv.weight",
        "norm.weight",
        "norm.bias",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("record", CONVS, ids=str)
def test_autocast_keeps_parameters_and_statistics_in_fp32(record, dtype):
    layer = ConvNormAct(CHANNELS, record).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype):
        y = layer(images().float())
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    for parameter in layer.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
    if layer.norm is not None:
        assert layer.norm.running_mean.dtype == torch.float32


def test_global_avg_pool_is_torchs():
    x = images()
    want = nn.AdaptiveAvgPool2d(1)(x).flatten(1)
    torch.testing.assert_close(GlobalAvgPool()(x), want, **TOLERANCE[torch.float64])
