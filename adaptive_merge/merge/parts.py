"""Neighbouring columns of a bank: what a placement hands to a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["BankPart"]

_Value = TypeVar("_Value")


@dataclass(frozen=True)
class BankPart:
    """Neighbouring columns of a bank, as a bank of the parameters that lie there, cut off at both ends.

    Args:
        columns: which columns of the whole bank.
        members: the parameters that lie there, as places in the whole bank.
        inside: for each of them, which of its entries.
        bank: their part of θ₀ and τ; views.
    """

    columns: slice
    members: tuple[int, ...]
    inside: tuple[slice, ...]
    bank: TaskVectors

    @classmethod
    def whole(cls, bank: TaskVectors) -> BankPart:
        """All columns, as the bank itself."""
        sizes = [place.stop - place.start for place in bank.layout.slices]
        members = tuple(range(len(sizes)))
        return cls(slice(0, bank.layout.numel), members, tuple(slice(0, size) for size in sizes), bank)

    @classmethod
    def between(cls, bank: TaskVectors, start: int, stop: int) -> BankPart:
        """The columns from `start` to before `stop`."""
        members, inside = [], []
        for member, place in enumerate(bank.layout.slices):
            first, last = max(start, place.start), min(stop, place.stop)
            if first < last:
                members.append(member)
                inside.append(slice(first - place.start, last - place.start))
        names = tuple(bank.names[member] for member in members)
        layout = Layout(names, tuple((cut.stop - cut.start,) for cut in inside))
        columns = slice(start, stop)
        vectors = bank.vectors.narrow(1, start, stop - start)
        part = TaskVectors(bank.tasks, layout, bank.pretrained[columns], vectors, {})
        return cls(columns, tuple(members), tuple(inside), part)

    def of(self, values: Sequence[_Value]) -> list[_Value]:
        """Those of the whole bank's parameters' values that belong to this part."""
        return [values[member] for member in self.members]

    def cut(self, flat: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The entries of this part of one flat tensor per parameter of the whole bank."""
        pairs = zip(self.of(flat), self.inside, strict=True)
        return [None if whole is None else whole[inside] for whole, inside in pairs]

    def on(self, device: torch.device) -> BankPart:
        """The part on a device; itself where it is there already."""
        if self.bank.device == device:
            return self
        bank = self.bank
        vectors = _cross(bank.vectors, device) if bank.factors is None else bank.factors.to(device)
        pretrained = _cross(bank.pretrained, device)
        return BankPart(
            self.columns, self.members, self.inside, TaskVectors(bank.tasks, bank.layout, pretrained, vectors, {})
        )

    @property
    def held_bytes(self) -> int:
        """Bytes of θ₀ and τ."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.bank.pretrained, self.bank.vectors))


def _cross(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # The copy from pinned memory does not wait, so the next piece is read from the bank while this one crosses;
    # torch's allocator hands the pinned block out again only when its copy is done.
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return staged.to(device, non_blocking=True)
