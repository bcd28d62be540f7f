"""What is said of published figures, conclusions and orders, from runs made up by hand."""

import pytest
from scipy import stats

from fastcnn.reports.experiment import Claim, Published, Row
from fastcnn.reports.judge import (
    claim_sentence,
    figure_sentence,
    judge,
    judge_claims,
    judge_order,
    judge_rows,
    order_sentence,
)
from fastcnn.study.plan import RunResult, Variant, VariantResult
from fastcnn.study.statistics import holm, summarise

A, B, C = [0.61, 0.58, 0.64, 0.6, 0.62], [0.53, 0.55, 0.54, 0.51, 0.56], [0.33]


def row(key, top1=None, reading="", **published):
    name = f"CNN {key.upper()}"
    return Row(key, name, {}, Published(top1, **published), reading)


def result(key, top1, top5=None, seeds=None, images=1000):
    runs = [
        RunResult(
            seed,
            None,
            {"test_top1": share, "test_top5": other, "images": {"train": 5, "test": images}},
        )
        for seed, share, other in zip(
            seeds or range(len(top1)), top1, top5 or [0.9] * len(top1), strict=True
        )
    ]
    return VariantResult(Variant(key, key, {}), tuple(runs))


def results(**top1):
    return {key: result(key, shares) for key, shares in top1.items()}


def test_a_row_is_summarised_in_percent():
    top5 = [0.94, 0.95, 0.93, 0.94, 0.96]
    (found,) = judge_rows([row("a", 59.3)], {"a": result("a", A, top5)})
    assert found.row.key == "a"
    assert found.top1.ours == summarise([100 * share for share in A], 1000, 100.0)
    assert found.top5.ours == summarise([100 * share for share in top5], 1000, 100.0)
    assert found.top1.ours.mean == pytest.approx(61)
    assert (found.top1.figure, found.top5.figure, found.top1.images) == ("top1", "top5", 1000)


@pytest.mark.parametrize(
    ("published", "standing"), [(61.5, "inside"), (55.0, "above"), (70.0, "below"), (None, None)]
)
def test_a_published_mean_is_seen_from_our_interval(published, standing):
    rows = [row("a", published, top5=published)]
    (found,) = judge_rows(rows, {"a": result("a", A, A)})
    for judged in (found.top1, found.top5):
        assert (judged.published, judged.standing) == (published, standing)
        assert (judged.published_range, judged.in_range) == (None, None)


@pytest.mark.parametrize(
    ("span", "expected"),
    [
        ((54.9, 62.6), "within"),
        ((61.0, 62.6), "within"),
        ((50.0, 61.0), "within"),
        ((61.1, 62.6), "below"),
        ((50.0, 60.9), "above"),
    ],
)
def test_our_mean_is_seen_from_the_published_range(span, expected):
    rows = [row("a", top1_range=span, top5_range=span)]
    (found,) = judge_rows(rows, {"a": result("a", A, A)})
    for judged in (found.top1, found.top5):
        assert (judged.in_range, judged.published_range) == (expected, span)
        assert judged.standing is None


def test_top1_and_top5_are_not_mixed_up():
    published = Row("a", "A", {}, Published(59.3, 94.3, (54.9, 62.6), (93.9, 95.0)))
    (found,) = judge_rows([published], {"a": result("a", A, [0.96, 0.97, 0.98, 0.96, 0.97])})
    assert (found.top1.published, found.top1.standing, found.top1.in_range) == (
        59.3,
        "inside",
        "within",
    )
    assert (found.top5.published, found.top5.standing, found.top5.in_range) == (
        94.3,
        "above",
        "above",
    )


def test_rows_without_runs_or_published_figures():
    bare = Row("b", "B", {})
    found = judge_rows(
        [row("a"), bare, row("c", 33.3)], {"b": result("b", B), "c": result("c", [])}
    )
    assert [judged.row for judged in found] == [bare]
    assert (found[0].top1.standing, found[0].top1.in_range) == (None, None)
    assert figure_sentence(found[0].top1).endswith(": nothing published")


def test_one_run_has_the_interval_of_its_test_images_and_says_so():
    (found,) = judge_rows([row("c", 33.3, top1_range=(30, 40))], results(c=C))
    wilson = stats.binomtest(330, 1000).proportion_ci(0.95, "wilson")
    interval = found.top1.ours.interval
    assert interval == pytest.approx((100 * wilson.low, 100 * wilson.high))
    assert figure_sentence(found.top1) == (
        "top-1 33.0 %, 95 % 30.2 to 36.0 (of the 1,000 test images alone, not of seeds; n = 1): "
        "the published 33.3 lies inside; our one run lies within the published range 30 to 40"
    )


