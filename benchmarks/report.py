"""What the benchmarks under pytest share: their options, the JSON file, the table.

Options are environment variables FASTCNN_BENCH_<NAME>; each benchmark's docstring lists its own.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def option(name: str, unset: str = "") -> str:
    """Return an option's text, or `unset` where it is not given."""
    return os.environ.get(f"FASTCNN_BENCH_{name}", "").strip() or unset


def switched_on(name: str, unset: bool) -> bool:
    return option(name, str(int(unset))) != "0"


class Report:
    """The content of a run: the JSON file, written anew after every addition, and the table.

    A plugin of pytest: the table comes at the end of the run, in place of pytest-benchmark's own,
    which would tell how long a round of all variants together took. `benchmark`: the name of the
    file that the report is of.
    """

    def __init__(
        self,
        benchmark: str,
        content: dict[str, Any],
        table: Callable[[dict[str, Any]], list[str]],
    ) -> None:
        self.benchmark, self.content, self.table = benchmark, content, table
        self.path = Path(option("JSON")) if option("JSON") else None
        self._start = time.monotonic()

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._start

    def add(self, key: str, *entries: Any) -> None:
        self.content[key] += entries
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.content, indent=1), encoding="utf-8")

    def pytest_benchmark_group_stats(self, benchmarks: list[dict[str, Any]]) -> list[Any] | None:
        ours = all(self.benchmark in str(one["fullname"]) for one in benchmarks)
        return [] if ours else None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.table(self.content):
            terminalreporter.write_line(line)
