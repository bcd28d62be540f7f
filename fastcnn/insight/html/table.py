"""A table of texts on the terminal, as Markdown and as CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """header and rows of texts; numbers: the columns (by index) that are set to the right."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[int] = frozenset()

    @classmethod
    def from_plain(cls, plain: Any) -> "Table":
        """The table that a file holds, as lists; raises ValueError, TypeError or KeyError where it
        holds another."""
        header = texts(plain["header"])
        rows = tuple(texts(row, len(header)) for row in plain["rows"])
        if not all(type(number) is int for number in plain["numbers"]):
            raise ValueError("a column that is no number")
        return cls(header, rows, frozenset(plain["numbers"]))

    def without_empty(self) -> "Table":
        """The table without the columns that say nothing in any row."""
        kept = [i for i in range(len(self.header)) if any(row[i] for row in self.rows)]
        numbers = frozenset(kept.index(i) for i in self.numbers if i in kept)
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return Table(tuple(self.header[i] for i in kept), rows, numbers)


def texts(value: Any, count: int | None = None) -> tuple[str, ...]:
    """The texts that a file holds in a list, `count` of them; raises ValueError for others."""
    found = tuple(map(text, value)) if isinstance(value, list) else None
    if found is None or (count is not None and len(found) != count):
        raise ValueError(f"expected {'' if count is None else f'{count} '}texts")
    return found


def text(value: Any) -> str:
    """A text that a file holds; raises ValueError for anything else."""
    if not isinstance(value, str):
        raise ValueError(f"a {type(value).__name__} where a text belongs")
    return value


def pairs(value: Any) -> tuple[tuple[str, str], ...]:
    """The pairs of texts that a file holds, as lists; raises ValueError or TypeError for others."""
    return tuple((name, told) for name, told in (texts(pair, 2) for pair in value))


def markdown(table: Table) -> str:
    """The table in GitHub's Markdown."""
    rule = ["---:" if i in table.numbers else "---" for i in range(len(table.header))]
    lines = [table.header, rule, *table.rows]
    return "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def show(table: Table, title: str) -> None:
    """Print the table on standard output; on a narrow terminal lines go on below, unbroken."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(highlight=False)
    console.width = 10_000  # a folded number is none
    console.print(title, markup=False)
    shown = RichTable(box=None, pad_edge=False)
    for number, name in enumerate(table.header):
        shown.add_column(
            escape(name), justify="right" if number in table.numbers else "left", no_wrap=True
        )
    for row in table.rows:
        shown.add_row(*map(escape, row))
    console.print(shown, soft_wrap=True)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of plain values, by column, as CSV; None is an empty cell. Every row has the columns of
    the first."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
