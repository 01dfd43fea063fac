"""Named errors: what the user got wrong, where, and what to do about it.

Every mistake that a user can make is raised as one of these before any training starts. From the command
line it becomes one readable message and exit code 2; in Python they are ordinary `ValueError`s and
`FileNotFoundError`s.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["AdaptiveMergeError", "InputError", "MissingFileError", "StorageError", "did_you_mean"]

EXIT_USAGE = 2


class AdaptiveMergeError(Exception):
    """Base of every error that the user, not the program, has to mend."""


class InputError(AdaptiveMergeError, ValueError):
    """A value, tensor, configuration or file content that cannot be used; the message says how to mend it."""


class MissingFileError(AdaptiveMergeError, FileNotFoundError):
    """A file or folder that was named but is not there."""


class StorageError(AdaptiveMergeError, OSError):
    """A file that cannot be written: a full disk, a quota, a read-only folder."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an error message: the nearest known names, or all of them where they are few."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3) or (known if len(known) <= 12 else [])
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
