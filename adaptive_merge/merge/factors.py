"""Task vectors of low-rank experts, kept as factors: columns are multiplied out when a merge reads them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from adaptive_merge.merge.layout import Layout

__all__ = ["Change", "FactoredVectors", "Product", "dense"]


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

    `vectors[:, a:b]` is some of the columns, still as factors; `.float()` multiplies them out; rows are asked for, or
    iterated over, one dense [P] at a time.

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
        return next((tensor.device for _, tensor in self.tensors()), torch.device("cpu"))

    def __len__(self) -> int:
        return len(self.changes)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[row] for row in range(len(self)))

    @overload
    def __getitem__(self, key: int) -> Tensor: ...
    @overload
    def __getitem__(self, key: list[int] | tuple[slice, slice]) -> FactoredVectors: ...
    def __getitem__(self, key: Any) -> Tensor | FactoredVectors:
        if isinstance(key, int):
            return self._row(self.changes[key])
        if isinstance(key, list):
            return FactoredVectors(self.layout, [self.changes[row] for row in key], self._columns)
        start, stop, _ = key[1].indices(self.shape[1])
        columns = slice(self._columns.start + start, self._columns.start + max(start, stop))
        return FactoredVectors(self.layout, self.changes, columns)

    def float(self) -> Tensor:
        """The columns at hand, dense [T, P]."""
        return torch.stack([self._row(change) for change in self.changes])

    def split(self, size: int, dim: int = 1) -> Iterator[FactoredVectors]:
        """The columns in neighbouring parts of `size`."""
        return (self[:, start : start + size] for start in range(0, self.shape[1], size))

    def to(self, device: torch.device | str) -> FactoredVectors:
        """The factors on a device; itself where they are there."""
        if self.device == torch.device(device):
            return self
        moved = [
            {name: _map(change, lambda value: value.to(device)) for name, change in c.items()} for c in self.changes
        ]
        return FactoredVectors(self.layout, moved, self._columns)

    def numel(self) -> int:
        """Numbers that are held."""
        return sum(tensor.numel() for _, tensor in self.tensors())

    def element_size(self) -> int:
        """Bytes of one of them."""
        return 4

    def digest(self, row: int) -> str:
        """sha256 of a task's factors, over names, places and bytes."""
        digest = hashlib.sha256(json.dumps([self.layout.names, self.layout.shapes]).encode())
        for name, tensor in self.tensors(row):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def tensors(self, row: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """Name → tensor, for files: `<task>.<parameter>`, then `.<first row>.<place>.high` and `.low` of products."""
        for task in range(len(self)) if row is None else (row,):
            for name, change in sorted(self.changes[task].items()):
                if isinstance(change, Tensor):
                    yield f"{task}.{name}", change
                    continue
                for place, product in enumerate(change):
                    stem = f"{task}.{name}.{product.row}.{place}"
                    yield from ((f"{stem}.high", product.high), (f"{stem}.low", product.low))

    @classmethod
    def of_tensors(cls, layout: Layout, tasks: int, tensors: Mapping[str, Tensor]) -> FactoredVectors:
        """What `tensors` named.

        Raises:
            ValueError, KeyError: other names.
        """
        changes: list[dict[str, Change]] = [{} for _ in range(tasks)]
        for key, tensor in tensors.items():
            task, _, name = key.partition(".")
            if name in layout.names:
                changes[int(task)][name] = tensor
            elif name.endswith(".high"):
                name, row, _ = name.removesuffix(".high").rsplit(".", 2)
                product = Product(int(row), tensor, tensors[f"{key.removesuffix('.high')}.low"])
                known = changes[int(task)].get(name, ())
                changes[int(task)][name] = (*known, product) if isinstance(known, tuple) else known
        return cls(layout, changes)

    def _row(self, changes: Mapping[str, Change]) -> Tensor:
        begin, end = self._columns.start, self._columns.stop
        row = torch.zeros(end - begin, device=self.device)
        for name, place in zip(self.layout.names, self.layout.slices):
            first, last = max(begin, place.start), min(end, place.stop)
            if first < last and name in changes:
                _add(changes[name], row[first - begin : last - begin], first - place.start, last - place.start)
        return row


def dense(vectors: Tensor | FactoredVectors) -> Tensor:
    """The vectors as one tensor."""
    return vectors if isinstance(vectors, Tensor) else vectors.float()


def _add(change: Change, out: Tensor, start: int, stop: int) -> None:
    """Add the entries between two columns of a flat parameter."""
    if isinstance(change, Tensor):
        out += change.flatten()[start:stop].float()
        return
    for product in change:
        first, values = product.columns(start, stop)
        out[first - start : first - start + len(values)] += values


def _map(change: Change, function: Any) -> Change:
    if isinstance(change, Tensor):
        return function(change)
    return tuple(Product(one.row, function(one.high), function(one.low)) for one in change)
