"""The CPU's kernels for 3x3 convolutions on sizes that the small cases of test_conv_ops.py do not
reach: several blocks of tiles and of channels, filters transformed once or block by block, every
layer of the networks; and what the kernels promise of precision and bits.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F

from fastcnn import ops
from fastcnn.archs import NETWORKS
from fastcnn.archs.build import build
from fastcnn.archs.layers import ConvNormAct
from fastcnn.ops import conv_autotune, load, reference

BOUND = {torch.float32: 5e-5, torch.float64: 1e-12}  # of the largest value
PLAIN = (None, None, None, None, False, 1.0, 1.0)
SAME = (1, (1, 1, 1, 1))
# N, C, K, H, W: small filters and many tiles; large filters; several spans of a large input; spans
# of a weight gradient; channels that no vector divides; images of one and two pixels
SIZES = [
    (9, 3, 32, 32, 32),
    (5, 65, 130, 16, 12),
    (3, 200, 190, 9, 7),
    (70, 250, 260, 8, 8),
    (70, 513, 70, 2, 2),
    (9, 70, 513, 1, 1),
]


@pytest.fixture(autouse=True)
def _library():
    load()


def drawn(sizes, dtype, seed=0):
    n, c, k, h, w = sizes
    generator = torch.Generator().manual_seed(seed)

    def image(*shape):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(dtype, memory_format=torch.channels_last)

    return image(n, c, h, w), image(k, c, 3, 3) / (9 * c) ** 0.5, image(n, k, h, w)


def passes(x, filters, dy):
    """Forward, data gradient and weight gradient by the library's kernels."""
    library = torch.ops.fastcnn
    y, _ = library.conv(x, filters, None, *PLAIN, *SAME, None, True, True)
    dx = library.conv_data_gradient(dy, filters, x, *PLAIN, *SAME)[0]
    return y, dx, library.conv_weight_gradient(dy, x, *PLAIN, 3, 3, *SAME)


def truth(x, filters, dy):
    x, filters = x.double().requires_grad_(), filters.double().requires_grad_()
    y = F.conv2d(x, filters, padding=1)
    return y.detach(), *torch.autograd.grad(y, (x, filters), dy.double())


def require_close(got, want, dtype):
    for name, a, b in zip(("y", "dx", "dfilter"), got, want, strict=True):
        assert (a - b).abs().max() <= BOUND[dtype] * b.abs().max(), name
        assert a.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_way_of_cutting_the_work_gives_the_convolution(sizes, dtype):
    tensors = drawn(sizes, dtype)
    require_close(passes(*tensors), truth(*tensors), dtype)


def layers_of_the_networks():
    """C, K, H, W of every 3x3 convolution with stride 1 of the networks."""
    found = set()

    def enter(module, given):
        conv = module.conv
        if conv.kernel_size == (3, 3) and conv.stride == (1, 1):
            found.add((conv.in_channels, conv.out_channels, *given[0].shape[2:]))

    for network in NETWORKS.values():
        for size in network.image_sizes:
            with torch.device("meta"):
                model = build(network, size, network.classes, "torch").eval()
                for module in model.modules():
                    if isinstance(module, ConvNormAct):
                        module.register_forward_pre_hook(enter)
                model(torch.empty(2, 3, size, size))
    return sorted(found)


def test_every_layer_of_the_networks_is_within_the_bound():
    layers = layers_of_the_networks()
    assert len(layers) > 20
    for c, k, h, w in layers:
        tensors = drawn((2, c, k, h, w), torch.float32)
        require_close(passes(*tensors), truth(*tensors), torch.float32)


def test_the_error_of_a_weight_gradient_does_not_grow_with_the_batch():
    x, filters, dy = drawn((512, 8, 8, 32, 32), torch.float32)
    x = x.relu()
    got = torch.ops.fastcnn.conv_weight_gradient(dy, x, *PLAIN, 3, 3, *SAME)
    want = truth(x, filters, dy)[2]
    assert (got - want).abs().max() <= BOUND[torch.float32] * want.abs().max()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_threads_give_the_convolution_and_the_same_ones_the_same_bits(threads):
    torch.set_num_threads(threads)
    for sizes in SIZES[:4]:
        tensors = drawn(sizes, torch.float32)
        first = passes(*tensors)
        require_close(first, truth(*tensors), torch.float32)
        for again in (passes(*tensors) for _ in range(3)):
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


EPILOGUES = list(itertools.product((None, (2, 2, 0)), (False, True), ("plain", "norm", "bias")))


@pytest.mark.parametrize("dtype", BOUND)
@pytest.mark.parametrize(("pool", "residual", "kind"), EPILOGUES)
def test_inference_is_one_kernel(pool, residual, kind, dtype):
    if pool and residual:
        pytest.skip("a layer with a residual has no pool")
    x, filters, dy = drawn((3, 20, 24, 10, 11), dtype)
    vectors = [torch.rand(24, dtype=dtype) + 0.5 for _ in range(4)]

    def layer(ops, cast, **plan):
        to = [cast(t) for t in vectors]
        rest = (*SAME, pool, cast(dy) if residual else None)
        if kind == "norm":
            norm = (*to, False, 0.1, 1e-5, 0.1, 0.0)
            return ops.conv_bn_act(cast(x), cast(filters), None, *norm, *rest, **plan)
        bias = to[0] if kind == "bias" else None
        return ops.conv_bias_act(cast(x), cast(filters), bias, 0.2, *rest, **plan)

    with torch.no_grad():
        got = layer(ops, lambda t: t, plan=conv_autotune.FUSED)
        want = layer(reference, torch.Tensor.double)
    assert (got - want).abs().max() <= BOUND[dtype] * want.abs().max()


def test_a_pool_takes_the_first_of_equal_values_and_passes_nan():
    x = torch.zeros(1, 1, 4, 4).to(memory_format=torch.channels_last)
    x[0, 0, 0, 0] = float("nan")
    filters = torch.zeros(1, 1, 3, 3).to(memory_format=torch.channels_last)
    filters[0, 0, 1, 1] = 1.0
    y, _ = torch.ops.fastcnn.conv_bias_act_pool(x, filters, None, *PLAIN, 0.0, *SAME, True, True)
    assert y[0, 0, 0, 0].isnan()
    clean = torch.ones(1, 1, 8, 8).to(memory_format=torch.channels_last)
    given = (None, *PLAIN, 0.0, *SAME, True, True)
    _, code = torch.ops.fastcnn.conv_bias_act_pool(clean, torch.zeros_like(filters), *given)
    place, negative = code & 0x7F, code & 0x80
    assert (place == 0).all()
    assert (negative == 0x80).all()  # not above 0 before a ReLU, whose gradient is 0 there
