"""The convolution's CUDA kernels, compiled for the CPU, against plain torch in fp64."""

import mmap

import pytest
import torch
from simt.chain import EPS, MOMENTUM, nchw
from simt.conv import (
    ConvChain,
    Data,
    Epilogue,
    Pending,
    Plain,
    Shape,
    activate,
    gradients_by_autograd,
    make,
    product,
    windows,
)
from torch.nn import functional as F

from fastcnn.archs import NETWORKS, spec

pytestmark = pytest.mark.full

BF16 = torch.bfloat16
HALVES = [torch.float16, BF16]
NORM = Pending(norm=True, bias=True, post_slope=0.0)
PENDING = [
    NORM,
    Pending(norm=True, bias=True, pre_slope=0.1, post_slope=0.2),
    Pending(bias=True, post_slope=0.1),
    Pending(post_slope=0.0),
]


def zoo() -> list[Shape]:
    """Every geometry of the networks' convolutions, as small as a pool can follow."""
    found = set()
    for network in NETWORKS.values():
        channels = 3
        for record in network.layers:
            if isinstance(record, spec.Residual):
                first, second = record.convs
                convs = [(channels, first), (record.filters, second)]
                convs += [(channels, p) for p in [record.projection(channels)] if p]
            elif isinstance(record, spec.Conv):
                convs = [(channels, record)]
            else:
                continue
            for c, conv in convs:
                found.add((c, conv.filters, conv.kernel_size, conv.stride, conv.pads))
            channels = convs[0][1].filters
    return [
        Shape(2, max(2 * stride, 1 + r - sum(pads[:2])), 2 + s, c, k, (r, s), stride, pads)
        for c, k, (r, s), stride, pads in sorted(found)
    ]


NONE = (0, 0, 0, 0)
ODD = [
    Shape(1, 1, 1, 1, 1, (1, 1), 1, NONE),
    Shape(7, 1, 1, 3, 24),
    Shape(1, 65, 65, 3, 24, stride=2),
    Shape(7, 5, 9, 17, 100),
    Shape(1, 13, 7, 65, 24, (5, 5), 1, (2, 2, 2, 2)),
    Shape(2, 9, 8, 65, 100, (1, 1), 2, NONE),
    Shape(7, 6, 5, 1, 100, (2, 2), 1, (0, 1, 0, 1)),
    Shape(1, 65, 33, 17, 1, (7, 7), 2, (3, 3, 3, 3)),
    Shape(3, 8, 8, 24, 8, (1, 2), 1, (0, 0, 0, 1)),
    Shape(2, 7, 7, 3, 1, (7, 7), 1, NONE),
    Shape(2, 4, 6, 24, 17, (2, 1), 2, (0, 1, 0, 0)),
    Shape(1, 9, 11, 16, 72, (3, 3), 2, (0, 2, 1, 0)),
    Shape(1, 20, 19, 72, 40, (5, 5), 2, (2, 1, 0, 2)),
]
# more tiles of pixels than blocks
LARGE = Shape(1, 270, 260, 8, 8, (1, 1), 1, NONE)
# few enough values for the programs that run apart
SMALL = [Shape(2, 5, 7, 24, 40), Shape(1, 4, 5, 3, 17, (2, 2), 2, (0, 1, 0, 1))]
PADDED = Shape(1, 6, 6, 8, 8, (3, 3), 1, (0, 2, 2, 0))


MAP_NORESERVE = 0x4000
MANY = Shape(1, 1, 2**25 + 3, 64, 64, (1, 1), 1, NONE)
LAST = slice(MANY.w - 3, MANY.w)


