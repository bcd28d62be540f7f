"""Text from outside, such as names of files and classes and what errors say, as it can be shown."""

REASON = 200  # characters of an error that another package raises: it may quote a whole file


def shown(text: str) -> str:
    """The text in one line, without what a terminal would obey."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def first_line(error: Exception) -> str:
    """What an error says, in one short line; the name of its kind where it says nothing."""
    return _line(error, 0)


def last_line(error: Exception) -> str:
    """The same of an error that quotes a traceback: its end."""
    return _line(error, -1)


def _line(error: Exception, number: int) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shown(lines[number][:REASON])[:REASON]
