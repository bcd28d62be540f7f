"""Intervals, tests and corrections against scipy, by hand, by their properties, by simulation."""

import math
import statistics
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastcnn.study.statistics import Comparison, compare, holm, summarise, verdict

pytestmark = pytest.mark.filterwarnings("error")
# of hundredths, as accuracies are
VALUES = st.lists(st.integers(0, 10000).map(lambda i: i / 100), min_size=2, max_size=8)
CHANCES = st.lists(st.floats(0, 1), max_size=8)


def seeded(values, first=1):
    return dict(enumerate(values, first))


def test_a_summary_by_hand():
    found = summarise([3.0, 1.0, 2.0])
    assert (found.n, found.mean, found.std, found.low, found.high) == (3, 2.0, 1.0, 1.0, 3.0)
    # 2.5 % of resamples lie below the 1/27 that are (1, 1, 1): the ends are the extremes
    stretch = math.sqrt(1.5) * 4.302652729911275 / 1.959963984540054
    assert found.interval == pytest.approx((2 - stretch, 2 + stretch))
    assert found.t_interval == pytest.approx((2 - 2.4841377, 2 + 2.4841377))
    assert found.method == "bootstrap"


@pytest.mark.parametrize("n", [2, 3, 5, 10, 20])
def test_the_bootstrap_is_scipys_stretched(n):
    values = np.random.default_rng(n).gamma(2, size=n)
    oracle = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=99999, vectorized=True
    ).confidence_interval
    mean, (low, high) = values.mean(), summarise(values.tolist()).interval
    stretch = math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1) / stats.norm.ppf(0.975)
    near = 0.04 * (high - low)  # of the draws
    assert low == pytest.approx(mean + stretch * (oracle.low - mean), abs=near)
    assert high == pytest.approx(mean + stretch * (oracle.high - mean), abs=near)


@pytest.mark.parametrize("n", [2, 5, 20])
def test_the_t_interval_is_scipys(n):
    values = np.random.default_rng(n).normal(size=n)
    oracle = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert summarise(values.tolist()).t_interval == pytest.approx((oracle.low, oracle.high))


@pytest.mark.parametrize("value", [0.1, 0.57, 57.1, 0.0])
@pytest.mark.parametrize("n", [2, 3, 7, 49])
def test_identical_values_have_no_width(value, n):
    found = summarise([value] * n)
    assert (found.mean, found.std) == (value, 0.0)
    assert found.interval == found.t_interval == (value, value)


@pytest.mark.parametrize("images", [1000, 10000])
@pytest.mark.parametrize("share", [0.0, 0.333, 0.57, 1.0])
@pytest.mark.parametrize("whole", [1.0, 100.0])
def test_one_value_has_wilsons_interval(share, images, whole):
    found = summarise([whole * share], images, whole)
    z = stats.norm.ppf(0.975)
    middle, below = share + z * z / (2 * images), 1 + z * z / images
    half = z * math.sqrt(share * (1 - share) / images + z * z / (4 * images**2))
    wilson = (whole * (middle - half) / below, whole * (middle + half) / below)
    assert found.interval == pytest.approx(wilson, abs=1e-9)
    assert (found.n, found.std, found.method, found.t_interval) == (1, None, "binomial", None)


def test_one_value_of_unknown_images_has_no_interval():
    found = summarise([12.5])
    assert (found.interval, found.method, found.t_interval) == (None, "none", None)
    assert found.mean == found.low == found.high == 12.5


def test_intervals_of_shares_end_at_nothing_and_all():
    loose, found = summarise([99.0, 100.0, 99.9]), summarise([99.0, 100.0, 99.9], 100, 100.0)
    assert min(loose.interval[1], loose.t_interval[1]) > 100
    assert found.interval == (loose.interval[0], 100)
    assert found.t_interval == (loose.t_interval[0], 100)
    assert summarise([100.00000000000001], 1000, 100.0).interval[1] == pytest.approx(100)
    found = summarise([0.0, 0.01, 0.001], 100)
    assert found.interval[0] == found.t_interval[0] == 0


