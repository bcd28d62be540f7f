"""Published figures against ours: each number, each conclusion, the order of the rows.

All figures are in percent. Sentences for people are made at the end of the file.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fastcnn.reports.experiment import Claim, Range, Row
from fastcnn.study.plan import VariantResult
from fastcnn.study.statistics import Comparison, Summary, compare, summarise, verdict

Figure = Literal["top1", "top5"]
Results = Mapping[str, VariantResult]  # by the key of the row
LEVEL = 0.05


@dataclass(frozen=True)
class JudgedFigure:
    """A row's top-1 or top-5. images: of the test, in each run.

    standing: where our interval lies, seen from the published number; in_range: where our mean
    lies, seen from the published range. Each None where there is nothing to compare.
    """

    figure: Figure
    ours: Summary
    images: int
    published: float | None
    standing: Literal["inside", "above", "below"] | None
    published_range: Range | None
    in_range: Literal["within", "above", "below"] | None


@dataclass(frozen=True)
class JudgedRow:
    row: Row
    top1: JudgedFigure
    top5: JudgedFigure


@dataclass(frozen=True)
class JudgedClaim:
    """comparison: of the row that should be better with the other; None if one has no runs."""

    claim: Claim
    comparison: Comparison | None
    word: Literal["holds", "contradicted", "undecided", "not run"]


@dataclass(frozen=True)
class JudgedOrder:
    """The rows of one reading by published top-1 and by our mean top-1, best first.

    turned: pairs, the published better one first, that stand the other way round in ours; level:
    pairs that differ as published and not in ours. tau: Kendall's; None where one side is level
    throughout. published_top1, our_top1: of the rows in these orders.
    """

    reading: str
    published: tuple[Row, ...]
    ours: tuple[Row, ...]
    published_top1: tuple[float, ...]
    our_top1: tuple[float, ...]
    turned: tuple[tuple[Row, Row], ...]
    level: tuple[tuple[Row, Row], ...]
    tau: float | None

    @property
    def same(self) -> bool:
        return not self.turned and not self.level


@dataclass(frozen=True)
class Judgement:
    """rows: those with finished runs. claims: all. orders: one a reading with two rows or more."""

    rows: tuple[JudgedRow, ...]
    claims: tuple[JudgedClaim, ...]
    orders: tuple[JudgedOrder, ...]


def judge(rows: Sequence[Row], claims: Sequence[Claim], results: Results) -> Judgement:
    """Judge an experiment; rows are all of it, with finished runs or without."""
    return Judgement(
        judge_rows(rows, results),
        judge_claims(rows, claims, results),
        judge_orders(rows, results),
    )


def judge_rows(rows: Sequence[Row], results: Results) -> tuple[JudgedRow, ...]:
    """Our figures beside the published ones, of each row with finished runs."""
    return tuple(
        JudgedRow(row, _judge_figure(row, results, "top1"), _judge_figure(row, results, "top5"))
        for row in _finished(rows, results)
    )


def judge_claims(
    rows: Sequence[Row], claims: Sequence[Claim], results: Results
) -> tuple[JudgedClaim, ...]:
    """Test each conclusion; Holm's correction is over the tested claims of the same reading.

    Raises ValueError for a claim about a row that is not among `rows`.
    """
    by_key = {row.key: row for row in rows}
    families: dict[str, list[int]] = {}
    for index, claim in enumerate(claims):
        reading = _reading(claim, by_key)
        if _runs(results, claim.better) and _runs(results, claim.worse):
            families.setdefault(reading, []).append(index)
    judged = [JudgedClaim(claim, None, "not run") for claim in claims]
    for family in families.values():
        pairs = [_sides(claims[index], results) for index in family]
        for index, found in zip(family, compare(pairs), strict=True):
            judged[index] = JudgedClaim(claims[index], found, _word(found))
    return tuple(judged)


def judge_orders(rows: Sequence[Row], results: Results) -> tuple[JudgedOrder, ...]:
    """The order of the rows, reading by reading, of those with two rows or more to order."""
    readings = dict.fromkeys(row.reading for row in rows)
    found = (judge_order(rows, results, reading) for reading in readings)
    return tuple(order for order in found if order is not None)


def judge_order(rows: Sequence[Row], results: Results, reading: str = "") -> JudgedOrder | None:
    """The report's order of a reading's rows by top-1 against ours by the mean; no test.

    None with fewer than two rows that have both a published top-1 and finished runs.
    """
    from scipy import stats

    chosen = [row for row in _finished(rows, results) if row.reading == reading]
    published = {row.key: row.published.top1 for row in chosen if row.published}
    theirs = {key: number for key, number in published.items() if number is not None}
    if len(theirs) < 2:
        return None
    # without the rounding that would tell apart what is level
    ours = {key: round(summarise(_percent(results[key], "top1")).mean, 9) for key in theirs}
    first = sorted((r for r in chosen if r.key in theirs), key=lambda row: -theirs[row.key])
    pairs = [(a, b) for a in first for b in first if theirs[a.key] > theirs[b.key]]
    tau = float(stats.kendalltau(list(theirs.values()), list(ours.values())).statistic)
    found = sorted(first, key=lambda row: -ours[row.key])
    return JudgedOrder(
        reading,
        tuple(first),
        tuple(found),
        tuple(theirs[row.key] for row in first),
        tuple(ours[row.key] for row in found),
        tuple((a, b) for a, b in pairs if ours[a.key] < ours[b.key]),
        tuple((a, b) for a, b in pairs if ours[a.key] == ours[b.key]),
        None if math.isnan(tau) else tau,
    )


def _judge_figure(row: Row, results: Results, figure: Figure) -> JudgedFigure:
    runs = results[row.key].runs
    images = int(runs[0].summary["images"]["test"])
    ours = summarise(_percent(results[row.key], figure), images, whole=100.0)
    number: float | None = getattr(row.published, figure, None)
    span: Range | None = getattr(row.published, f"{figure}_range", None)
    standing = None
    if number is not None and ours.interval is not None:
        low, high = ours.interval
        half = row.published.place / 2 if row.published else 0.0
        standing = verdict(number, (low - half, high + half))
    return JudgedFigure(figure, ours, images, number, standing, span, _in_range(ours.mean, span))


def _in_range(mean: float, span: Range | None) -> Literal["within", "above", "below"] | None:
    if span is None:
        return None
    point = (mean, mean)
    if verdict(span[0], point) == "below":
        return "below"
    return "above" if verdict(span[1], point) == "above" else "within"


def _runs(results: Results, key: str) -> int:
    return len(results[key].runs) if key in results else 0


def _finished(rows: Sequence[Row], results: Results) -> list[Row]:
    return [row for row in rows if _runs(results, row.key)]


def _percent(result: VariantResult, figure: Figure) -> list[float]:
    return list(_percent_by_seed(result, figure).values())


def _percent_by_seed(result: VariantResult, figure: Figure) -> dict[int, float]:
    return {seed: 100 * share for seed, share in result.by_seed(f"test_{figure}").items()}


def _sides(claim: Claim, results: Results) -> tuple[dict[int, float], dict[int, float]]:
    better, worse = results[claim.better], results[claim.worse]
    return _percent_by_seed(better, claim.figure), _percent_by_seed(worse, claim.figure)


def _reading(claim: Claim, rows: Mapping[str, Row]) -> str:
    """The reading that a claim is about: where one row has none, that of the other."""
    for key in (claim.better, claim.worse):
        if key not in rows:
            raise ValueError(f"claim {claim.text!r} is about {key!r}, which is no row")
    return rows[claim.better].reading or rows[claim.worse].reading


def _word(found: Comparison) -> Literal["holds", "contradicted", "undecided"]:
    if found.p_holm is None or found.p_holm >= LEVEL:
        return "undecided"
    return "holds" if found.difference > 0 else "contradicted"


def figure_sentence(judged: JudgedFigure) -> str:
    """Such as "top-1 58.9 %, 95 % 57.2 to 60.6 (bootstrap, n = 5): the published 59.3 lies
    inside; our mean lies within the published range 54.9 to 62.6"."""
    ours, name = judged.ours, f"top-{judged.figure[-1]}"
    parts = []
    if judged.standing == "inside":
        parts.append(f"the published {judged.published:g} lies inside")
    elif judged.standing:
        parts.append(f"our interval lies {judged.standing} the published {judged.published:g}")
    if judged.published_range and judged.in_range:
        whose = "our mean lies" if ours.n > 1 else "our one run lies"
        low, high = judged.published_range
        parts.append(f"{whose} {judged.in_range} the published range {low:g} to {high:g}")
    if not parts:
        parts = ["nothing published"]
    return f"{name} {ours.mean:.1f} %, {_of_interval(judged)}: {'; '.join(parts)}"


