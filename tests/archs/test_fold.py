"""Folded batch norms: the same function to rounding, in memory that never moves."""

import copy
import pickle

import pytest
import torch
from graph_twin import CpuTwin, Recording
from torch import nn

from fastcnn.archs import NETWORKS, get_network
from fastcnn.archs.build import build
from fastcnn.archs.fold import Folded, fold, folds
from fastcnn.archs.init import initialise
from fastcnn.archs.layers import ConvNormAct, LinearNormAct
from fastcnn.archs.spec import Conv, Linear, Network, Residual
from fastcnn.train.numerics.half import half_network

NAMES = [*NETWORKS, "cnn-a+norm"]
WITH_NORM = [name for name in NAMES if get_network(name).has_norm]
BACKENDS = ["torch", "fused", "auto"]
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-9}

# a linear layer with a norm, which no network of the zoo has; a bias before a norm
RARE = Network(
    "rare",
    "",
    (16,),
    10,
    (
        Conv(8, 2, norm=True, bias=True, post_slope=0.1),
        Residual(12, 2),
        Linear(norm=True, units=24, post_slope=0.0, dropout=0.5),
        Linear(norm=True, units=20, bias=True),
        Linear(),
    ),
)


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def draw_norms(model, seed=0):
    """Give every norm parameters and statistics as training leaves them, scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            signs = torch.randint(0, 2, norm.weight.shape, generator=generator) * 2 - 1
            norm.weight.data.uniform_(0.5, 1.5, generator=generator).mul_(signs)
            norm.bias.data.normal_(0, 0.5, generator=generator)
            norm.running_mean.normal_(0, 0.5, generator=generator)
            norm.running_var.uniform_(0.3, 3, generator=generator)


def model_of(network, backend="torch"):
    network = get_network(network) if isinstance(network, str) else network
    model = build(network, network.image_sizes[0], 10, backend)
    initialise(model, "torch", torch.Generator().manual_seed(1))
    draw_norms(model)
    return model.eval()


def images_for(model, network, count=4, dtype=torch.float32):
    size = (get_network(network) if isinstance(network, str) else network).image_sizes[0]
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))
    return images.to(dtype, memory_format=torch.channels_last)


@torch.no_grad()
def logits_of(model, images):
    return model(images).double()


def relative(found, true):
    return ((found - true).abs().max() / true.abs().max()).item()


def norms_of(model):
    return [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]


@pytest.mark.parametrize("name", [*NAMES, RARE], ids=[*NAMES, "rare"])
def test_in_fp64_the_logits_are_the_same(name):
    for backend in BACKENDS if name in ("resnet18", "mao-batchnorm", RARE) else ["torch"]:
        model = model_of(name, backend).double()
        images = images_for(model, name, 2, torch.float64)
        found = logits_of(fold(model), images)
        assert relative(found, logits_of(model, images)) < 1e-12


def test_each_norms_own_eps_counts():
    model = model_of(RARE).double()
    for number, norm in enumerate(norms_of(model), 1):
        norm.eps = number / 10
    images = images_for(model, RARE, 2, torch.float64)
    assert relative(logits_of(fold(model), images), logits_of(model, images)) < 1e-12


@pytest.mark.full
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("name", [*WITH_NORM, RARE], ids=[*WITH_NORM, "rare"])
def test_rounding_is_that_of_the_unfolded_network(name, dtype):
    half = None if dtype is torch.float32 else dtype
    model = model_of(name, "fused")
    images = images_for(model, name, 8)
    truth = logits_of(copy.deepcopy(model).double(), images.double())
    plain = logits_of(half_network(model, half)[0], images.to(dtype))
    folded = logits_of(fold(model, half), images.to(dtype))
    assert relative(folded, truth) <= 2 * relative(plain, truth) + ROUNDING[dtype]


def test_norms_stay_where_an_activation_stands_before_them():
    model = model_of("mao-batchnorm")
    before = [layer for layer in model.modules() if getattr(layer, "pre_slope", 1) != 1]
    assert 0 < len(before) == len(norms_of(fold(model)))


def test_every_other_place_of_a_norm_is_folded():
    folded = fold(model_of(RARE))
    layers = [m for m in folded.modules() if isinstance(m, ConvNormAct | LinearNormAct)]
    assert len(layers) == 1 + 3 + 3  # with both convolutions of a block and its projection
    assert not any(folds(layer) or layer.norm for layer in layers)


def test_the_result_is_for_inference_alone():
    model = model_of(RARE).train()
    folded = fold(model)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in folded.modules())
    assert not any(p.requires_grad for p in folded.parameters())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_weights_keep_their_memory_format_and_have_the_dtypes_that_layers_take(dtype):
    model, folded = model_of(RARE), fold(model_of(RARE), dtype)
    old = dict(model.named_parameters())
    for name, parameter in folded.named_parameters():
        of_op = name.endswith("conv.bias")  # added by the op, in fp32
        assert parameter.dtype == (torch.float32 if of_op or dtype is None else dtype), name
        if name in old:
            assert parameter.stride() == old[name].stride(), name
    assert folded.conv1.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_fold_shares_nothing_with_the_model():
    model = model_of("mao-batchnorm")
    folded = fold(model)
    own = {t.data_ptr() for t in folded.state_dict().values()}
    assert not own & {t.data_ptr() for t in model.state_dict().values()}


def test_the_state_is_that_of_a_network_without_norms():
    plain, folded = model_of("cnn-a"), fold(model_of("cnn-a+norm"))
    plain.load_state_dict(folded.state_dict())
    images = images_for(plain, "cnn-a")
    assert torch.equal(logits_of(plain, images), logits_of(folded, images))


def test_a_folded_network_can_be_copied_and_pickled():
    folded, images = fold(model_of("resnet18")), images_for(None, "resnet18", 2)
    wanted = logits_of(folded, images)
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):  # noqa: S301
        assert torch.equal(logits_of(other, images), wanted)
        assert not any(p.requires_grad for p in other.parameters())


# refreshing


def changed(model):
    """Other weights and statistics in the same memory."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1).add_(0.01)
    draw_norms(model, seed=7)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", [RARE, "mao-batchnorm", "cnn-a"], ids=["rare", "mao", "cnn-a"])