def sparse(off=False):
    """Zeros in bf16, of MANY's sizes, that take memory only where they are written; `off` 16
    bytes."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    count = MANY.w * MANY.c
    memory = mmap.mmap(-1, 2 * count + 16, flags)
    return torch.frombuffer(memory, dtype=BF16, count=count, offset=2 * off).view(-1, MANY.c)


@pytest.fixture
def conv(kernels):
    yield ConvChain(kernels)
    kernels.descending(False)
    kernels.only_blocks(0, -1)


def judge(name, found, true, plain, size=0.0):
    """Error against fp64 at most twice that of fp32 sums with one rounding, plus a rounding unit
    of the largest value; in the mean over a tensor, half a unit."""
    unit, found = torch.finfo(found.dtype).eps, found.double()
    assert not found.isnan().any(), name
    if true.numel() == 0:
        return
    largest = float(true.abs().max())
    error, torchs = ((t.double() - true).abs() for t in (found, plain))
    bound = 2 * torchs.max() + unit * max(size, largest)
    assert (error <= bound).all(), (name, error.max(), bound)
    if true.numel() > 64 and size <= largest:
        norm, true_norm = (torch.linalg.vector_norm(t) for t in (error, true))
        assert norm <= (unit / 2 + 1e-6) * true_norm, (name, norm / true_norm)


# ----------------------------------------------------------------------------------- forward


def check_forward(conv, shape, dtype, pending, epilogue) -> None:
    data = make(shape, dtype, pending, epilogue)
    found = conv.forward(shape, data, pending, epilogue)
    exact, plain = (Plain(shape, data, pending, rounds) for rounds in (False, True))
    judge("y", found["y"], exact.forward(epilogue), plain.forward(epilogue))
    if epilogue.code:
        check_codes(found["code"], exact, epilogue, torch.finfo(dtype).eps)
    if epilogue.stats_slope is not None:
        check_statistics(found, epilogue.stats_slope)


def check_statistics(found, slope):
    """Of the values as they are in memory."""
    rows = activate(found["y"].double(), slope).flatten(0, 2)
    count, partials = len(rows), found["partials"]
    assert (partials[2].sum(0) == count).all()
    var = rows.var(0, correction=0)
    torch.testing.assert_close(found["mean"].double(), rows.mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["rstd"].double(), (var + EPS).rsqrt(), rtol=2e-5, atol=0)
    moved = MOMENTUM * found["mean"]
    torch.testing.assert_close(found["running_mean"], moved, rtol=1e-6, atol=1e-7)
    if count > 1:
        unbiased = 1 - MOMENTUM + MOMENTUM * var * count / (count - 1)
        torch.testing.assert_close(found["running_var"].double(), unbiased, rtol=1e-5, atol=0)


def check_codes(code, exact, epilogue, unit):
    """The winner is one as far as rounding lets it be told; and so is its sign."""
    before, behind = (windows(t) for t in exact.before_pool(epilogue))
    place = (code & 0x7F).long().unsqueeze(-1)
    assert (place < 4).all()
    best = behind.amax(-1)
    # the input is rounded once
    tolerance = 2 * unit * (1 + behind.abs().max() if behind.numel() else 0)
    assert (behind.gather(-1, place).squeeze(-1) >= best - tolerance).all()
    winner = before.gather(-1, place).squeeze(-1)
    clear = winner.abs() > tolerance
    negative = winner <= 0 if epilogue.post_slope == 0 else winner < 0
    assert torch.equal(negative[clear], (code & 0x80).bool()[clear])


RAW = Epilogue(stats_slope=1.0)
INFERENCE = Epilogue(True, True, True, pre_slope=0.2, post_slope=0.1)
EPILOGUES = [
    RAW,
    Epilogue(bias=True, stats_slope=0.1),
    INFERENCE,
    Epilogue(bias=True, post_slope=0.0),
    Epilogue(bias=True, post_slope=0.1, pool=True, code=True),
    Epilogue(affine=True, pre_slope=0.1, post_slope=0.0, pool=True),
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_odd_shapes(conv, shape, dtype):
    for epilogue in EPILOGUES:
        check_forward(conv, shape, dtype, Pending(), epilogue)
    for pending in PENDING:
        check_forward(conv, shape, dtype, pending, RAW)
    check_forward(conv, shape, dtype, NORM, EPILOGUES[-2])


@pytest.mark.parametrize("shape", zoo(), ids=str)
def test_shapes_of_the_networks(conv, shape):
    check_forward(conv, shape, torch.bfloat16, Pending(), Epilogue(post_slope=0.0, stats_slope=1.0))
    check_forward(conv, shape, torch.bfloat16, NORM, EPILOGUES[-2])


def test_more_tiles_than_blocks(conv):
    rows = conv.kernels.conv_partial_rows(LARGE.fields)
    assert rows * 128 < LARGE.p * LARGE.q
    check_forward(conv, LARGE, torch.bfloat16, NORM, Epilogue(bias=True, stats_slope=0.1))


def test_most_channels_of_a_pending_input(conv):
    check_forward(conv, Shape(1, 1, 1, 640, 72, (1, 1), 1, NONE), torch.float16, NORM, INFERENCE)


def last_tile(kernels):
    """Only the block of the last pixels is to run."""
    blocks = kernels.conv_partial_rows(MANY.fields)
    last = (MANY.w - 1) // 128 % blocks
    kernels.only_blocks(last, last + 1)


@pytest.mark.parametrize("off", [False, True])
def test_more_than_2_31_elements(conv, kernels, off):
    """The last pixels, by the block that has them; off 16 bytes, by single values."""
    x, y = sparse(off), sparse()
    x[LAST] = torch.arange(192).view(3, 64)
    last_tile(kernels)
    settings = {"pool": False, "stats_slope": 1.0, "pre_slope": 1.0, "post_slope": 1.0}
    settings |= {"in_pre_slope": 1.0, "in_post_slope": 1.0, "filter": torch.eye(64, dtype=BF16)}
    conv.launch("conv", BF16, shape=MANY.fields, x=x, y=y, **settings)
    assert torch.equal(y[LAST], x[LAST])
    # no offset has wrapped to the front
    assert not y[:512].any()


def test_statistics_of_values_far_from_zero(conv):
    """A mean of a thousand deviations costs no digits."""
    data = make(shape := Shape(4, 12, 12, 3, 24), torch.float16, Pending(), epilogue := RAW)
    data = data._replace(x=data.x / 64, of_result={"bias": torch.full((24,), 30.0)})
    found = conv.forward(shape, data, Pending(), epilogue)
    check_statistics(found, 1.0)


def of_residual(conv, dtype, residual):
    """Of a result that is the residual, its rows below each other."""
    shape = Shape(1, 1, *residual.shape, residual.shape[1], (1, 1), 1, NONE)
    epilogue = Epilogue(residual=True, stats_slope=1.0)
    data = make(shape, dtype, Pending(), epilogue)
    data = data._replace(x=data.x * 0, residual=residual.to(dtype).view(data.residual.shape))
    return conv.forward(shape, data, Pending(), epilogue)


def test_statistics_of_one_pixel_are_those_of_bn_stats(conv):
    """Also where the first value, which all are compared with, is not finite."""
    values = torch.tensor([[torch.inf, -torch.inf, torch.nan, 3e4, -2, 0, 1e-7, 1]])
    found = of_residual(conv, torch.float16, values)
    like = (None,) * 5 + (torch.zeros(8), torch.ones(8))
    names = ("mean", "rstd", "running_mean", "running_var")
    for name, true in zip(names, conv.statistics(found["y"], like, True, 1.0), strict=True):
        assert torch.equal(found[name].nan_to_num(7), true.nan_to_num(7)), name
    assert torch.equal(found["mean"][:2], values[0, :2])


def test_statistics_of_a_few_values_that_are_not_finite(conv):
    """One a channel, the first of a thread or another: no variance; nor is there one, but 0, of a
    value that is always the same."""
    values = torch.full((300, 16), 3e4)
    for channel, row in enumerate([0, 5, 32, 128, 299]):
        values[row, channel] = torch.inf
        values[row, 5 + channel] = -torch.inf
        values[row, 10 + channel] = torch.nan
    found = of_residual(conv, torch.float16, values)
    assert not found["mean"][:15].isfinite().any()
    assert found["rstd"][:15].isnan().all()
    assert found["mean"][15] == values.half()[0, 15]
    assert found["rstd"][15] == 1 / torch.tensor(EPS).sqrt()


def test_squares_are_not_negative(conv):
    """The square of a deviation is below the smallest number, the product of sums is not."""
    values = torch.full((128, 8), 2e-23)
    values[::32] = 0
    assert (of_residual(conv, BF16, values)["partials"][1] >= 0).all()


def test_no_images(conv):
    shape = Shape(0, 6, 5, 24, 8)
    found = conv.forward(shape, make(shape, torch.float16, NORM, RAW), NORM, RAW)
    assert found["y"].numel() == 0
    assert (found["mean"] == 0).all()
    assert (found["rstd"] == 1).all()


def test_nan_inf_and_ties_win_as_in_torch(conv):
    """Index for index: the place in every code is that of max_pool2d's index, the sign that of the
    winner, also where all four are -inf."""
    shape = Shape(4, 9, 8, 1, 24, (1, 1), 1, NONE)
    x = torch.randint(-2, 3, (4, 9, 8, 1)).half()
    x[torch.rand(x.shape) < 0.1] = torch.nan
    x[torch.rand(x.shape) < 0.1] = torch.inf
    x[torch.rand(x.shape) < 0.2] = -torch.inf
    x[0, :2, :2], x[1, :2, :2] = torch.inf, -torch.inf
    for slope in (0.0, 1.0, 0.1):
        epilogue = Epilogue(post_slope=slope, pool=True, code=True)
        data = make(shape, torch.float16, Pending(), epilogue)
        signs = torch.randint(0, 2, data.filter.shape).half() * 2 - 1
        data = data._replace(x=x, filter=signs)
        found = conv.forward(shape, data, Pending(), epilogue)
        result = nchw(product(x.float(), signs.float(), shape))
        activated = activate(result, slope)
        pooled, index = F.max_pool2d(activated, 2, return_indices=True)
        torch.testing.assert_close(nchw(found["y"]), pooled.half(), equal_nan=True)
        place = nchw(found["code"]).long() & 0x7F
        rows, columns = (torch.arange(size // 2) * 2 for size in (9, 8))
        at = (rows.view(-1, 1) + place // 2) * 8 + columns + place % 2
        torch.testing.assert_close(at, index)
        winner = result.flatten(2).gather(2, index.flatten(2)).view(index.shape)
        negative = winner <= 0 if slope == 0 else ~(winner > 0)
        assert torch.equal(nchw(found["code"]) >= 0x80, negative)
        assert (nchw(found["y"]) == -torch.inf).any() == (slope > 0)


def test_padding_is_0_behind_the_activation(conv):
    """An input of a bias alone, whose padding would be 1 if it were made as well."""
    pending = Pending(bias=True, post_slope=0.5)
    for channels in (8, 3):
        shape = Shape(1, 4, 4, channels, 8)
        data = make(shape, torch.float16, pending, Epilogue())
        ones = torch.ones_like(data.filter)
        data = data._replace(x=data.x * 0, filter=ones, of_input={"in_bias": torch.ones(channels)})
        y = conv.forward(shape, data, pending, Epilogue())["y"]
        inner = channels * torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]])
        assert torch.equal(y, inner.view(1, 4, 4, 1).expand(1, 4, 4, 8).half())


# --------------------------------------------------------------------------------- gradients


def sum_size(data: Data, plain: dict[str, torch.Tensor], shape: Shape) -> float:
    """Of a sum over the pixels whose terms are rounded to half, in fp32's rounding units."""
    terms = shape.n * shape.h * shape.w
    ratio = torch.finfo(data.x.dtype).eps / torch.finfo(torch.float32).eps
    largest = plain["dx"].abs().max()
    scale = data.of_input.get("in_rstd", torch.ones(1)) * data.of_input.get("in_weight", 1)
    return float(ratio * largest / scale.min() * terms**0.5)