def test_figure_sentences():
    rows = [row("a", 55.0, top1_range=(54.9, 60.5), top5=99.0)]
    (found,) = judge_rows(rows, results(a=A))
    low, high = found.top1.ours.interval
    assert figure_sentence(found.top1) == (
        f"top-1 61.0 %, 95 % {low:.1f} to {high:.1f} (bootstrap, n = 5): our interval lies above "
        "the published 55; our mean lies above the published range 54.9 to 60.5"
    )
    assert figure_sentence(found.top5) == (
        "top-5 90.0 %, 95 % 88.0 to 91.7 (binomial, n = 5): "
        "our interval lies below the published 99"
    )


ROWS = [row("a"), row("b"), row("c"), row("d")]


def claims(*pairs):
    return [Claim(f"{a} beats {b}", a, b) for a, b in pairs]


def test_claims_hold_or_are_contradicted_or_undecided_or_not_run():
    found = judge_claims(
        ROWS,
        claims("ab", "ba", "ac", "ad", "da"),
        results(a=A, b=B, c=C) | {"d": result("d", [])},
    )
    assert [judged.word for judged in found] == [
        "holds",
        "contradicted",
        "undecided",
        "not run",
        "not run",
    ]
    paired = stats.ttest_rel(A, B)
    assert found[0].comparison.difference == pytest.approx(7.2)
    assert found[0].comparison.p == pytest.approx(paired.pvalue)
    assert found[0].comparison.p_holm == pytest.approx(2 * paired.pvalue)  # of the two tested
    assert found[3].comparison is None


def test_a_claim_of_top5_is_about_top5():
    top5 = {"a": result("a", A, B), "b": result("b", B, A)}
    (found,) = judge_claims(ROWS, [Claim("a", "a", "b", "top5")], top5)
    assert found.word == "contradicted"


def test_runs_pair_by_their_seeds():
    both = {"a": result("a", A), "b": result("b", B, seeds=[4, 3, 2, 1, 0])}
    (found,) = judge_claims(ROWS, claims("ab"), both)
    assert found.comparison.p == pytest.approx(stats.ttest_rel(A, B[::-1]).pvalue)
    both["b"] = result("b", B, seeds=[5, 6, 7, 8, 9])
    (found,) = judge_claims(ROWS, claims("ab"), both)
    assert found.comparison.test == "Welch t"


def test_the_correction_is_over_claims_of_the_same_reading():
    rows = [row("a"), row("b"), row("a2", reading="l2"), row("b2", reading="l2"), row("c")]
    close, ran = [0.52, 0.56, 0.53, 0.52, 0.55], results(a=A, b=B, a2=A, b2=B)
    ran["c"] = result("c", close)
    found = judge_claims(
        rows,
        claims(("a", "b"), ("a2", "b2"), ("c", "b"), ("b2", "a"), ("a", "b2")),
        ran,
    )
    raw = [judged.comparison.p for judged in found]
    printed, read = holm([raw[0], raw[2]]), holm([raw[1], raw[3], raw[4]])
    expected = [printed[0], read[0], printed[1], read[1], read[2]]
    assert [judged.comparison.p_holm for judged in found] == expected


def test_a_claim_about_no_row_is_refused():
    for pair in ("ax", "xa"):
        with pytest.raises(ValueError, match="is about 'x', which is no row"):
            judge_claims(ROWS, claims(pair), results(a=A))


def test_only_the_corrected_p_decides():
    # p about 0.03 alone, 0.06 of two
    near = [0.55, 0.555, 0.565, 0.54, 0.565]
    alone = judge_claims(ROWS, claims("ab"), results(a=near, b=B))
    assert 0.025 < alone[0].comparison.p < 0.05
    assert alone[0].word == "holds"
    two = judge_claims(ROWS, claims("ab", "ab"), results(a=near, b=B))
    assert [judged.word for judged in two] == ["undecided", "undecided"]


def sentence(a, b, text="CNN A beats CNN B"):
    (found,) = judge_claims(ROWS, [Claim(text, "a", "b")], results(a=a, b=b))
    return found, claim_sentence(found)