def test_a_refresh_is_a_new_fold_in_the_same_memory(name, dtype):
    model = model_of(name)
    folded = Folded(model, dtype)
    places = {n: t.data_ptr() for n, t in folded.network.state_dict().items()}
    changed(model)
    folded.refresh()
    wanted = fold(model, dtype).state_dict()
    found = folded.network.state_dict()
    assert {n: t.data_ptr() for n, t in found.items()} == places
    assert all(torch.equal(found[n], t) for n, t in wanted.items())


def test_loading_a_state_is_seen():
    model, other = model_of("cnn-a+norm"), model_of("cnn-a+norm")
    changed(other)
    folded = Folded(model)
    model.load_state_dict(other.state_dict())
    folded.refresh()
    wanted = fold(other).state_dict()
    assert all(torch.equal(t, wanted[n]) for n, t in folded.network.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18", RARE], ids=["resnet18", "rare"])
def test_a_refresh_is_a_launch_a_layer_and_does_not_wait(name):
    folded = Folded(model_of(name), torch.bfloat16)
    recording = Recording()  # refuses what waits for the device
    with recording:
        folded.refresh()
    views = ("view", "split", "detach", "alias")
    launches = [f for f, *_ in recording.calls if not any(v in str(f) for v in views)]
    assert len(launches) <= len(folded._folds) + 20


def test_a_graph_sees_what_a_refresh_writes():
    model = model_of(RARE, "fused")
    folded = Folded(model)
    images, logits = images_for(model, RARE), torch.zeros(4, 10)
    with torch.no_grad():
        replay = CpuTwin().capture(lambda: logits.copy_(folded.network(images)))
    changed(model)
    folded.refresh()
    replay()
    assert torch.equal(logits.double(), logits_of(fold(model), images))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ["cnn-a", "mao-batchnorm", "vgg11"])
def test_memory_is_that_of_what_is_folded_or_rounded(name, dtype):
    model = model_of(name)
    network = Folded(model, dtype).network
    shared = {t.data_ptr() for t in model.state_dict().values()}
    own = {n for n, t in network.state_dict().items() if t.data_ptr() not in shared}
    rounded = {n for n, p in half_network(model, dtype)[0].named_parameters() if p.dtype == dtype}
    folded = set()
    if name == "vgg11":  # whose last layer has no norm
        folded = {n for n, _ in network.named_parameters() if not n.startswith("fc2")}
    assert own == rounded | folded


# statistics that a network should not have


@pytest.mark.parametrize("statistic", ["running_mean", "running_var"])
def test_a_nan_reaches_the_logits(statistic):
    model = model_of("vgg11")
    getattr(model.conv2.norm, statistic)[3] = torch.nan
    assert logits_of(fold(model), images_for(model, "vgg11")).isnan().all()


def test_a_negative_variance_is_no_number():
    model = model_of("vgg11")
    model.conv2.norm.running_var[3] = -1.0
    assert logits_of(fold(model), images_for(model, "vgg11")).isnan().all()


@pytest.mark.parametrize("value", [0.0, 1e-30, torch.inf])
def test_extreme_variances_are_those_of_the_norm(value):
    model = model_of("vgg11").double()
    model.conv2.norm.running_var[3] = value
    images = images_for(model, "vgg11", 2, torch.float64)
    found, wanted = logits_of(fold(model), images), logits_of(model, images)
    assert wanted.isfinite().all()
    assert relative(found, wanted) < 1e-12
