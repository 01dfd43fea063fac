"""Named errors: what the user got wrong, where, and what to do about it.

Every mistake that a user can make is raised as one of these before any training starts. From the command
line it becomes one readable message and exit code 2; in Python they are ordinary `ValueError`s and
`FileNotFoundError`s.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

__all__ = [
    *("AdaptiveMergeError", "InputError", "MissingFileError", "StorageError"),
    *("check_normalisation", "check_number", "did_you_mean", "printable", "shorten"),
]

EXIT_USAGE = 2


class AdaptiveMergeError(Exception):
    """Base of every error that the user, not the program, has to mend."""


class InputError(AdaptiveMergeError, ValueError):
    """A value, tensor, configuration or file content that cannot be used; the message says how to mend it."""


class MissingFileError(AdaptiveMergeError, FileNotFoundError):
    """A file or folder that was named but is not there."""


class StorageError(AdaptiveMergeError, OSError):
    """A file that cannot be written: a full disk, a quota, a read-only folder."""


def check_number(name: str, value: Any, least: float = -math.inf, below: float = math.inf) -> None:
    """Refuse what is no finite number in [least, below), naming the argument."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or not least <= value < below:
        bounds = f" in [{least:g}, {below:g})" if math.isfinite(below) else f" of at least {least:g}"
        raise InputError(f"`{name}` has to be a finite number{bounds if math.isfinite(least) else ''}, got {value!r}")


def check_normalisation(source: str, mean: Any, std: Any) -> None:
    """Refuse a mean that is not finite, a standard deviation that is not above 0, or not one of each per channel."""
    for name, values in (("mean", mean), ("std", std)):
        numbers = isinstance(values, (list, tuple)) and all(isinstance(v, Real) and math.isfinite(v) for v in values)
        if not numbers or (name == "std" and not min(values, default=0) > 0) or len(values) not in (1, len(mean)):
            raise InputError(
                f"{source}: the {name} of the images is {values!r}; expected one finite number for each channel"
                + (" above 0" if name == "std" else "")
                + ", such as (0.5, 0.5, 0.5)"
            )


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
