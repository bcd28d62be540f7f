"""The loaders: order, position, resume, independence of batch size, agreement with each other.

"fused" and "resident" are the resident loader with the native library and with plain torch;
test_resident.py has what it alone promises, test_file_loaders.py what images in files bring.
"""

import builtins
import itertools
import os
import re
import signal
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import coordinates, make_images
from loader_cases import (
    CASES,
    EVERYTHING,
    FUSED,
    LOADERS,
    assert_same_batches,
    by_label,
    epoch_labels,
    loader_of,
    numbered,
    placed,
    worker_pids,
)
from scipy import stats

from fastcnn.config import AugmentConfig
from fastcnn.data import Normalization
from fastcnn.data.draws import alternating_flip
from fastcnn.data.loaders import torch_loader
from fastcnn.errors import DataError, UsageError

P_LIMIT = 1e-4  # of the statistical tests, all with fixed seeds


@pytest.fixture(autouse=True, scope="module")
def _library(library):
    return library


@pytest.mark.parametrize("kind", LOADERS)
@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 30),
    batch=st.integers(1, 40),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
)
def test_each_sample_once_an_epoch(kind, count, batch, shuffle, drop_last):
    images = numbered(count)
    options = {"batch": batch, "shuffle": shuffle, "drop_last": drop_last}
    if drop_last and batch > count:
        with pytest.raises(UsageError, match="--drop-last"):
            loader_of(images, kind, **options)
        return
    loader = loader_of(images, kind, **options)
    assert loader.samples == count
    for epoch in range(2):
        assert loader.state_dict() == {"epoch": epoch, "position": 0}
        sizes, seen = [], []
        for x, y in loader:
            sizes.append(len(x))
            seen += y.tolist()
        assert len(sizes) == len(loader)
        assert all(size == batch for size in sizes[:-1])
        assert len(seen) == (count // batch * batch if drop_last else count)
        assert len(set(seen)) == len(seen)
        assert shuffle or seen == sorted(seen)


@pytest.mark.parametrize("kind", LOADERS)
def test_order_follows_seed_and_epoch(kind):
    images = numbered(50)
    first, again, other = (loader_of(images, kind, seed=seed) for seed in (0, 0, 1))
    orders = [epoch_labels(first) for _ in range(3)]
    assert orders == [epoch_labels(again) for _ in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert epoch_labels(other) not in orders


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("augment", [None, AugmentConfig(), EVERYTHING])
def test_shape_dtype_and_layout(kind, dtype, augment):
    if kind == "fused" and dtype == torch.float16:
        pytest.skip("no kernel for fp16 on the CPU")
    images = make_images(5, 8, 10)
    for x, y in loader_of(images, kind, augment, dtype=dtype, batch=5):
        assert x.shape == (5, 3, 8, 10)
        assert x.dtype == dtype
        assert x.stride() == (240, 1, 30, 3)
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert y.dtype == torch.int64
        assert y.shape == (5,)


@pytest.mark.parametrize("mode", ["zscore", "unit", "centered", "mean-image"])
@pytest.mark.parametrize("augment", [None, AugmentConfig(crop_padding=0, flip="none")])
def test_loaders_are_bit_equal_without_augmentation(mode, augment):
    images = make_images(23)
    fitted = Normalization.fit(images, mode)
    found = [list(loader_of(images, kind, augment, normalization=fitted)) for kind in LOADERS]
    for other in found[1:]:
        assert_same_batches(found[0], other)
    pixels = torch.from_numpy(images.pixels)
    expected = {bytes(p.numpy()): fitted.apply(p[None])[0] for p in pixels}
    got = torch.cat([x for x, _ in found[0]]).permute(0, 2, 3, 1)
    assert {bytes(x.numpy()) for x in got} == {bytes(x.numpy()) for x in expected.values()}


@pytest.mark.parametrize("kind", LOADERS)
def test_images_of_an_epoch_are_drawn_anew_each_time(kind):
    images = numbered(20)
    loader = loader_of(images, kind, epoch_images=6)
    whole = loader_of(images, kind)
    assert (len(loader), loader.samples) == (2, 6)
    epochs = [epoch_labels(loader) for _ in range(30)]
    assert all(len(set(labels)) == 6 for labels in epochs)
    assert epochs[0] == epoch_labels(whole)[:6]  # of the order of all, the first
    assert set().union(*epochs) == set(range(20))


def test_images_of_an_epoch_are_resumed_and_shared_by_processes():
    images = numbered(20)
    whole = loader_of(images, epoch_images=10)
    first = next(iter(whole))[1].tolist()
    resumed = loader_of(images, epoch_images=10)
    resumed.load_state_dict({"epoch": 0, "position": 4})
    rest = [label for _, labels in resumed for label in labels.tolist()]
    shares = [
        epoch_labels(loader_of(images, epoch_images=10, rank=rank, world=3)) for rank in range(3)
    ]
    expected = epoch_labels(loader_of(images, epoch_images=10))
    assert first + rest == expected
    assert shares == [expected[rank::3] for rank in range(3)]


def test_more_images_of_an_epoch_than_there_are():
    with pytest.raises(UsageError, match="--epoch-images 21: there are 20 training images"):
        loader_of(numbered(20), epoch_images=21)


@pytest.mark.parametrize(("kind", "workers", "place"), CASES)
@pytest.mark.parametrize("augment", [EVERYTHING, FUSED])
def test_resume_at_every_position(kind, workers, place, augment, tmp_path):
    images = placed(make_images(22), place, tmp_path)
    options = {"kind": kind, "augment": augment, "workers": workers}
    whole = loader_of(images, **options)
    states, batches = [whole.state_dict()], []
    for epoch in range(2):
        for batch in whole:
            batches.append(batch)
            states.append(whole.state_dict())
            assert states[-1] == {
                "epoch": epoch,
                "position": min((len(batches) - 6 * epoch) * 4, 22),
            }
    assert whole.state_dict() == {"epoch": 2, "position": 0}
    resumed = loader_of(images, **options)
    for done, state in enumerate(states):
        resumed.load_state_dict(state)
        rest = list(resumed)
        if len(batches) - done - len(rest) > 0:
            rest += list(resumed)
        assert_same_batches(rest, batches[done:])


@pytest.mark.parametrize(("kind", "workers", "place"), CASES)
@pytest.mark.parametrize("done", [0, 2, 6])
def test_batches_ahead_move_nothing(kind, workers, place, done, tmp_path):
    images = placed(make_images(22), place, tmp_path)
    whole = loader_of(images, kind, EVERYTHING)
    batches = list(whole) + list(whole)
    loader = loader_of(images, kind, EVERYTHING, workers=workers)
    for _ in itertools.islice(loader, done):
        pass
    state = loader.state_dict()
    for count in (2, 6):
        left = 6 - done % 6
        assert_same_batches(list(loader.ahead(count)), batches[done:][: min(count, left)])
        assert loader.state_dict() == state
    rest = list(loader) + list(loader)
    assert_same_batches(rest[: 12 - done], batches[done:])


@pytest.mark.parametrize(("kind", "workers", "place"), CASES)
@pytest.mark.parametrize("augment", [EVERYTHING, FUSED])
def test_iteration_given_up_goes_on_where_it_stopped(kind, workers, place, augment, tmp_path):
    images = placed(make_images(22), place, tmp_path)
    whole = list(loader_of(images, kind, augment))
    loader = loader_of(images, kind, augment, workers=workers)
    first = []
    for batch in loader:
        first.append(batch)
        if len(first) == 2:
            break
    assert loader.state_dict() == {"epoch": 0, "position": 8}
    assert_same_batches(first + list(loader), whole)
    assert loader.state_dict() == {"epoch": 1, "position": 0}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize(
    "augment", [EVERYTHING, FUSED, AugmentConfig(crop_padding=0, resized_crop=0.3)]
)
def test_result_does_not_depend_on_batch_size(kind, augment):
    images = numbered(13)
    results = [by_label(loader_of(images, kind, augment, batch=batch)) for batch in (1, 4, 13)]
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for label, x in results[0].items():
            assert torch.equal(x, other[label])


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("augment", [EVERYTHING, FUSED])
def test_resume_with_another_batch_size(kind, augment):
    images = numbered(13)
    whole = by_label(loader_of(images, kind, augment))
    loader = loader_of(images, kind, augment)
    next(iter(loader))
    resumed = loader_of(images, kind, augment, batch=5)
    resumed.load_state_dict(loader.state_dict())
    rest = by_label(resumed)
    assert len(rest) == 9
    for label, x in rest.items():
        assert torch.equal(x, whole[label])


@pytest.mark.parametrize("state", [{"epoch": 0, "position": 14}, {"epoch": -1, "position": 0}])
def test_impossible_position(state):
    with pytest.raises(DataError, match="there are 13 images"):
        loader_of(numbered(13)).load_state_dict(state)


def test_no_images():
    with pytest.raises(DataError, match="no images"):
        loader_of(numbered(0))


@pytest.mark.parametrize("kind", LOADERS)
def test_padding_too_wide_to_reflect(kind):
    with pytest.raises(UsageError, match="--crop-padding 8"):
        loader_of(make_images(3), kind, AugmentConfig(crop_padding=8))


@pytest.mark.parametrize(("kind", "workers", "place"), CASES)
def test_main_generators_are_left_alone(kind, workers, place, tmp_path):
    images = placed(make_images(9), place, tmp_path)
    loader = loader_of(images, kind, EVERYTHING, workers=workers)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


# The two loaders against each other, on images that show where each pixel came from


def offsets_and_flips(kind, mode="zero"):
    """Return the crop offsets (n, 2) in 0..8 and flips (n,), read off the pixels."""
    side = 16
    images = coordinates(3000, side)
    augment = AugmentConfig(crop_mode=mode)
    batches = [x for x, _ in loader_of(images, kind, augment, batch=256, seed=5)]
    pixels = (torch.cat(batches) * 255).round().long()
    red, green = pixels[:, 0, 8, 8], pixels[:, 1, 8, 8]
    flip = pixels[:, 1, 8, 9] < green
    # the centre shows row 8 + top; column 8 + left, or when mirrored 7 + left
    top, left = red - 1 - 8, green - 1 - torch.where(flip, 7, 8)
    return (torch.stack([top, left], 1) + 4).numpy(), flip.numpy()


@pytest.mark.parametrize("mode", ["zero", "reflect"])
def test_offsets_and_flips_have_one_distribution(mode):
    tables = []
    for kind in LOADERS:
        offsets, flips = offsets_and_flips(kind, mode)
        assert offsets.min() == 0
        assert offsets.max() == 8
        table = np.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
        assert stats.chisquare(table).pvalue > P_LIMIT
        assert stats.binomtest(int(flips.sum()), len(flips), 0.5).pvalue > P_LIMIT
        # flip and offset are independent
        by_flip = [np.bincount(offsets[flips == f][:, 1], minlength=9) for f in (False, True)]
        assert stats.chi2_contingency(by_flip).pvalue > P_LIMIT
        tables.append(table)
    by_kind = dict(zip(LOADERS, tables, strict=True))
    torchs = by_kind.pop("torch")  # with draws of its own
    assert all(np.array_equal(table, by_kind["fused"]) for table in by_kind.values())
    assert stats.chi2_contingency([by_kind["fused"], torchs]).pvalue > P_LIMIT


MOMENT_CASES = [
    AugmentConfig(),
    AugmentConfig(crop_mode="zero"),
    AugmentConfig(flip="alternating", cutout=5),
    AugmentConfig(crop_padding=0, rotation=25, shift=0.2),
    AugmentConfig(crop_padding=0, cutout=8),
    AugmentConfig(crop_padding=0, resized_crop=0.2),
    AugmentConfig(crop_padding=0, color_jitter=0.6),
]


@pytest.mark.full
@pytest.mark.parametrize("augment", MOMENT_CASES)
def test_pixel_moments_agree(augment):
    images = coordinates(1500)
    fitted = Normalization.fit(images, "zscore")
    means, deviations = [], []
    for kind in ("fused", "torch"):  # without the library it is the same bits
        loader = loader_of(images, kind, augment, normalization=fitted, batch=500)
        x = torch.cat([x for x, _ in loader]).double().numpy()
        means.append(x.mean(0))
        deviations.append(x.std(0) / np.sqrt(len(x)))
    # 768 comparisons: 5 standard errors are passed by chance once in 2,000 runs
    error = np.hypot(*deviations) + 1e-4
    assert (np.abs(means[0] - means[1]) / error).max() < 5


def test_per_image_statistics_agree_for_color():
    images = make_images(1500)
    augment = AugmentConfig(crop_padding=0, flip="none", color_jitter=0.5)
    spread = []
    for kind in ("fused", "torch"):
        x = torch.cat([x for x, _ in loader_of(images, kind, augment, batch=500)])
        spread.append((x.mean((1, 2, 3)).numpy(), x.std((1, 2, 3)).numpy()))
    for ours, theirs in zip(*spread, strict=True):
        assert stats.ks_2samp(ours, theirs).pvalue > P_LIMIT


@pytest.mark.parametrize("kind", LOADERS)
def test_alternating_flip_in_both_loaders(kind):
    images = numbered(21)
    augment = AugmentConfig(crop_padding=0, flip="alternating")
    loader = loader_of(images, kind, augment)
    first, second, third = (by_label(loader) for _ in range(3))
    plain = by_label(loader_of(images, kind))
    mirrored = 0
    for label, x in plain.items():
        assert torch.equal(first[label], second[label].flip(2))
        assert torch.equal(first[label], third[label])
        mirrored += torch.equal(first[label], x.flip(2))
        assert torch.equal(first[label], x) or torch.equal(first[label], x.flip(2))
    chosen = alternating_flip(0, 0, 21)
    assert mirrored == int(chosen.sum())
    assert 0 < mirrored < 21
    assert [not torch.equal(first[n], plain[n]) for n in range(21)] == chosen.tolist()


@pytest.mark.parametrize("kind", LOADERS)
def test_cutout_is_filled_with_the_normalised_mean(kind):
    images = make_images(300, 16, 16)
    augment = AugmentConfig(crop_padding=0, flip="none", cutout=6)
    fitted = Normalization.fit(images, "zscore")
    x = torch.cat([x for x, _ in loader_of(images, kind, augment, normalization=fitted)])
    holes = (x == 0).all(1)
    areas = holes.sum((1, 2))
    assert set(areas.tolist()) <= {h * w for h in range(3, 7) for w in range(3, 7)}
    # centres 3..13 of 16 give whole squares
    assert stats.binomtest(int((areas == 36).sum()), 300, (11 / 16) ** 2).pvalue > P_LIMIT


def test_cutout_centres_have_one_distribution():
    images = make_images(4000, 12, 12)
    augment = AugmentConfig(crop_padding=0, flip="none", cutout=5)
    fitted = Normalization.fit(images, "zscore")
    tables = []
    for kind in ("fused", "torch"):
        options = {"normalization": fitted, "batch": 500, "seed": 3}
        x = torch.cat([x for x, _ in loader_of(images, kind, augment, **options)])
        holes = (x == 0).all(1)
        # first + last row of a hole, and column: one of its own for each centre
        ends = [side.int().argmax(1) + 11 - side.flip(1).int().argmax(1)
                for side in (holes.any(2), holes.any(1))]  # fmt: skip
        counts = np.histogram2d(*[end.numpy() for end in ends], bins=[range(24)] * 2)[0].ravel()
        tables.append(counts[counts > 0])
        assert len(tables[-1]) == 144
        assert stats.chisquare(tables[-1]).pvalue > P_LIMIT
    assert stats.chi2_contingency(tables).pvalue > P_LIMIT


# Workers


def test_workers_give_what_the_main_process_gives():
    images = make_images(30)
    loader = loader_of(images, "torch", EVERYTHING, workers=2)
    alone = loader_of(images, "torch", EVERYTHING)
    for _ in range(2):
        assert_same_batches(list(loader), list(alone))


class Trouble(torch_loader.Samples):
    """Samples whose number 9 hangs, or kills its process."""

    action = "hang"

    def sample(self, epoch, sample):
        if sample == 9:
            if self.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
        return super().sample(epoch, sample)


class Slow(torch_loader.Samples):
    """Samples of which number 11 takes longer than a look at the workers."""

    def sample(self, epoch, sample):
        if sample == 11:
            time.sleep(1.5)
        return super().sample(epoch, sample)


@pytest.mark.full
@pytest.mark.parametrize("action", ["hang", "kill"])
def test_worker_in_trouble_is_an_error(monkeypatch, action):
    monkeypatch.setattr(torch_loader, "WORKER_TIMEOUT_S", 3)
    monkeypatch.setattr(torch_loader, "POLL_S", 1)
    handler = signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(torch_loader, "Samples", Trouble)
    monkeypatch.setattr(Trouble, "action", action)
    loader = loader_of(make_images(20), "torch", workers=1, shuffle=False)
    start = time.monotonic()
    with pytest.raises(DataError) as caught:
        list(loader)
    assert time.monotonic() - start < 8
    (pid,) = worker_pids(loader)
    told = rf"{pid}\) gave nothing for 3 s" if action == "hang" else rf"{pid}\) (exited|is gone)"
    assert re.match(
        rf"--loader torch: .*worker \(pid(\(s\))? {told}.*; --workers 0", str(caught.value)
    )
    assert signal.getsignal(signal.SIGCHLD) == handler


def test_a_worker_killed_between_epochs_is_an_error(monkeypatch):
    monkeypatch.setattr(torch_loader, "POLL_S", 1)
    loader = loader_of(make_images(20), "torch", workers=2)
    list(loader)
    pid = worker_pids(loader)[1]
    os.kill(pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(DataError, match=rf"--loader torch: .*worker .*{pid}.*; --workers 0"):
        list(loader)
    assert time.monotonic() - start < 5


@pytest.mark.full
def test_an_epoch_that_was_given_up_does_not_hurt_the_next(monkeypatch):
    """Workers that are still busy with it answer late."""
    monkeypatch.setattr(torch_loader, "POLL_S", 1)
    monkeypatch.setattr(torch_loader, "Samples", Slow)
    loader = loader_of(make_images(20), "torch", workers=1, shuffle=False)
    next(iter(loader))
    assert len(list(loader)) == 4


def test_signals_to_the_group_leave_workers_alone():
    loader = loader_of(make_images(40), "torch", workers=2)
    batches = iter(loader)
    first = next(batches)
    for pid in worker_pids(loader):
        # from a third process, as a shell or a scheduler sends them
        os.system(f"kill -TERM {pid}; kill -INT {pid}")
    assert_same_batches([first, *batches], list(loader_of(make_images(40), "torch")))


def test_own_terminate_ends_a_worker():
    loader = loader_of(make_images(8), "torch", workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = loader.loader._iterator._workers
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_missing_torchvision_names_the_remedy(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"nms does not exist.*--loader resident"):
        loader_of(make_images(5), "torch", AugmentConfig())
    assert len(list(loader_of(make_images(5), "resident", AugmentConfig()))) == 2
    assert len(list(loader_of(make_images(5), "torch"))) == 2
