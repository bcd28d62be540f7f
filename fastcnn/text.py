"""Text from outside, such as names of files and classes, as it can be shown."""


def shown(text: str) -> str:
    """The text in one line, without what a terminal would obey."""
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )
