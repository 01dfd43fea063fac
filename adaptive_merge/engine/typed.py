"""`nn.ModuleList` for one kind of module, so that a type checker knows what iterating gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from torch import nn

__all__ = ["ListOf"]

M = TypeVar("M", bound=nn.Module)


class ListOf(nn.ModuleList, Generic[M]):
    """Modules of type M in order; behaves as `nn.ModuleList`."""

    def __iter__(self) -> Iterator[M]:
        return super().__iter__()  # type: ignore[return-value]