def check_data_gradient(conv, shape, dtype, pending, batch_stats=False):
    data = make(shape, dtype, pending, Epilogue())
    found = conv.data_gradient(shape, data, pending, batch_stats)
    exact = gradients_by_autograd(shape, data, pending, batch_stats)
    plain = Plain(shape, data, pending, rounds=True).data_gradient(batch_stats)
    # dx is what is left of g after the projections are taken off
    terms = Plain(shape, data, pending, rounds=False).data_gradient(False)["dx"].abs().max()
    judge("dx", found["dx"], exact["dx"], plain["dx"], terms if batch_stats else 0.0)
    if "dbias" in found:
        size = sum_size(data, plain, shape)
        judge("dbias", found["dbias"], exact["dbias"], plain["dbias"], size)
    if pending.norm:
        judge("dweight", found["dweight"], exact["dweight"], plain["dweight"], size)


def check_weight_gradient(conv, shape, dtype, pending):
    data = make(shape, dtype, pending, Epilogue())
    exact = gradients_by_autograd(shape, data, pending, batch_stats=False)
    plain = Plain(shape, data, pending, rounds=True).weight_gradient()
    judge("dfilter", conv.weight_gradient(shape, data, pending), exact["dfilter"], plain)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_data_gradient_of_odd_shapes(conv, shape, dtype):
    check_data_gradient(conv, shape, dtype, Pending())
    for pending in PENDING:
        check_data_gradient(conv, shape, dtype, pending)
    if shape.n * shape.h * shape.w > 1:
        for pending in PENDING[:2]:
            check_data_gradient(conv, shape, dtype, pending, batch_stats=True)