def claim_sentence(judged: JudgedClaim) -> str:
    """Such as "CNN A beats CNN B: holds (+6.4 points, 95 % 4.1 to 8.7, paired t, Holm p 0.003,
    n = 5)"."""
    found = judged.comparison
    if found is None:
        return f"{judged.claim.text}: not run"
    parts = [f"{found.difference:+.1f} points"]
    if found.interval is not None:
        parts.append(f"95 % {found.interval[0]:.1f} to {found.interval[1]:.1f}")
    parts.append("no test" if found.test == "none" else found.test)
    if found.p_holm is not None:
        parts.append(_holm_p(found.p_holm))
    same = found.n_a == found.n_b
    parts.append(f"n = {found.n_a}" if same else f"n = {found.n_a} and {found.n_b}")
    word = judged.word
    return f"{judged.claim.text}: {word}{_direction(judged)} ({', '.join(parts)})"


def order_sentence(judged: JudgedOrder) -> str:
    """Such as "by mean top-1, best first: CNN A > CNN C > CNN B; published: CNN A > CNN B > CNN C;
    the other way round: CNN B and CNN C; Kendall's tau 0.33"."""
    of = f" (reading {judged.reading})" if judged.reading else ""
    tau = "" if judged.tau is None else f"; Kendall's tau {judged.tau:.2f}"
    start = f"by mean top-1{of}, best first: {_labels(judged.ours, judged.our_top1)}"
    if judged.same:
        return f"{start}, the published order{tau}"
    turned = _named("the other way round", judged.turned) + _named("level", judged.level)
    return f"{start}; published: {_labels(judged.published, judged.published_top1)}{turned}{tau}"