def test_claim_sentences():
    found, said = sentence(A, B)
    low, high = found.comparison.interval
    assert said == (
        f"CNN A beats CNN B: holds (+7.2 points, 95 % {low:.1f} to {high:.1f}, paired t, "
        f"Holm p {found.comparison.p_holm:.3f}, n = 5)"
    )
    assert "contradicted (-7.2 points" in sentence(B, A)[1]
    assert sentence(A, C)[1] == (
        "CNN A beats CNN B: undecided, the means point the same way (+28.0 points, no test, "
        "n = 5 and 1)"
    )
    assert sentence(C, [0.4])[1] == (
        "CNN A beats CNN B: undecided, the means point the other way (-7.0 points, no test, n = 1)"
    )
    assert "undecided, the means are equal (+0.0 points" in sentence(A, A)[1]
    assert "Holm p 1.000" in sentence(A, A)[1]
    assert "Holm p < 0.001" in sentence([0.9, 0.91, 0.92], [0.1, 0.11, 0.13])[1]
    assert sentence([], A)[1] == "CNN A beats CNN B: not run"


def test_the_published_order():
    rows = [row("c", 33.3), row("a", 59.3), row("b", 52.9)]
    found = judge_order(rows, results(a=A, b=B, c=C))
    assert [r.key for r in found.published] == [r.key for r in found.ours] == ["a", "b", "c"]
    assert found.same
    assert (found.turned, found.level, found.tau) == ((), (), pytest.approx(1))
    assert order_sentence(found) == (
        "by mean top-1, best first: CNN A > CNN B > CNN C, the published order; Kendall's tau 1.00"
    )


def test_pairs_that_stand_the_other_way_round():
    rows = [row("a", 59.3), row("b", 52.9), row("c", 33.3)]
    found = judge_order(rows, results(a=A, b=C, c=B))
    assert [(a.key, b.key) for a, b in found.turned] == [("b", "c")]
    assert not found.same
    assert [r.key for r in found.ours] == ["a", "c", "b"]
    assert found.tau == pytest.approx(stats.kendalltau([59.3, 52.9, 33.3], [61, 33, 53.8])[0])
    assert order_sentence(found) == (
        "by mean top-1, best first: CNN A > CNN C > CNN B; published: CNN A > CNN B > CNN C; "
        "the other way round: CNN B and CNN C; Kendall's tau 0.33"
    )


def test_level_rows_are_neither_in_order_nor_turned():
    found = judge_order([row("a", 59.3), row("b", 52.9)], results(a=[0.1 + 0.2], b=[0.3]))
    assert (found.turned, found.same, found.tau) == ((), False, None)
    assert [(a.key, b.key) for a, b in found.level] == [("a", "b")]
    assert order_sentence(found) == (
        "by mean top-1, best first: CNN A = CNN B; published: CNN A > CNN B; level: CNN A and CNN B"
    )
    level_as_published = judge_order([row("a", 50.0), row("b", 50.0)], results(a=A, b=B))
    assert level_as_published.same
    assert level_as_published.tau is None


def test_an_order_needs_two_rows_with_runs_and_a_published_mean():
    rows = [row("a", 59.3), row("b"), row("c", 33.3), Row("d", "D", {})]
    ranged = row("b", top1_range=(50, 55))
    assert judge_order(rows, results(a=A, b=B, d=B)) is None
    assert judge_order([rows[0], ranged], results(a=A, b=B)) is None
    assert judge_order([rows[0], row("b", 0.0)], results(a=A, b=B)) is not None


def test_orders_are_of_one_reading_each():
    rows = [
        row("a", 59.3),
        row("b", 52.9),
        row("a2", 59.3, "l2"),
        row("b2", 52.9, "l2"),
        row("a3", 59.3, "glorot"),
    ]
    found = judge(rows, [], results(a=B, b=A, a2=A, b2=B, a3=A)).orders
    assert [(order.reading, order.same) for order in found] == [("", False), ("l2", True)]
    assert " (reading l2), best first: CNN A2 > CNN B2, the" in order_sentence(found[1])
    assert "reading" not in order_sentence(found[0])


def test_an_experiment_is_judged_as_a_whole():
    rows, made, ran = [row("a", 59.3), row("b", 52.9)], claims("ab"), results(a=A, b=B)
    found = judge(rows, made, ran)
    assert found.rows == judge_rows(rows, ran)
    assert found.claims == judge_claims(rows, made, ran)
    assert found.orders == (judge_order(rows, ran),)
    nothing = judge(rows, made, {})
    assert (nothing.rows, nothing.orders) == ((), ())
    assert nothing.claims[0].word == "not run"