@pytest.mark.parametrize("shape", zoo(), ids=str)
def test_data_gradient_of_the_networks(conv, shape):
    check_data_gradient(conv, shape, torch.bfloat16, NORM, batch_stats=True)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", ODD, ids=str)
def test_weight_gradient_of_odd_shapes(conv, shape, dtype):
    for pending in [Pending(), *PENDING]:
        check_weight_gradient(conv, shape, dtype, pending)


@pytest.mark.parametrize("shape", zoo(), ids=str)
def test_weight_gradient_of_the_networks(conv, shape):
    check_weight_gradient(conv, shape, torch.bfloat16, NORM)


def test_gradients_of_more_tiles_than_blocks(conv):
    check_data_gradient(conv, LARGE, torch.bfloat16, NORM, batch_stats=True)
    check_weight_gradient(conv, LARGE, torch.bfloat16, NORM)


def test_sums_are_those_of_the_rounded_gradient(conv):
    """Without a normalisation dx is g itself."""
    pending = Pending(bias=True, post_slope=0.1)
    for shape in ODD[3:6]:
        found = conv.data_gradient(
            shape, make(shape, torch.bfloat16, pending, Epilogue()), pending, False
        )
        sums = found["dx"].double().sum((0, 1, 2))
        torch.testing.assert_close(found["dbias"].double(), sums, rtol=1e-5, atol=1e-5)