def _of_interval(judged: JudgedFigure) -> str:
    ours = judged.ours
    if ours.interval is None:
        return f"n = {ours.n}"
    span = f"95 % {ours.interval[0]:.1f} to {ours.interval[1]:.1f}"
    if ours.n == 1:
        return f"{span} (of the {judged.images:,} test images alone, not of seeds; n = 1)"
    return f"{span} ({ours.method}, n = {ours.n})"


def _holm_p(p: float) -> str:
    return "Holm p < 0.001" if p < 0.001 else f"Holm p {p:.3f}"


def _direction(judged: JudgedClaim) -> str:
    if judged.word != "undecided" or judged.comparison is None:
        return ""
    difference = judged.comparison.difference
    if difference == 0:
        return ", the means are equal"
    return f", the means point {'the same' if difference > 0 else 'the other'} way"


def _labels(rows: Sequence[Row], values: Sequence[float]) -> str:
    """The rows' labels in falling order; those of equal values are equal."""
    text = rows[0].label
    for row, before, value in zip(rows[1:], values, values[1:], strict=False):
        text += f" {'=' if value == before else '>'} {row.label}"
    return text


def _named(what: str, pairs: Sequence[tuple[Row, Row]]) -> str:
    return f"; {what}: {', '.join(f'{a.label} and {b.label}' for a, b in pairs)}" if pairs else ""
