"""Whole networks through the fused convolutions, on the CPU, against the same in plain torch.

Each layer leaves its normalisation and activation to the next wherever it may, as on a GPU where
every plan is "fused".
"""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.init import initialise
from fastcnn.archs.layers import ConvNormAct, ResidualBlock
from fastcnn.archs.spec import Conv, Linear, Network, Pool
from fastcnn.ops import conv_autotune, conv_library
from fastcnn.ops.conv_autotune import FUSED, VENDOR, Plan
from fastcnn.train.numerics.half import half_network

NAMES = ["cnn-a", "cnn-b", "vgg11", "tiny-d", "mao-batchnorm", "murgolo-improved", "resnet18"]
BATCH = 8  # statistics of two values would be reproduced by luck alone
LABELS = torch.arange(BATCH) % 10
DOUBLE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.fixture
def chained(monkeypatch):
    """Every layer fused, and deferring where it may."""
    monkeypatch.setattr(conv_autotune, "plan_for", lambda *a, **k: FUSED)
    monkeypatch.setattr(conv_autotune, "may_defer", lambda x: True)


class Called(TorchDispatchMode):
    """Counts by name the operations that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __getitem__(self, name):
        return self.names.count(name)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def twins(name, dtype=torch.float64):
    """The network with backend fused and torch, the same weights, and images for it."""
    network = NETWORKS[name] if isinstance(name, str) else name
    size = network.image_sizes[0]
    models = [build(network, size, 10, backend).to(dtype) for backend in ("fused", "torch")]
    initialise(models[0], "he", torch.Generator().manual_seed(0))
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(BATCH, 3, size, size, dtype=dtype).to(memory_format=torch.channels_last)
    return models, x


def step(model, x):
    """Logits, loss, gradients of what is trained and running statistics of a training step."""
    torch.manual_seed(1)  # dropout
    logits = model(x)
    loss = F.cross_entropy(logits.float() if x.dtype == torch.bfloat16 else logits, LABELS)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()))
    return {
        "logits": logits.detach(),
        "loss": loss.detach(),
        **dict(zip(trained, gradients, strict=True)),
        **{n: b.clone() for n, b in model.named_buffers()},
    }


def assert_close(found, wanted, rtol, atol):
    """Relative to the largest value of each tensor."""
    for name, want in wanted.items():
        scale = max(float(want.abs().max()), 1.0)
        torch.testing.assert_close(
            found[name], want, rtol=rtol, atol=atol * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_torchs(name, chained):
    (fused, plain), x = twins(name)
    with Called() as called:
        found = step(fused, x)
    assert_close(found, step(plain, x), **DOUBLE)
    layers = [m for m in fused.modules() if isinstance(m, ConvNormAct)]
    assert called["conv"] + called["conv_bias_act_pool"] == len(layers)
    assert called["convolution"] == 0
    # what is left to the next layer has no op of its own, nor have the statistics
    normed = [m for m in layers if m.norm is not None and not m.defers]
    linear = [m for m in fused.modules() if isinstance(m, nn.BatchNorm1d)]
    assert called["bn_act"] + called["bn_act_pool"] == len(normed) + len(linear)
    assert called["bn_act_backward"] + called["bn_act_pool_backward"] == len(normed) + len(linear)
    assert called["bn_stats"] == len(linear)


@pytest.mark.parametrize("name", NETWORKS)
def test_layers_defer_to_a_convolution_that_takes_their_result_alone(name):
    network = NETWORKS[name]
    with torch.device("meta"):
        model = build(network, network.image_sizes[0], 10)
    followers = dict(itertools.pairwise(model))
    for module in model:
        if isinstance(module, ConvNormAct):
            follows = isinstance(followers[module], ConvNormAct)
            assert module.defers == (follows and module.pool is None)
        if isinstance(module, ResidualBlock):
            parts = (module.conv1, module.conv2, module.projection)
            assert [part.defers for part in parts if part][:2] == [True, False]
            assert not (module.projection and module.projection.defers)


@pytest.mark.full
@pytest.mark.parametrize("name", ["cnn-b", "vgg11", "resnet18"])
def test_layers_of_different_plans_are_chained(name, chained, monkeypatch):
    made = [VENDOR, FUSED, Plan("fused", "vendor", "fused"), Plan("fused", "fused", "vendor")]
    plan = itertools.cycle([*made, VENDOR])
    monkeypatch.setattr(conv_autotune, "plan_for", lambda *a, **k: next(plan))
    (fused, plain), x = twins(name)
    assert_close(step(fused, x), step(plain, x), **DOUBLE)


# what the first layer has, and what of it is frozen; --freeze-first freezes its convolution
FROZEN = {
    "norm": ({"norm": True, "post_slope": 0.0}, ["conv.weight"]),
    "norm's weight": ({"norm": True, "post_slope": 0.0}, ["conv.weight", "norm.bias"]),
    "norm, bias": ({"norm": True, "bias": True, "pre_slope": 0.1}, ["conv.weight", "conv.bias"]),
    "bias": ({"post_slope": 0.1}, ["conv.weight"]),
}
FUSED_PLANS = [FUSED, Plan("fused", "vendor", "fused"), Plan("fused", "fused", "vendor")]


@pytest.mark.parametrize("pool", [None, Pool()], ids=["", "pool"])
@pytest.mark.parametrize(("first", "frozen"), FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("second", FUSED_PLANS, ids=str)
def test_a_frozen_first_layer_leaves_the_other_gradients(
    first, frozen, second, pool, chained, monkeypatch
):
    # its product has no gradient, but what is pending of it, in the second layer's input, has
    middle = Conv(6, post_slope=0.0, pool=pool)
    layers = (Conv(4, **first), middle, Conv(5, norm=True, post_slope=0.0), Linear())
    for around in (FUSED, VENDOR):
        plan = itertools.cycle([around, second, around])
        monkeypatch.setattr(conv_autotune, "plan_for", lambda *a, plan=plan, **k: next(plan))
        models, x = twins(Network("small", "", (9,), 10, layers))
        for model in models:
            assert model.conv1.defers
            for name in frozen:
                model.conv1.get_parameter(name).requires_grad_(False)
        found, wanted = (step(model, x) for model in models)
        assert {"conv1.norm.weight", "conv1.conv.bias"} & wanted.keys()
        assert "conv1.conv.weight" not in wanted
        assert_close(found, wanted, **DOUBLE)


@pytest.mark.parametrize("name", ["mao-batchnorm", "tiny-d", "cnn-b"])
def test_half_precision_copies_err_at_most_twice_as_much_as_torchs(name, chained):
    # mao-batchnorm has a bias before its norms: half a copy, but fp32 for the op
    models, x = twins(name, torch.float32)
    found, torchs = (step(half_network(m, torch.bfloat16)[0], x.bfloat16()) for m in models)
    truth = step(models[1].double(), x.double())
    for key, true in truth.items():
        assert found[key].dtype == torchs[key].dtype, key
        error, allowed = ((got[key] - true).double().norm() for got in (found, torchs))
        if true.is_floating_point() and true.abs().max() < 1e-12:
            # of a bias that a norm takes out again all is rounding, beside its filter's gradient
            true = truth[key.replace("bias", "weight")]
        assert error <= 2 * allowed + 1e-2 * true.double().norm(), key


@pytest.mark.parametrize("name", ["cnn-b", "vgg11", "resnet18"])
def test_a_step_in_fp32_is_torchs(name, chained):
    (fused, plain), x = twins(name, torch.float32)
    found, wanted = step(fused, x), step(plain, x)
    torch.testing.assert_close(found["loss"], wanted["loss"], rtol=1e-4, atol=1e-5)
    # rounding turns the mask of a ReLU: torch's own gradient of resnet18's first layer is up to
    # 1.1 % of its norm from that of fp64 (three seeds), and the two differ by as much
    for key, want in wanted.items():
        if want.is_floating_point():
            error = (found[key] - want).norm()
            assert error <= 3e-2 * want.norm() + 1e-3, key


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("no_grad", [True, False])
def test_evaluation_is_torchs(name, no_grad, chained):
    (fused, plain), x = twins(name)
    for model in (fused, plain):  # statistics that are not those of initialisation
        with torch.no_grad():
            for key, buffer in model.named_buffers():
                if key.endswith(("mean", "var")):
                    buffer.copy_(torch.linspace(0.5, 1.5, len(buffer)))
    with torch.set_grad_enabled(not no_grad), Called() as called:
        found = fused.eval()(x)
    wanted = plain.eval()(x).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9 * float(wanted.abs().max()))
    layers = [m for m in fused.modules() if isinstance(m, ConvNormAct)]
    whole = [m for m in layers if m.pool in (None, (2, 2, 0))]
    assert called["conv_affine_act"] == (len(whole) if no_grad else 0)


@pytest.mark.full
def test_a_chain_is_traced_without_breaks(chained, monkeypatch):
    def any_number(x):  # of rows of partial statistics, as on a GPU
        return torch.library.get_ctx().new_dynamic_size()

    monkeypatch.setattr(conv_library, "_partial_rows", any_number)
    (fused, _), x = twins("vgg11", torch.float32)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager", dynamic=False)
    found = []
    for call in (fused, compiled):
        torch.manual_seed(1)  # dropout
        logits = call(x)
        gradients = torch.autograd.grad(logits.square().mean(), list(fused.parameters()))
        found.append([logits.detach(), *gradients])
    torch._dynamo.reset()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def kept_bytes(model, x):
    """Bytes of the distinct memory that the backward keeps, parameters apart."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def note(saved):
        storage = saved.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = (storage.nbytes(), storage)  # alive: no address twice
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        model(x)
    return sum(size for size, _ in found.values())


@pytest.mark.parametrize(("name", "share"), [("cnn-b", 1.0), ("vgg13", 0.75), ("resnet18", 0.85)])
def test_a_chain_keeps_less_for_the_backward(name, share, torchs_convolutions, monkeypatch):
    (fused, _), x = twins(name, torch.float32)
    vendor = kept_bytes(fused, x)
    monkeypatch.setattr(conv_autotune, "plan_for", lambda *a, **k: FUSED)
    monkeypatch.setattr(conv_autotune, "may_defer", lambda x: True)
    assert kept_bytes(fused, x) <= share * vendor