def test_sums_that_are_not_wanted(conv):
    data = make(shape := ODD[3], torch.bfloat16, NORM, Epilogue())
    everything = conv.data_gradient(shape, data, NORM, False)
    alone = conv.data_gradient(shape, data, NORM, False, sums=False)
    assert torch.equal(alone["dx"], everything["dx"])


def test_gradients_of_no_images(conv):
    shape = Shape(0, 6, 5, 24, 8)
    data = make(shape, torch.float16, NORM, Epilogue())
    found = conv.data_gradient(shape, data, NORM, True)
    assert (found["dweight"] == 0).all()
    assert (found["dbias"] == 0).all()
    assert (conv.weight_gradient(shape, data, NORM) == 0).all()


@pytest.mark.parametrize("off", [False, True])
def test_data_gradient_of_more_than_2_31_elements(conv, kernels, off):
    x, dy, dx = sparse(), sparse(off), sparse()
    x[LAST], dy[LAST] = torch.randn(3, 64), torch.randn(3, 64)
    workspace = conv.workspace("conv_data_gradient", MANY, BF16)
    # the launch that turns the filters has no such block
    workspace.view(BF16)[: 64 * 64] = torch.eye(64).flatten()
    last_tile(kernels)
    settings = {"in_pre_slope": 1.0, "in_post_slope": 0.5, "batch_stats": False}
    given = {"x": x, "dy": dy, "dx": dx, "workspace": workspace, **settings}
    conv.launch("conv_data_gradient", BF16, shape=MANY.fields, **given)
    assert torch.equal(dx[LAST], torch.where(x[LAST] > 0, dy[LAST], dy[LAST] / 2))
    assert not dx[:512].any()


