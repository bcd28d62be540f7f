"""The CUDA kernels, compiled for the CPU, against the oracle in fp64."""

import mmap
import subprocess
import sys

import pytest
import torch
from conftest import LARGE_SHAPE, POOLS
from simt import harness
from simt.chain import Case, Chain, inputs, nchw, oracle, pooled
from torch.nn import functional as F

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SLOPES = [(1.0, 0.0), (0.0, 1.0), (0.01, 1.0), (0.2, 0.1)]
# (N, K, P, Q): vectors of 8 and 4 channels whole, folded, and with pixels left over; one and
# several blocks, more columns than a block has threads
SHAPES = [
    (2, 1, 3, 5),
    (3, 3, 4, 4),
    (2, 17, 5, 3),
    (2, 24, 6, 5),
    (1, 32, 7, 2),
    (4, 65, 3, 3),
    (3, 100, 2, 5),
    (2, 512, 3, 3),
    (4, 3, 1, 1),
    (2, 1100, 3, 1),
    (2, 24, 11, 9),
]


def judge(found, truth, plain, terms):
    """Error against fp64 at most twice plain torch's in this dtype, plus one rounding unit; and
    in the mean over a tensor, where that says something, half a unit whatever torch's error is."""
    for name, true in truth.items():
        ours, unit = found[name].double(), torch.finfo(found[name].dtype).eps
        size = true.abs().max()
        if name in ("dweight", "dbias"):
            # what is rounded are partial sums of n terms of size 1
            size = max(size, (truth["dx"].numel() / true.numel()) ** 0.5)
        if name == "dx":
            size = max(size, terms)
        error = (ours - true).abs().max()
        torchs = (plain[name].double() - true).abs().max()
        assert error <= 2 * torchs + unit * size, (name, error / (2 * torchs + unit * size))
        if true.numel() > 64:
            relative = torch.linalg.vector_norm(ours - true) / torch.linalg.vector_norm(true)
            assert relative <= unit / 2 + 1e-6, name


def check(chain, shape, dtype, case):
    data = inputs(shape, dtype, case)
    found = chain.run(data, case)
    # dx is what is left of these after the projections are taken off
    scale = found["rstd"] * data.weight if "rstd" in found else torch.ones(1)
    terms = (scale * data.dy.float().abs().flatten(0, 2).amax(0)).max()
    judge(found, oracle(data, case, torch.float64), oracle(data, case, dtype), terms)


