"""fastcnn.ops.augment: the oracle's bits, on every device there is; its draws; what it refuses.

The oracle itself is judged by NumPy in test_augment.py, its random words by published ones here.
"""

import dataclasses

import numpy as np
import pytest
import torch
from augment_cases import CASES, FULL, SEED, Case, call, gather, tensors_of
from op_cases import DEVICES, ON_EACH
from scipy import stats

from fastcnn import ops
from fastcnn.ops import reference
from fastcnn.ops.reference import augmentation as reference_augment

P_LIMIT = 1e-4  # of the statistical tests, all with fixed seeds


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


def assert_same(got, want):
    for one, other in zip(got, want, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


# counter, key, words: kat_vectors of Random123, philox4x32, 10 rounds
KNOWN = [
    ("00000000" * 4, "00000000" * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff" * 4, "ffffffff" * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a8885a308d313198a2e03707344",
        "a4093822299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def split_words(text):
    text = text.replace(" ", "")
    return [int(text[i : i + 8], 16) for i in range(0, len(text), 8)]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_words_are_the_published_ones(counter, key, words):
    counters = torch.tensor([split_words(counter)] * 3).T
    drawn = reference_augment.philox(counters, tuple(split_words(key)))
    assert drawn.T.tolist() == [split_words(words)] * 3


@pytest.mark.parametrize(("device", "dtype"), ON_EACH)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_are_the_oracles(case, device, dtype):
    t = tensors_of(case, device)
    x, y = call(ops, case, t, dtype)
    assert_same((x, y), call(reference, case, t, dtype))
    assert x.shape == (case.count, 3, case.height, case.width)
    assert x.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", DEVICES)
def test_the_oracle_has_the_same_bits_on_every_device(device):
    want = call(reference, FULL, tensors_of(FULL))
    got = call(reference, FULL, tensors_of(FULL, device))
    assert_same([t.cpu() for t in got], want)


def test_products_and_sums_are_rounded_apart():
    """A fused multiply-add differs in every other value: the cases above would see one."""
    t = tensors_of(Case(32, 32))
    x, _ = call(reference, Case(32, 32), t)
    exact = t["images"].double() * t["scale"].double() + t["bias"].double()
    index = reference_augment.next_samples(t["order"], t["at"], 9)
    fused = exact[index].float().permute(0, 3, 1, 2)
    assert 0.05 < (x != fused).double().mean() < 0.95


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("position", [0, 5, 22, 23, 47, 2**40])
def test_the_order_is_walked_round_and_round(position, device):
    case = Case(4, 4, count=60)
    t = tensors_of(case, device, length=7, position=position)
    x, y = call(ops, case, t)
    assert_same((x, y), call(reference, case, t))
    order = t["order"].tolist()
    wanted = [order[(position + i) % 7] for i in range(60)]
    assert y.tolist() == t["labels"][wanted].tolist()


@pytest.mark.parametrize("module", [ops, reference])
def test_choices_depend_on_seed_epoch_and_sample_alone(module):
    """Neither on the batch size, nor on the place in it or in the order, nor on other options."""
    case = dataclasses.replace(FULL, count=23)
    t = tensors_of(case, position=0)
    x, _ = call(module, case, t)
    by_sample = dict(zip(t["order"].tolist(), x, strict=True))
    for count, shift in [(1, 3), (4, 8), (23, 11)]:
        other = t | {"order": t["order"].roll(shift), "at": torch.tensor([3, 2])}
        again, _ = call(module, case, other, count=count)
        for sample, image in zip(other["order"].roll(-2).tolist(), again, strict=False):
            assert torch.equal(image, by_sample[sample])
    changes = [{"at": torch.tensor([4, 0])}, {}]
    for change, seed in zip(changes, (SEED, SEED + 2**33), strict=True):
        other, _ = call(module, case, t | change, seed=seed)
        # some draws agree by chance
        same = sum(torch.equal(one, two) for one, two in zip(other, x, strict=True))
        assert same <= 2


def test_switching_an_option_on_leaves_the_others_choices():
    case = dataclasses.replace(FULL, bias_of_pixels=False)
    t = tensors_of(case)
    with_cutout, _ = call(ops, case, t)
    without, _ = call(ops, dataclasses.replace(case, cutout=0), t)
    fill = t["fill"].view(1, 3, 1, 1)
    assert torch.equal(with_cutout, torch.where(with_cutout == fill, fill, without))
    # the flip has words of its own: the crop is the same with it and without
    cropped, _ = call(ops, dataclasses.replace(case, cutout=0, flip="none"), t)
    same, mirrored = (
        [torch.equal(one, two) for one, two in zip(without, other, strict=True)]
        for other in (cropped, cropped.flip(3))
    )
    assert all(s != m for s, m in zip(same, mirrored, strict=True))
    assert 0 < sum(mirrored) < FULL.count


@pytest.mark.parametrize("epoch", [0, 1, 2, 7, 2**31, 2**33 + 1])
def test_epochs_of_the_alternating_flip(epoch):
    case = Case(4, 6, count=23, flip="alternating")
    first, next_one, plain = (
        call(ops, dataclasses.replace(case, flip=flip), tensors_of(case, epoch=number))[0]
        for number, flip in ((epoch, "alternating"), (epoch + 1, "alternating"), (0, "none"))
    )
    assert torch.equal(first, next_one.flip(3))
    mirrored = (first != plain).flatten(1).any(1)
    wanted = reference_augment.draw_flip(SEED, torch.tensor(0), torch.arange(23), "alternating")
    wanted = wanted[tensors_of(case)["order"].roll(-5)]
    assert torch.equal(mirrored, wanted if epoch % 2 == 0 else ~wanted)


# Images that were gathered before


def gathered(case):
    return dataclasses.replace(case, gathered=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("module", [ops, reference])
@pytest.mark.parametrize("case", [c for c in CASES if not c.gathered], ids=str)
def test_gathered_images_become_what_they_become_where_they_lie(case, module, device):
    t = tensors_of(case, device)
    want = call(module, case, t)
    before = {name: values.clone() for name, values in gather(t, case.count).items()}
    assert len(before["images"]) == case.count + 1 < len(t["images"])
    assert_same(call(module, gathered(case), before), want)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("position", [0, 5, 22, 2**40])
def test_gathered_images_are_a_batch_wherever_it_begins(position, device):
    t = tensors_of(FULL, device, position=position)
    assert_same(call(ops, gathered(FULL), gather(t, 9)), call(ops, FULL, t))


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_of_gathered_samples_have_no_end(device):
    t = tensors_of(gathered(FULL), device)
    t["order"] = t["order"] + 2**40
    t["order"][5] = 2**63 - 1
    assert_same(call(ops, gathered(FULL), t), call(reference, gathered(FULL), t))


@pytest.mark.parametrize("device", DEVICES)
def test_fewer_gathered_images_than_the_batch_has(device):
    t = tensors_of(gathered(FULL), device)
    assert len(t["images"]) == 10
    call(ops, gathered(FULL), t, count=10)
    with pytest.raises(RuntimeError, match="images: expected at least 11, got 10"):
        call(ops, gathered(FULL), t, count=11)


def test_negative_numbers_of_gathered_samples_on_the_cpu():
    t = tensors_of(gathered(FULL), position=0)
    t["order"][3] = -1
    with pytest.raises(RuntimeError, match=f"order: expected samples 0 to {2**63 - 1}, got -1"):
        call(ops, gathered(FULL), t)


def test_threads_do_not_change_bits():
    case = dataclasses.replace(FULL, count=301)
    t = tensors_of(case)
    for dtype in ops.DTYPES["cpu"]:
        torch.set_num_threads(1)
        one = call(ops, case, t, dtype)
        torch.set_num_threads(3)
        for _ in range(5):
            assert_same(call(ops, case, t, dtype), one)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_without_graph_breaks(device):
    t = tensors_of(FULL, device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_same(compiled(ops, FULL, t), call(ops, FULL, t))
    torch.compiler.reset()


# What is drawn, of many samples

MANY = 40_000


@pytest.fixture(scope="module")
def drawn():
    """Offsets, flips and cutout centres of many samples at one seed and epoch."""
    epoch, samples = torch.tensor(2), torch.arange(MANY)
    crop = reference_augment.draw_crop(1, epoch, samples, 4).numpy() + 4
    flip = reference_augment.draw_flip(1, epoch, samples, "random").numpy()
    fixed = reference_augment.draw_flip(1, epoch, samples, "alternating").numpy()
    return crop, flip, fixed, reference_augment.draw_cutout(1, epoch, samples, 10, 8).numpy()


def test_offsets_and_centres_are_uniform_and_flips_fair(drawn):
    crop, flip, fixed, cutout = drawn
    offsets = np.bincount(crop[:, 0] * 9 + crop[:, 1], minlength=81)
    centres = np.bincount(cutout[:, 0] * 8 + cutout[:, 1], minlength=80)
    assert offsets.shape == (81,)
    assert centres.shape == (80,)
    assert stats.chisquare(offsets).pvalue > P_LIMIT
    assert stats.chisquare(centres).pvalue > P_LIMIT
    for flips in (flip, fixed):
        assert stats.binomtest(int(flips.sum()), MANY, 0.5).pvalue > P_LIMIT


def test_choices_are_independent_of_each_other_and_of_the_neighbour(drawn):
    crop, flip, fixed, cutout = drawn
    columns = [crop[:, 0], crop[:, 1], flip * 1, fixed * 1, cutout[:, 0], cutout[:, 1]]
    columns += [np.roll(crop[:, 0], 1), np.roll(flip * 1, 1)]
    for i, one in enumerate(columns):
        for other in columns[:i]:
            table = np.histogram2d(one, other, [range(one.max() + 2), range(other.max() + 2)])[0]
            assert stats.chi2_contingency(table).pvalue > P_LIMIT


def test_random_flips_of_two_epochs_are_independent():
    samples = torch.arange(MANY)
    pair = [
        reference_augment.draw_flip(1, torch.tensor(e), samples, "random").numpy() for e in (0, 1)
    ]
    table = np.histogram2d(*pair, bins=2)[0]
    assert stats.chi2_contingency(table).pvalue > P_LIMIT


# What is refused


@pytest.mark.parametrize("device", DEVICES)
def test_arguments_that_do_not_fit(device):
    t = tensors_of(FULL, device)
    shape = r"\[16, 24, 3\]"
    wrong = {
        "images": [
            (t["images"].int(), "images: expected contiguous uint8"),
            (t["images"][:, :, ::2], "images: expected contiguous uint8"),
            (t["images"][..., :2].contiguous(), r"images: .*got \[23, 16, 24, 2\]"),
            (t["images"][0], "images: expected contiguous uint8"),
            (t["images"][:0], "images: expected at least one"),
        ],
        "labels": [
            (t["labels"][1:], r"labels: expected contiguous int64 \[23\], got \[22\]"),
            (t["labels"].int(), "labels: expected contiguous int64"),
        ],
        "order": [
            (t["order"][:0], r"order: expected int64 \[L\], got \[0\]"),
            (t["order"][None], r"order: expected int64 \[L\]"),
            (t["order"].int(), "order: expected contiguous int64"),
            (t["order"].repeat(2)[::2], "order: expected contiguous int64"),
        ],
        "at": [(t["at"][:1], r"at: expected contiguous int64 \[2\], got \[1\]")],
        "scale": [
            (t["scale"].double(), "scale: expected contiguous float32"),
            (t["scale"][:2], r"scale: expected contiguous float32 \[3\], got \[2\]"),
        ],
        "bias": [
            (t["bias"][1:], rf"bias: expected contiguous float32 \[3\] or {shape}, got"),
            (t["bias"].bfloat16(), "bias: expected contiguous float32"),
        ],
        "fill": [(t["fill"][None], r"fill: expected contiguous float32 \[3\], got \[1, 3\]")],
    }
    for name, values in wrong.items():
        for value, message in values:
            with pytest.raises(RuntimeError, match=message):
                call(ops, FULL, t | {name: value})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"count": -1}, r"count: expected 1 to 2\^31 - 1, got -1"),
        ({"padding": -1}, r"padding: expected 0 to 2\^29 - 1, got -1"),
        ({"padding": 16}, "padding: expected less than the image's side, 16, to reflect, got 16"),
        ({"padding": 2**29, "reflect": False}, r"padding: expected 0 to 2\^29 - 1"),
        ({"cutout": -1}, r"cutout: expected 0 to 2\^29 - 1, got -1"),
        ({"cutout": 2**29}, r"cutout: expected 0 to 2\^29 - 1"),
    ],
)
def test_options_that_do_not_fit(change, message, device):
    with pytest.raises(RuntimeError, match=message):
        call(ops, dataclasses.replace(FULL, **change), tensors_of(FULL, device))


@pytest.mark.parametrize("module", [ops, reference])
def test_unknown_flip(module):
    with pytest.raises(ValueError, match="flip: expected one of none, random, alternating"):
        call(module, dataclasses.replace(FULL, flip="both"), tensors_of(FULL))


def test_count_of_zero():
    t = tensors_of(FULL)
    with pytest.raises(RuntimeError, match="count: expected 1"):
        call(ops, dataclasses.replace(FULL, count=0), t)


def test_samples_and_positions_out_of_range_on_the_cpu():
    t = tensors_of(FULL, position=0)
    for sample in (-1, 23):
        order = t["order"].clone()
        order[8] = sample
        with pytest.raises(RuntimeError, match=f"order: expected samples 0 to 22, got {sample}"):
            call(ops, FULL, t | {"order": order})
        call(ops, FULL, t | {"order": order}, count=8)  # it is not the next batch's
    for at in ([-1, 0], [0, -1]):
        with pytest.raises(RuntimeError, match="at: expected epoch and position >= 0"):
            call(ops, FULL, t | {"at": torch.tensor(at)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_dtypes_without_a_kernel(dtype):
    with pytest.raises(RuntimeError, match="x: expected"):
        call(ops, FULL, tensors_of(FULL), dtype)


@pytest.mark.cuda
def test_tensors_of_two_devices():
    t = tensors_of(FULL, "cuda")
    for name in ("labels", "order", "at", "scale", "bias", "fill"):
        with pytest.raises(RuntimeError, match=f"{name}: expected the device of the images"):
            call(ops, FULL, t | {name: t[name].cpu()})