@pytest.mark.parametrize("off", [False, True])
def test_weight_gradient_of_more_than_2_31_elements(conv, kernels, off):
    """The partial result of the last range of pixels, whose sum with the others is not made."""
    x, dy = sparse(off), sparse(off)
    x[LAST], dy[LAST] = torch.randn(3, 64), torch.randn(3, 64)
    workspace = conv.workspace("conv_weight_gradient", MANY, BF16)
    partials = workspace.view(torch.float32).view(-1, 64, 64)
    kernels.only_blocks(len(partials) - 1, len(partials))
    settings = {"in_pre_slope": 1.0, "in_post_slope": 1.0, "workspace": workspace}
    conv.launch("conv_weight_gradient", BF16, shape=MANY.fields, x=x, dy=dy, **settings)
    torch.testing.assert_close(partials[-1], dy[LAST].float().t() @ x[LAST].float())


# ------------------------------------------------------------------------- all the launchers


def everything(conv, shape, dtype):
    found = {}
    for i, epilogue in enumerate([RAW, INFERENCE, *EPILOGUES[-2:]]):
        for j, pending in enumerate([Pending(), NORM]):
            data = make(shape, dtype, pending, epilogue)
            forward = conv.forward(shape, data, pending, epilogue)
            found |= {f"{name}, {i}, {j}": t for name, t in forward.items()}
    for j, (pending, batch_stats) in enumerate([(Pending(), False), (NORM, False), (NORM, True)]):
        data = make(shape, dtype, pending, Epilogue())
        gradients = conv.data_gradient(shape, data, pending, batch_stats)
        found |= {f"{name}, {j}": t for name, t in gradients.items()}
        found[f"dfilter, {j}"] = conv.weight_gradient(shape, data, pending)
    return found


@pytest.mark.parametrize("shape", [*SMALL, ODD[4], Shape(2, 12, 13, 72, 72)], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(conv, kernels, shape):
    found = []
    for descending in (False, False, True):
        kernels.descending(descending)
        torch.manual_seed(1)
        found.append(everything(conv, shape, torch.bfloat16))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value), name
        assert torch.equal(found[2][name], value), name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [*SMALL, Shape(3, 6, 5, 64, 64)], ids=str)
def test_tensors_off_16_bytes(kernels, shape, dtype):
    conv = ConvChain(kernels, misaligned=True)
    for epilogue in (RAW, INFERENCE, EPILOGUES[-2]):
        for pending in (Pending(), NORM):
            check_forward(conv, shape, dtype, pending, epilogue)
    check_data_gradient(conv, shape, dtype, Pending())
    check_data_gradient(conv, shape, dtype, NORM, batch_stats=True)
    check_weight_gradient(conv, shape, dtype, Pending())
    check_weight_gradient(conv, shape, dtype, NORM)


def test_what_is_refused(kernels):
    slopes = {"in_pre_slope": 1.0, "in_post_slope": 1.0, "pre_slope": 1.0, "post_slope": 1.0}
    given = {"shape": Shape(1, 2, 2, 8, 8).fields, **slopes, "stats_slope": 1.0}
    for dtype in ("float32", "float64"):
        assert kernels.conv(dtype=dtype, pool=False, **given) == 1
        assert kernels.conv_data_gradient(dtype=dtype, batch_stats=False, **given) == 1
        assert kernels.conv_weight_gradient(dtype=dtype, **given) == 1
    half = {**given, "dtype": "float16"}
    assert kernels.conv(pool=True, partials=16, **half) == 1
    assert kernels.conv(pool=True, residual=16, **half) == 1
    # a pending input's vectors must fit into shared memory
    many = {**half, "shape": Shape(1, 1, 1, 641, 8, (1, 1), 1, NONE).fields, "in_bias": 16}
    assert kernels.conv(pool=False, **many) == 1


def test_the_two_gradients_of_plain_torch_agree():
    """The formulas of ConvDataGradient are what autograd makes of the composition."""
    for pending in [Pending(), *PENDING]:
        data = make(shape := SMALL[0], torch.float16, pending, Epilogue())
        for batch_stats in (False, True) if pending.norm else (False,):
            plain = Plain(shape, data, pending, rounds=False)
            found = plain.data_gradient(batch_stats)
            exact = gradients_by_autograd(shape, data, pending, batch_stats)
            for name in ("dx", "dbias", *(["dweight"] if pending.norm else [])):
                torch.testing.assert_close(found[name], exact[name], rtol=1e-4, atol=1e-4)
            dfilter = plain.weight_gradient()
            torch.testing.assert_close(dfilter, exact["dfilter"], rtol=1e-4, atol=1e-4)
