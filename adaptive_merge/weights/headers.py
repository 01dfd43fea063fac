"""Checkpoints by their headers: names, shapes and types of tensors, none of their numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["headers_only", "without_numbers"]

_HEADERS_ONLY: ContextVar[bool] = ContextVar("headers_only", default=False)


@contextmanager
def headers_only() -> Iterator[None]:
    """What is read in here has all its tensors on the meta device, no digest, and is not looked through for NaN.

    Everything that depends on names, shapes and statements is checked as ever. Only a plain `pickle.dump`, whose
    numbers lie among its opcodes, is read whole all the same.
    """
    token = _HEADERS_ONLY.set(True)
    try:
        yield
    finally:
        _HEADERS_ONLY.reset(token)


def without_numbers() -> bool:
    """Whether the numbers of tensors are to be left where they are."""
    return _HEADERS_ONLY.get()