@pytest.mark.parametrize(
    ("values", "images", "whole", "message"),
    [
        ([], None, 1.0, "at least one value"),
        ([0.5, math.nan], None, 1.0, "finite values, got nan"),
        ([math.inf], None, 1.0, "finite values, got inf"),
        ([57.0], 1000, 1.0, "shares from 0 to 1"),
        ([-0.1, 0.2], 1000, 1.0, "shares from 0 to 1"),
        ([0.5], 0, 1.0, "one test image, got 0"),
    ],
)
def test_what_cannot_be_summarised(values, images, whole, message):
    with pytest.raises(ValueError, match=message):
        summarise(values, images, whole)


@settings(max_examples=40, deadline=None)
@given(VALUES, st.randoms(use_true_random=False))
def test_a_summary_does_not_depend_on_order(values, random):
    turned = list(values)
    random.shuffle(turned)
    assert summarise(turned) == summarise(values)


@settings(max_examples=40, deadline=None)
@given(VALUES, st.floats(0.01, 100), st.floats(-50, 50))
def test_a_summary_moves_with_its_values(values, scale, shift):
    base, moved = summarise(values), summarise([scale * value + shift for value in values])
    near = pytest.approx(scale * base.std, rel=1e-6, abs=1e-6)
    assert moved.std == near
    for name in ("interval", "t_interval"):
        expected = [scale * end + shift for end in getattr(base, name)]
        assert getattr(moved, name) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(VALUES)
def test_the_mean_lies_in_its_intervals(values):
    found = summarise(values)
    assert found.low <= found.mean <= found.high
    assert found.interval[0] <= found.mean <= found.interval[1]
    assert found.t_interval[0] <= found.mean <= found.t_interval[1]
    assert found.mean == pytest.approx(statistics.fmean(values))


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_covers_what_students_covers(n):
    # which holds 95 % of normal means exactly: on the same samples only the intervals differ
    found = [summarise(x.tolist()) for x in np.random.default_rng(n).normal(0, 1, (400, n))]
    bootstrap, student = (
        statistics.fmean(low <= 0 <= high for low, high in intervals)
        for intervals in ([s.interval for s in found], [s.t_interval for s in found])
    )
    assert bootstrap == pytest.approx(student, abs=0.03)  # unstretched: 0.1 to 0.2 below
    assert student == pytest.approx(0.95, abs=0.035)


def test_paired_runs_are_scipys_paired_test():
    a, b = [0.61, 0.58, 0.64, 0.6, 0.62], [0.53, 0.55, 0.54, 0.51, 0.56]
    (found,) = compare([(seeded(a), dict(reversed(seeded(b).items())))])
    oracle = stats.ttest_rel(a, b)
    limits = oracle.confidence_interval(0.95)
    assert found.test == "paired t"
    assert found.p == found.p_holm == pytest.approx(oracle.pvalue)
    assert found.interval == pytest.approx((limits.low, limits.high))
    assert found.difference == pytest.approx(np.mean(a) - np.mean(b))
    assert (found.n_a, found.n_b) == (5, 5)


@pytest.mark.parametrize("first", [1, 2, 10])
def test_other_seeds_are_scipys_welch_test(first):
    a, b = [61.0, 58.0, 64.0, 60.5, 70.0], [53.0, 55.0, 54.5]
    (found,) = compare([(seeded(a), seeded(b, first))])
    oracle = stats.ttest_ind(a, b, equal_var=False)
    limits = oracle.confidence_interval(0.95)
    assert found.test == "Welch t"
    assert found.p == pytest.approx(oracle.pvalue)
    assert found.interval == pytest.approx((limits.low, limits.high))
    assert (found.n_a, found.n_b) == (5, 3)


def test_a_side_without_spread_leaves_welch_the_other():
    a, b = [61.1] * 4, [53.0, 55.0, 54.5]
    (found,) = compare([(seeded(a), seeded(b))])
    alone = stats.ttest_1samp(b, 61.1)
    assert found.p == pytest.approx(alone.pvalue)


@pytest.mark.parametrize(("n_a", "n_b"), [(1, 1), (1, 5), (5, 1)])
def test_single_runs_are_not_tested(n_a, n_b):
    (found,) = compare([(seeded([3.0] * n_a), seeded([1.0] * n_b))])
    assert found == Comparison(2.0, None, "none", None, None, n_a, n_b)