def fits(shape, pool):
    return min(shape[2:]) + 2 * pool[2] >= pool[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bn_act(chain, shape, dtype):
    for slopes in SLOPES:
        check(chain, shape, dtype, Case(*slopes))
    check(chain, shape, dtype, Case(1.0, 0.0, residual=True, mask="y"))
    check(chain, shape, dtype, Case(0.01, 0.1, residual=True, mask="y"))
    check(chain, shape, dtype, Case(1.0, 1.0, residual=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_running_statistics_and_bias_alone(chain, shape, dtype):
    check(chain, shape, dtype, Case(1.0, 0.0, statistics="running"))
    check(chain, shape, dtype, Case(0.2, 0.1, residual=True, mask="y", statistics="running"))
    check(chain, shape, dtype, Case(1.0, 0.0, statistics="none"))
    check(chain, shape, dtype, Case(1.0, 0.01, residual=True, mask="y", statistics="none"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 16, 5, 6), (1, 8, 9, 9), (2, 4, 6, 7)], ids=str)
def test_pools(chain, shape, dtype):
    # the last ones are those that no kernel is unrolled for
    for pool in [pool for pool in [*POOLS, (2, 1, 0), (3, 3, 1), (4, 3, 2)] if fits(shape, pool)]:
        check(chain, shape, dtype, Case(1.0, 0.0, pool=pool))
        check(chain, shape, dtype, Case(0.01, 0.1, pool=pool))
        check(chain, shape, dtype, Case(0.0, 1.0, pool=pool, statistics="running"))
        check(chain, shape, dtype, Case(1.0, 0.2, pool=pool, statistics="none"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 17, 5, 3), (2, 24, 11, 9), (0, 24, 6, 5)], ids=str)
def test_a_backward_in_parts_has_the_bits_of_the_whole(chain, shape, dtype):
    cases = [Case(0.2, 0.1), Case(1.0, 0.0, residual=True, mask="y")]
    for case in [*cases, *(Case(0.2, 0.1, pool=pool) for pool in POOLS)]:
        data = inputs(shape, dtype, case)
        whole, parts = chain.run(data, case), chain.run(data, case, in_parts=True)
        for name, value in whole.items():
            assert torch.equal(parts[name], value), name


@pytest.mark.parametrize("part", ["sums", "apply"])
def test_a_part_without_batch_statistics_is_refused(kernels, part):
    settings = {"part": part, "batch_stats": False, "pre_slope": 1.0, "post_slope": 1.0}
    settings |= {"sizes": (1, 2, 2, 1), "dtype": "float32"}
    assert kernels.bn_act_backward(**settings) == 1
    assert kernels.bn_act_pool_backward(**settings, pool=(2, 2, 0)) == 1


@pytest.mark.parametrize("counts", [(30, 70), (1, 0, 5), (0, 0), (1, 1)], ids=str)
def test_a_merge_that_counts_itself(kernels, counts):
    """Of several processes' statistics: the host does not know how many values there are."""
    values = [torch.randn(count, 24) + 3 for count in counts]
    means = [v.sum(0) / max(len(v), 1) for v in values]
    squares = [(v - mean).square().sum(0) for v, mean in zip(values, means, strict=True)]
    sizes = [torch.full((24,), float(count)) for count in counts]
    partials = torch.stack([torch.stack(rows) for rows in (means, squares, sizes)])
    found = {name: torch.zeros(24) for name in ("mean", "rstd", "running_mean", "running_var")}
    given = {name: t.data_ptr() for name, t in {**found, "partials": partials}.items()}
    settings = {"rows": len(counts), "k": 24, "count": -1, "momentum": 0.5, "eps": 1e-5}
    assert kernels.bn_merge(**settings, **given) == 0
    whole = torch.cat(values)
    want = dict(found) | {"rstd": torch.ones(24)}
    if len(whole):
        var = whole.var(0, correction=0)
        want = {"mean": whole.mean(0), "rstd": (var + 1e-5).rsqrt()}
        want |= {"running_mean": whole.mean(0) / 2, "running_var": whole.var(0) / 2}
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_image(chain, dtype):
    check(chain, LARGE_SHAPE, dtype, Case(0.0, 0.1))
    check(chain, LARGE_SHAPE, dtype, Case(1.0, 0.0, pool=(3, 2, 1)))


def test_more_tiles_than_a_reduction_has_threads(chain):
    check(chain, (1, 1024, 47, 47), torch.float32, Case(1.0, 0.0, pool=(3, 2, 1)))


@pytest.mark.parametrize("shape", [(2, 24, 6, 5), (2, 17, 5, 4), (2, 64, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_off_16_bytes(kernels, dtype, shape):
    for case in (
        Case(0.01, 0.0),
        Case(1.0, 0.0, residual=True, mask="y"),
        Case(1.0, 0.0, pool=(2, 2, 0)),
        Case(1.0, 0.1, pool=(3, 2, 1), statistics="none"),
    ):
        check(Chain(kernels, misaligned=True), shape, dtype, case)


def test_statistics_of_values_far_from_zero(chain):
    """A mean of 1000 deviations and a first value that is an outlier cost no digits."""
    x = torch.randn(8, 12, 12, 16) + 1000
    x[0, 0, 0] = -1e4
    data = inputs((8, 16, 12, 12), torch.float32, Case())._replace(x=x)
    mean, rstd, *_ = chain.statistics(x, data, True, 1.0)
    rows = x.double().flatten(0, 2)
    truth = 1 / (rows.var(0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=2e-7, atol=0)
    torch.testing.assert_close(rstd.double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("pool", [None, (3, 2, 1)], ids=str)
def test_outputs_that_are_not_wanted(chain, pool):
    case = Case(1.0, 0.0, residual=pool is None, mask="y", statistics="running", pool=pool)
    data = inputs((2, 24, 6, 5), torch.float32, case)
    everything = chain.run(data, case)
    for wanted in [(), ("dbias",), ("dweight",), ("dresidual",)]:
        some = chain.run(data, case, wanted)
        for name in {*wanted, "dx"} & {*some}:
            torch.testing.assert_close(some[name], everything[name], rtol=0, atol=0)


@pytest.mark.parametrize("pool", POOLS, ids=str)
@pytest.mark.parametrize("channels", [3, 8])
def test_nan_inf_and_ties_win_as_in_torch(chain, pool, channels):
    """Index for index: the place in every code is that of max_pool2d's index."""
    data = inputs((4, channels, 9, 8), torch.float32, case := Case(1.0, 0.0, pool=pool))
    x = torch.randint(-2, 3, data.x.shape).float()
    x[torch.rand(x.shape) < 0.1] = torch.nan
    x[torch.rand(x.shape) < 0.1] = torch.inf
    x[torch.rand(x.shape) < 0.2] = -torch.inf
    for slope in (0.0, 1.0, 0.1):
        case = Case(1.0, slope, pool=pool, statistics="none")
        data = data._replace(x=x, bias=torch.zeros(channels))
        found, truth = chain.run(data, case), oracle(data, case, torch.float32)
        torch.testing.assert_close(found["y"], truth["y"], equal_nan=True, rtol=0, atol=0)
        torch.testing.assert_close(found["dx"], truth["dx"], equal_nan=True)
        activated = F.leaky_relu(nchw(x), slope) if slope else F.relu(nchw(x))
        _, index = F.max_pool2d(activated, *pool, return_indices=True)
        torch.testing.assert_close(_index_of(found["code"], pool, 8), index)


def _index_of(code, pool, q):
    """max_pool2d's index, row · Q + column, of the codes of a pool."""
    window, stride, padding = pool
    place = nchw(code).long() & 0x7F
    top = torch.arange(place.shape[2]).view(-1, 1) * stride - padding
    left = torch.arange(place.shape[3]) * stride - padding
    return (top + place // window) * q + left + place % window


@pytest.mark.parametrize("slopes", [(1.0, 0.0), (1.0, 0.1), (0.0, 1.0), (0.1, 1.0)], ids=str)
def test_nan_and_inf_pass_the_activations_as_in_torch(chain, slopes):
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0, -0.0, 0.0, 2.0, -3e38])
    case = Case(*slopes, statistics="running")
    data = inputs((1, 2, 8, 8), torch.float32, case)
    x, dy = (
        t.unsqueeze(-1).expand(1, 8, 8, 2) for t in torch.meshgrid(values, values, indexing="ij")
    )
    ones, zeros = torch.ones(2), torch.zeros(2)
    data = data._replace(x=x.contiguous(), dy=dy.contiguous(), weight=ones, bias=zeros)
    data = data._replace(running_mean=zeros, running_var=ones)
    found, truth = chain.run(data, case), oracle(data, case, torch.float32)
    for name in ("y", "dx"):
        torch.testing.assert_close(found[name], truth[name], equal_nan=True)


@pytest.mark.parametrize("pool", [None, (2, 2, 0), (3, 2, 1)], ids=str)
def test_no_images(chain, pool):
    for case in (Case(1.0, 0.0, pool=pool), Case(pool=pool, statistics="none")):
        found = chain.run(inputs((0, 24, 6, 5), torch.float32, case), case)
        assert found["dx"].numel() == 0
        assert (found["dbias"] == 0).all()
        if case.statistics == "batch":
            assert (found["dweight"] == 0).all()
            assert (found["mean"] == 0).all()
            assert (found["rstd"] == 1).all()


def test_fp64_is_refused(kernels):
    for op in ("bn_act", "bn_stats", "bn_act_pool", "bn_act_backward", "bn_act_pool_backward"):
        settings = {"pool": (2, 2, 0), "batch_stats": False, "training": True, "momentum": 0.1}
        settings |= {"eps": 1e-5, "pre_slope": 1.0, "post_slope": 1.0}
        assert getattr(kernels, op)(sizes=(1, 2, 2, 1), dtype="float64", **settings) == 1


@pytest.mark.parametrize(
    "case",
    [Case(0.01, 0.0), Case(1.0, 0.0, pool=(3, 2, 1)), Case(1.0, 0.1, pool=(2, 2, 0))],
    ids=str,
)
@pytest.mark.parametrize("shape", [(6, 24, 40, 40), (5, 65, 7, 9)], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(chain, kernels, case, shape):
    data = inputs(shape, torch.bfloat16, case)
    first, again = chain.run(data, case), chain.run(data, case)
    kernels.descending(True)
    backwards = chain.run(data, case)
    for name, value in first.items():
        assert torch.equal(again[name], value), name
        assert torch.equal(backwards[name], value), name


def launches(kernels, op, sizes, dtype="bfloat16", pool=(3, 2, 1)):
    """(kernel, blocks, tiles, threads, shared bytes) of each launch."""
    return kernels.launch_configuration(op=op, sizes=sizes, dtype=dtype, pool=pool)


def test_grids_depend_on_the_shape_alone(kernels):
    assert launches(kernels, "bn_act", (128, 32, 32, 64)) == [
        ("bn_act_kernel<bf16, 8, 0>", 2048, 1, 256, 0)
    ]
    two = launches(kernels, "bn_stats", (128, 32, 32, 64))
    assert [launch[0] for launch in two] == ["bn_stats_kernel<bf16, 8>", "bn_stats_finalise_kernel"]
    # 65 channels: 8 pixels a row, and the 3 that are left over
    assert [launch[0] for launch in launches(kernels, "bn_act", (1, 1, 11, 65))] == [
        "bn_act_kernel<bf16, 8, 0>",
        "bn_act_kernel<bf16, 1, 0>",
    ]
    passes = [
        launch[0] for launch in launches(kernels, "bn_act_pool_backward", (4, 8, 8, 64), "float32")
    ]
    assert passes == [
        "bn_act_pool_backward_kernel<f32, 4, 3, 0>",
        "bn_act_backward_finalise_kernel",
        "bn_act_pool_backward_kernel<f32, 4, 3, 1>",
    ]
    with pytest.raises(ValueError, match="no op 'conv'"):
        launches(kernels, "conv", (1, 1, 1, 1))
    with pytest.raises(ValueError, match="no kernel"):
        launches(kernels, "bn_act", (1, 1, 1, 1), "float64")


def test_pooled_shape_is_torchs():
    for shape, pool in [((1, 1, 9, 8), pool) for pool in POOLS]:
        assert pooled(shape, pool) == F.max_pool2d(torch.zeros(shape), *pool).shape


# more than 2^31 elements


MAP_NORESERVE = 0x4000
MANY = 2**28 + 3  # pixels of 8 channels


def sparse(pixels):
    """(pixels, 8) zeros in bf16 that take memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    return torch.frombuffer(mmap.mmap(-1, pixels * 16, flags), dtype=torch.bfloat16).view(-1, 8)


def test_more_than_2_31_elements(chain, kernels):
    """The first and the last rows, by the blocks that have them; the others do not run."""
    x, y, dx = (sparse(MANY) for _ in range(3))
    ends = [slice(0, 3), slice(MANY - 3, MANY)]
    for end in ends:
        x[end] = torch.randn(3, 8)
    like = x.view(MANY, 1, 1, 8)
    k = torch.arange(8) + 1.0
    common = {"mean": k, "weight": 1 / k, "bias": -k, "pre_slope": 1.0, "post_slope": 0.1}
    statistics = {"batch_stats": True, "rstd": k / 2, "dweight": k, "dbias": k}
    (forward,) = launches(kernels, "bn_act", (MANY, 1, 1, 8))
    for blocks in [(0, 1), (forward[1] - 1, forward[1])]:
        kernels.only_blocks(*blocks)
        chain.call("bn_act", like, x=x, y=y, **common)
        workspace = torch.full((kernels.bn_act_backward_workspace(MANY, 1, 1, 8) // 4,), torch.nan)
        tensors = {"x": x, "dy": x, "dx": dx, "workspace": workspace}
        # dweight and dbias are overwritten by a sum with blocks that did not run
        sums = {"dweight": torch.empty(8), "dbias": torch.empty(8)}
        chain.call("bn_act_backward", like, **tensors, **common, **{**statistics, **sums})
    for end in ends:
        z = (x[end].float() - k) / k - k
        torch.testing.assert_close(y[end].float(), F.leaky_relu(z, 0.1), rtol=0.01, atol=0.01)
    # neither has an offset wrapped into the middle nor to the front
    assert not y[2**27 : 2**27 + 4096].any()
    assert not y[2**16 : 2**17].any()


def test_statistics_of_more_than_2_31_elements(chain, kernels):
    x = sparse(MANY)
    x[-3:] = torch.tensor([1.0, 2.0, 6.0]).view(3, 1)
    workspace = torch.full((kernels.bn_stats_workspace(MANY, 1, 1, 8) // 4,), torch.nan)
    tensors = {"running_mean": torch.zeros(8), "running_var": torch.ones(8)}
    tensors |= {"mean": torch.empty(8), "rstd": torch.empty(8), "workspace": workspace, "x": x}
    kernels.only_blocks(0, 1)  # blocks take turns: the last rows are those of the first block
    settings = {"training": True, "momentum": 0.1, "eps": 1e-5, "pre_slope": 1.0}
    chain.call("bn_stats", x.view(MANY, 1, 1, 8), **tensors, **settings)
    mean, squares, count = workspace[: 512 * 8 * 3].view(3, 512, 8)[:, 0]
    assert (count == 2**28 / 512 + 3).all()
    torch.testing.assert_close(mean * count, torch.full((8,), 9.0))
    torch.testing.assert_close(squares, torch.full((8,), 41.0), rtol=1e-4, atol=0)


def test_pool_of_more_than_2_31_elements(chain, kernels):
    n = 2**26 + 1
    x, dx = sparse(4 * n), sparse(4 * n)
    y, dy = sparse(n), sparse(n)
    code = torch.frombuffer(mmap.mmap(-1, n * 8), dtype=torch.uint8)
    x[-3], dy[-1] = 5, 3
    settings = {"pool": (2, 2, 0), "pre_slope": 1.0, "post_slope": 0.0, "code": code}
    like = x.view(n, 2, 2, 8)
    kernels.only_blocks(0, 1)
    chain.call("bn_act_pool", like, x=x, y=y, **settings)
    assert (y[-1] == 5).all()
    assert (code[-8:] == 1).all()
    ((_, blocks, *_),) = launches(kernels, "bn_act", (n, 1, 1, 8))
    kernels.only_blocks(blocks - 1, blocks)
    chain.call("bn_act_pool_backward", like, dy=dy, dx=dx, batch_stats=False, **settings)
    assert dx[-4:, 0].tolist() == [0, 3, 0, 0]


# errors that must be seen


def sanitized_run(path):
    program = [sys.executable, str(harness.HERE / "sanitized.py"), str(path)]
    environment = harness.sanitizer_environment()
    return subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.full
def test_sanitizers_find_nothing_but_a_planted_overrun(sanitized, tmp_path):
    done = sanitized_run(sanitized)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = "min(kTilePixels, args.operands.gather.pixels - first);\n    for (int row"
    for file, old, new in (
        ("bn_act.cu", "walk.step >= at.end", "walk.step > at.end"),
        ("conv_bn_act.cu", rows, "kTilePixels;\n    for (int row"),
    ):
        plant = harness.Plant(sanitized.parent, file, file, old, new)
        (tmp_path / file).mkdir()
        done = sanitized_run(harness.compile_module(tmp_path / file, harness.SANITIZE, plant))
        assert done.returncode != 0
        assert "heap-buffer-overflow" in done.stderr


@pytest.mark.full
def test_a_barrier_that_is_missing_is_seen(compiled, tmp_path):
    plant = harness.Plant(compiled.parent, "bn_stats.cu", "common.cuh", "__syncthreads();", "")
    path = harness.compile_module(tmp_path, ["-O2"], plant)
    found = harness.run_apart(
        path,
        "data = chain.inputs((2, 24, 11, 9), chain.torch.float32, case := chain.Case())\n"
        "found = chain.Chain(kernels).run(data, case)\n"
        'print(found["mean"].isnan().all())\n',
    )
    assert found == "tensor(True)\n"
