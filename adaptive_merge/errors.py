"""Named errors: what the user got wrong, where, and what to do about it.

Every mistake that a user can make is raised as one of these before any training starts. From the command
line it becomes one readable message and exit code 2; in Python they are ordinary `ValueError`s and
`FileNotFoundError`s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["AdaptiveMergeError", "InputError", "MissingFileError", "did_you_mean", "printable", "shorten"]

EXIT_USAGE = 2


class AdaptiveMergeError(Exception):
    """Base of every error that the user, not the program, has to mend."""


class InputError(AdaptiveMergeError, ValueError):
    """A value, tensor, configuration or file content that cannot be used; the message says how to mend it."""


class MissingFileError(AdaptiveMergeError, FileNotFoundError):
    """A file or folder that was named but is not there."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known names, or all of them where they are few."""
    known, name = list(known), name[:100]  # comparing takes the square of the length
    near = difflib.get_close_matches(name, known, n=3) or (known if len(known) <= 12 else [])
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def printable(text: str) -> str:
    """The text with control characters written out, so that no name from a file steers the terminal that shows it."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)


def shorten(text: str, longest: int = 4000) -> str:
    """The text without its middle, where it is longer: what it quotes may be a file."""
    return text if len(text) <= longest else f"{text[: longest // 2]} … {text[-longest // 2 :]}"
