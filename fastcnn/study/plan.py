"""A study: configurations that are trained once a seed, to be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcnn.config import Config
from fastcnn.recipes import resolve


@dataclass(frozen=True)
class Variant:
    """One row of a study.

    key: its folder, unique in the study. label: what tables and figures call it. options: by name,
    as given to `fastcnn train`; what they leave open comes from their recipe.
    """

    key: str
    label: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class PlannedRun:
    """One training: a variant with one seed, in a folder of its own."""

    variant: Variant
    seed: int
    config: Config
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant.key} seed {self.seed}"


@dataclass(frozen=True)
class RunResult:
    """A finished run. summary: its summary.json; history: its metrics.csv by column."""

    seed: int
    folder: Path
    summary: Mapping[str, Any]
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class VariantResult:
    """The finished runs of a variant, by rising seed; there may be none."""

    variant: Variant
    runs: tuple[RunResult, ...]

    def by_seed(self, figure: str) -> dict[int, float]:
        """A figure of the summaries, such as test_top1 (a fraction of 1), by seed."""
        return {run.seed: float(run.summary[figure]) for run in self.runs}


def plan(
    variants: Sequence[Variant], seeds: Mapping[str, Sequence[int]], root: Path
) -> list[PlannedRun]:
    """Every run of a study, seed by seed over the variants, so that early results compare.

    seeds: of each variant, by key. A run's folder is <root>/<key>/seed-<seed>. Raises UsageError
    for options that no run can have.
    """
    highest = max((len(seeds[variant.key]) for variant in variants), default=0)
    planned = []
    for turn in range(highest):
        for variant in variants:
            if turn < len(seeds[variant.key]):
                seed = seeds[variant.key][turn]
                config = resolve(dict(variant.options) | {"seed": seed})
                folder = root / variant.key / f"seed-{seed}"
                planned.append(PlannedRun(variant, seed, config, folder))
    return planned
