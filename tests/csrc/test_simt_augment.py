"""The CUDA augmentation, compiled for the CPU, against the oracle: the same bits."""

import dataclasses
import mmap

import pytest
import torch
from augment_cases import CASES, FULL, SEED, Case, call, tensors_of
from simt import harness
from simt.chain import Chain

from fastcnn.ops import reference
from fastcnn.ops.reference import augmentation as reference_augment

pytestmark = pytest.mark.full

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_the_oracles(chain, case, dtype):
    t = tensors_of(case)
    assert_same(call(chain, case, t, dtype), call(reference, case, t, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_off_16_bytes(kernels, dtype):
    t = tensors_of(FULL)
    got = call(Chain(kernels, misaligned=True), FULL, t, dtype)
    assert_same(got, call(reference, FULL, t, dtype))


@pytest.mark.parametrize("position", [0, 22, 47, 2**40])
def test_the_order_is_walked_round_and_round(chain, position):
    case = Case(4, 4, count=20, padding=2)
    t = tensors_of(case, length=7, position=position)
    assert_same(call(chain, case, t), call(reference, case, t))


@pytest.mark.parametrize("epoch", [0, 1, 2**31, 2**33 + 1])
def test_epochs(chain, epoch):
    for flip in ("random", "alternating"):
        case = dataclasses.replace(FULL, flip=flip)
        t = tensors_of(case, epoch=epoch)
        assert_same(call(chain, case, t), call(reference, case, t))


def test_bits_do_not_depend_on_the_order_of_threads(chain, kernels):
    case = dataclasses.replace(FULL, height=70, width=64)
    t = tensors_of(case)
    first = call(chain, case, t)
    kernels.descending(True)
    assert_same(call(chain, case, t), first)


def launch(kernels, sizes, dtype):
    found = kernels.launch_configuration(
        op="augment", sizes=(*sizes, 3), dtype=dtype, pool=(2, 2, 0)
    )
    assert len(found) == 1
    return found[0]


def test_one_launch_whose_width_is_that_of_the_rows(kernels):
    assert launch(kernels, (1024, 32, 32), "bfloat16") == (
        "augment_kernel<bf16, 8>",
        1024,
        1,
        128,
        0,
    )
    assert launch(kernels, (128, 32, 32), "float32") == ("augment_kernel<f32, 4>", 128, 2, 128, 0)
    assert launch(kernels, (64, 224, 224), "float16")[2] == 37
    # 28 values of 3 channels are whole vectors of 4 and not of 8
    assert launch(kernels, (2, 28, 28), "float32")[0] == "augment_kernel<f32, 4>"
    assert launch(kernels, (2, 28, 28), "bfloat16")[0] == "augment_kernel<bf16, 1>"


def test_fp64_is_refused(kernels):
    with pytest.raises(AssertionError, match="cudaError 1"):
        call(Chain(kernels), FULL, tensors_of(FULL), torch.float64)


# more than 2^31 values in the batch, and in the images

MAP_NORESERVE = 0x4000
SIDE = 1024
COUNT = 2**31 // (SIDE * SIDE * 3) + 2


def sparse(count, dtype):
    """(count, SIDE, SIDE, 3) zeros that take memory only where they are written."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, count * SIDE * SIDE * 3 * dtype.itemsize, flags)
    return torch.frombuffer(memory, dtype=dtype).view(count, SIDE, SIDE, 3)


@pytest.mark.parametrize("gathered", [False, True])
def test_more_than_2_31_values(chain, kernels, gathered):
    case = Case(SIDE, SIDE, count=1, padding=4, flip="random")
    small = tensors_of(case, samples=1)
    images, x = sparse(COUNT, torch.uint8), sparse(COUNT, torch.bfloat16)
    images[-1] = small["images"][0]
    order = torch.arange(COUNT)
    labels = order + 5
    y = torch.zeros(COUNT, dtype=torch.int64)
    kernels.only_blocks(COUNT - 1, COUNT)
    tensors = {"images": images, "labels": labels, "order": order, "x": x, "y": y}
    tensors |= {name: small[name] for name in ("scale", "bias", "fill")}
    options = {"seed": SEED, "padding": 4, "reflect": True, "flip": 1, "cutout": 0}
    options["gathered"] = gathered
    sizes = {"count": COUNT, "h": SIDE, "w": SIDE, "length": COUNT, "bias_of_pixels": False}
    at = torch.tensor([3, 0])
    chain.launch("augment", torch.bfloat16, **tensors, **options, **sizes, at=at)
    # the oracle's are not gathered: the same sample lies at the same place
    last = {"order": torch.tensor([COUNT - 1]), "at": at, "images": images, "labels": labels}
    want, label = call(reference, case, small | last, torch.bfloat16)
    assert torch.equal(x[-1], want[0].permute(1, 2, 0))
    assert y.nonzero().tolist() == [[COUNT - 1]]
    assert y[-1] == label
    assert not x[: COUNT // 2].any()


@pytest.mark.parametrize("gathered", [False, True])
def test_sample_numbers_beyond_32_bits_have_draws_of_their_own(chain, gathered):
    """The tensors begin so far before their memory that a sample of that number lies in it, unless
    they are gathered."""
    case = Case(8, 8, count=1, padding=4, flip="random", cutout=3)
    far = 2**32 + 1
    t = tensors_of(case, samples=2)
    tensors = {n: t[n] for n in ("at", "scale", "bias", "fill")} | {"order": torch.tensor([far])}
    for name in ("images", "labels"):
        before = 0 if gathered else far * t[name][0].nbytes
        tensors[name] = (t[name].data_ptr() - before) % 2**64
    x, y = torch.empty(1, 8, 8, 3), torch.empty(1, dtype=torch.int64)
    options = {"seed": SEED, "padding": 4, "reflect": True, "flip": 1, "cutout": 3}
    options["gathered"] = gathered
    sizes = {"count": 1, "h": 8, "w": 8, "length": 1, "bias_of_pixels": False}
    chain.launch("augment", torch.float32, **tensors, **options, **sizes, x=x, y=y)
    epoch, samples = t["at"][0], torch.tensor([far])
    crop = reference_augment.draw_crop(SEED, epoch, samples, 4)
    flip = reference_augment.draw_flip(SEED, epoch, samples, "random")
    want = reference_augment.crop_flip(t["images"][:1], torch.tensor([0]), crop, flip, True)
    centre = reference_augment.draw_cutout(SEED, epoch, samples, 8, 8)
    want = reference_augment.cut_out(
        reference_augment.normalize(want, t["scale"], t["bias"]), centre, 3, t["fill"]
    )
    assert torch.equal(x, want)
    assert y.tolist() == t["labels"][:1].tolist()
    assert not torch.equal(crop, reference_augment.draw_crop(SEED, epoch, samples - 2**32, 4))


# errors that must be seen


@pytest.mark.parametrize(
    ("old", "new"),
    [
        # a product and a sum as nvcc would fuse them
        ("__fadd_rn(__fmul_rn(static_cast<float>(pixels[i]), scale[i % 3]), shift)",
         "fmaf(static_cast<float>(pixels[i]), scale[i % 3], shift)"),
        ("const int channel = (first + i) % 3;", "const int channel = i;"),
        ("cut >> i & 1", "cut_row"),
    ],
)  # fmt: skip
def test_planted_errors_are_seen(compiled, tmp_path, old, new):
    plant = harness.Plant(compiled.parent, "augment.cu", "augment.cu", old, new)
    path = harness.compile_module(tmp_path, ["-O2"], plant)
    found = harness.run_apart(
        path,
        "import augment_cases as cases, torch\n"
        "from fastcnn.ops import reference\n"
        "t = cases.tensors_of(cases.FULL)\n"
        "got = cases.call(chain.Chain(kernels), cases.FULL, t)\n"
        "want = cases.call(reference, cases.FULL, t)\n"
        "print(torch.equal(got[0], want[0]))\n",
    )
    assert found == "False\n"