@pytest.mark.parametrize("first", [1, 2])
@pytest.mark.parametrize(("shift", "p"), [(0.0, 1.0), (0.1, None), (-0.1, None)])
def test_without_spread_a_difference_is_not_judged(first, shift, p):
    (found,) = compare([(seeded([0.6 + shift] * 3), seeded([0.6] * 3, first))])
    assert (found.p, found.p_holm, found.interval) == (p, p, None)
    assert (found.test == "none") == (p is None)
    assert found.difference == pytest.approx(shift)


def test_rounding_is_no_spread():
    a, b = [0.3, 0.7, 0.4], [0.2, 0.6, 0.3]  # whose differences are 0.1 but for their last bits
    assert len({x - y for x, y in zip(a, b, strict=True)}) > 1
    (found,) = compare([(seeded(a), seeded(b))])
    assert (found.p, found.interval) == (None, None)
    (found,) = compare([(seeded([0.1 + 0.2, 0.3]), seeded([0.3, 0.3]))])
    assert (found.p, found.difference) == (1, 0)


def test_sides_without_values_and_nan_are_refused():
    with pytest.raises(ValueError, match="at least one value"):
        compare([({}, {1: 1.0})])
    with pytest.raises(ValueError, match="finite values, got nan"):
        compare([({1: 1.0, 2: 1.0}, {1: 1.0, 2: math.nan})])


def test_the_correction_is_over_the_tested_pairs_alone():
    near = (seeded([1.0, 2.0, 3.5]), seeded([1.1, 1.8, 2.9]))
    far = (seeded([1.0, 2.0, 3.5]), seeded([0.1, 1.2, 2.4]))
    found = compare([near, (seeded([1.0]), seeded([2.0])), far])
    assert [one.test for one in found] == ["paired t", "none", "paired t"]
    assert found[1].p_holm is None
    assert [found[0].p_holm, found[2].p_holm] == holm([found[0].p, found[2].p])
    assert found[2].p_holm == 2 * found[2].p
    assert compare([]) == []


@settings(max_examples=40, deadline=None)
@given(VALUES, VALUES, st.integers(1, 3))
def test_the_other_way_round_only_the_sign_turns(x, y, first):
    a, b = seeded(x), seeded(y, first)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (there,), (back,) = compare([(a, b)]), compare([(b, a)])
    assert not caught
    assert back.difference == -there.difference
    assert back.test == there.test
    if there.interval is None:
        assert back.interval is None
        assert there.p == back.p == (None if there.difference else 1.0)
        return
    assert back.p == pytest.approx(there.p)
    assert 0 <= there.p <= 1
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))
    # the interval leaves out nothing exactly where the test finds a difference
    assert (there.interval[0] <= 0 <= there.interval[1]) == (there.p >= 0.05 - 1e-9)


def test_holm_by_hand():
    # 4 x 0.01, 3 x 0.02, then 2 x 0.03 and 1 x 0.04, the last not below the one before
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.03]) == [0.03]


@given(CHANCES)
def test_holm_keeps_order_and_never_lowers(p):
    found = holm(p)
    assert all(raw <= one <= 1 for raw, one in zip(p, found, strict=True))
    assert all(one <= min(1, len(p) * raw) for raw, one in zip(p, found, strict=True))
    ranked = sorted(zip(p, found, strict=True))
    assert [one for _, one in ranked] == sorted(found)


@pytest.mark.parametrize(
    ("published", "interval", "expected"),
    [
        (57.0, (56.0, 58.0), "inside"),
        (56.0, (56.0, 58.0), "inside"),
        (58.0, (56.0, 58.0), "inside"),
        (55.9, (56.0, 58.0), "above"),
        (58.1, (56.0, 58.0), "below"),
        (57.0, (100 * 0.57, 100 * 0.57), "inside"),  # 56.99999999999999
        (55.0, (100 * 0.55, 100 * 0.55), "inside"),  # 55.00000000000001
    ],
)
def test_verdicts(published, interval, expected):
    assert verdict(published, interval) == expected
