"""Errors that a user can act on: one line (what, where, what to do) and an exit code each."""

import difflib
from collections.abc import Iterable
from typing import Any


class FastcnnError(Exception):
    """Base of every error that the command prints as one line; `exit_code` ends the process.

    Line breaks and control characters, which names of files and libraries' messages may hold, are
    spelt out.
    """

    exit_code = 1

    def __init__(self, message: str = "", **details: Any):
        super().__init__(one_line(message), **details)


class UsageError(FastcnnError):
    """A wrong option, name or combination of options."""

    exit_code = 2


class DataError(FastcnnError):
    """Images, labels or archives that are missing, unreadable or not what they claim to be."""

    exit_code = 3


class CheckpointError(FastcnnError):
    """A checkpoint that is missing, damaged or does not fit."""

    exit_code = 4


class DiskError(CheckpointError):
    """A file that the disk refuses to take: it is full, read-only or failing."""


class BuildError(FastcnnError):
    """A native library that cannot be compiled or loaded on this machine."""

    exit_code = 5


class NumbersError(FastcnnError):
    """A loss or a gradient that is not finite."""

    exit_code = 6


def one_line(text: str) -> str:
    """Return `text` with what is not printable spelt out: a line break as \\n."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the valid name closest to `name`, or "" if none is close."""
    close = difflib.get_close_matches(name, list(valid), n=5, cutoff=0.5)
    if not close:
        return ""
    # among equally close names, swapped letters ("vgg61") are likelier than wrong ones
    swapped = [candidate for candidate in close if sorted(candidate) == sorted(name)]
    return f"; did you mean '{(swapped or close)[0]}'?"
