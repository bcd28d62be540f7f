"""What another package's error says, as it is shown."""

import pytest

from fastcnn.text import REASON, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("\n  first\nsecond"), "first"),
        (EOFError(), "EOFError"),
        (ValueError(" \n"), "ValueError"),
        (ValueError("a\x1b[2J"), r"a\x1b[2J"),
        (ValueError("x" * 10_000), "x" * REASON),
        (ValueError("\0" * 10_000), r"\x00" * (REASON // 4)),
    ],
)
def test_a_reason_is_one_short_line(error, line):
    assert first_line(error) == line
