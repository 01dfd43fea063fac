"""Task vectors of low-rank experts, kept as factors: columns are multiplied out when a merge reads them."""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.state_dicts import digest

__all__ = ["Change", "FactoredVectors", "Product"]


@dataclass(frozen=True)
class Product:
    """high [o, r] · low [r, i] at the rows from `row` of a parameter, seen as a matrix [O, i] of its first axis."""

    row: int
    high: Tensor
    low: Tensor

    def columns(self, start: int, stop: int) -> tuple[int, Tensor]:
        """Its entries between two columns of the flat parameter: where they begin there, and they themselves."""
        width = self.low.shape[1]
        begin, end = self.row * width, (self.row + len(self.high)) * width
        first, last = max(start, begin), min(stop, end)
        if first >= last:
            return start, self.low.new_empty(0)
        upper, lower = first // width - self.row, math.ceil(last / width) - self.row
        flat = (self.high[upper:lower] @ self.low).flatten()
        offset = (upper + self.row) * width
        return first, flat[first - offset : last - offset]


Change = Tensor | tuple[Product, ...]
"""What an expert has changed of one parameter: all of it, or products that are added up."""


class FactoredVectors:
    """τ [T, P] as `TaskVectors.vectors` is read, of which only factors are held: float32, read-only.

    As of a tensor, `vectors[:, a:b]` is some of the columns, dense, multiplied out at that moment; so are rows [P], one
    at a time. `narrow` and lists of rows multiply nothing.

    Args:
        layout: of the bank.
        changes: of each task, parameter name → change; what is absent is 0.
        columns: which of the layout's; default all.
    """

    dtype = torch.float32

    def __init__(self, layout: Layout, changes: Sequence[Mapping[str, Change]], columns: slice | None = None) -> None:
        self.layout, self.changes = layout, [dict(change) for change in changes]
        self._columns = columns or slice(0, layout.numel)

    @property
    def shape(self) -> tuple[int, int]:
        """(T, P), P of the columns at hand."""
        return len(self.changes), self._columns.stop - self._columns.start

    @property
    def device(self) -> torch.device:
        """Where the factors are."""
        return next((value.device for row in self.changes for _, value in _named(row)), torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    @overload
    def __getitem__(self, key: int | tuple[slice, slice]) -> Tensor: ...
    @overload
    def __getitem__(self, key: list[int]) -> FactoredVectors: ...
    def __getitem__(self, key: Any) -> Tensor | FactoredVectors:
        if isinstance(key, int):
            return self._row(self.changes[key])
        if isinstance(key, list):
            return FactoredVectors(self.layout, [self.changes[row] for row in key], self._columns)
        start, stop, _ = key[1].indices(self.shape[1])
        return torch.stack([self._row(change, start, max(start, stop)) for change in self.changes])

    def narrow(self, dim: int, start: int, length: int) -> FactoredVectors:
        """Some neighbouring columns, still as factors."""
        first = self._columns.start + start
        return FactoredVectors(self.layout, self.changes, slice(first, first + length))

    def split(self, size: int, dim: int = 1) -> Iterator[Tensor]:
        """The columns, dense, in neighbouring parts of `size`."""
        return (self[:, start : start + size] for start in range(0, self.shape[1], size))

    def to(self, device: torch.device | str) -> FactoredVectors:
        """The factors on a device; itself where they are there."""
        return self if self.device == torch.device(device) else self.mapped(lambda value: value.to(device))

    def mapped(self, function: Callable[[Tensor], Tensor]) -> FactoredVectors:
        """The same with what a function makes of each tensor that is held."""
        changed = [{name: _map(change, function) for name, change in row.items()} for row in self.changes]
        return FactoredVectors(self.layout, changed, self._columns)

    def numel(self) -> int:
        """Numbers that are held."""
        return sum(value.numel() for row in self.changes for _, value in _named(row))

    def element_size(self) -> int:
        """Bytes of one of them."""
        return 4

    def digests(self) -> list[str]:
        """sha256 of each task's factors, over names, places and bytes."""
        header = json.dumps([self.layout.names, self.layout.shapes])
        parts = [[(name, tuple(value.shape), digest(value)) for name, value in _named(row)] for row in self.changes]
        return [hashlib.sha256(json.dumps([header, part]).encode()).hexdigest() for part in parts]

    def named(self, prefix: str) -> dict[str, Tensor]:
        """What is held, for files: `<prefix><row>.<parameter>`, and `.<place>.<first row>.high`, `.low` of products."""
        return {f"{prefix}{row}.{n}": value for row, part in enumerate(self.changes) for n, value in _named(part)}

    @classmethod
    def of_tensors(cls, layout: Layout, tasks: int, tensors: Mapping[str, Tensor], prefix: str) -> FactoredVectors:
        """What `named` named, among other tensors.

        Raises:
            ValueError, KeyError: other names.
        """
        changes: list[dict[str, Change]] = [{} for _ in range(tasks)]
        products: dict[tuple[int, str], dict[int, Product]] = defaultdict(dict)
        for key in (key for key in tensors if key.startswith(prefix)):
            row, _, name = key.removeprefix(prefix).partition(".")
            if name in layout.names:
                changes[int(row)][name] = tensors[key]
            elif name.endswith(".high"):
                name, place, first = name.removesuffix(".high").rsplit(".", 2)
                low = tensors[f"{key.removesuffix('.high')}.low"]
                products[int(row), name][int(place)] = Product(int(first), tensors[key], low)
        for (task, name), placed in products.items():
            changes[task][name] = tuple(placed[place] for place in sorted(placed))
        return cls(layout, changes)

    def _row(self, changes: Mapping[str, Change], start: int = 0, stop: int | None = None) -> Tensor:
        begin, end = (self._columns.start + place for place in (start, self.shape[1] if stop is None else stop))
        row = torch.zeros(end - begin, device=self.device)
        for name, place in zip(self.layout.names, self.layout.slices):
            first, last = max(begin, place.start), min(end, place.stop)
            if first < last and name in changes:
                _add(changes[name], row[first - begin : last - begin], first - place.start, last - place.start)
        return row


def _named(changes: Mapping[str, Change]) -> Iterator[tuple[str, Tensor]]:
    for name, change in sorted(changes.items()):
        if isinstance(change, Tensor):
            yield name, change
            continue
        for place, product in enumerate(change):
            yield from ((f"{name}.{place}.{product.row}.{n}", getattr(product, n)) for n in ("high", "low"))


def _add(change: Change, out: Tensor, start: int, stop: int) -> None:
    """Add the entries between two columns of a flat parameter."""
    if isinstance(change, Tensor):
        out += change.flatten()[start:stop].float()
        return
    for product in change:
        first, values = product.columns(start, stop)
        out[first - start : first - start + len(values)] += values


def _map(change: Change, function: Callable[[Tensor], Tensor]) -> Change:
    if isinstance(change, Tensor):
        return function(change)
    return tuple(Product(one.row, function(one.high), function(one.low)) for one in change)
