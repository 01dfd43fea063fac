"""Where the bank lives while a run merges it: on the device, in host memory, or in slices on many devices.

A part of a bank's columns is a bank itself, so all three kinds are made of the same two passes, `combine` and
`project`. Only `Sharded` communicates, and only between `open` and `close`, which all processes reach together;
outside a run every kind merges from what its own process has, so that one process alone may export or save.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from adaptive_merge.combine import combine, project
from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.task_vectors import Layout, TaskVectors

__all__ = ["PIECE", "BankKind", "Placement", "Resident", "Sharded", "Streamed", "place"]

BankKind = Literal["resident", "streamed", "sharded"]
# Columns that cross to the device at a time: T · 2^22 · 4 bytes, 134 MB for eight experts in float32.
PIECE: Final = 1 << 22
_Value = TypeVar("_Value")


class Placement(ABC):
    """A bank, and how it is merged for a device.

    Args:
        bank: θ₀ and T task vectors.
    """

    def __init__(self, bank: TaskVectors) -> None:
        self.bank, self.device = bank, bank.device
        self.rank = self.world = 0  # no run

    @abstractmethod
    def combine(self, coefficients: Tensor, group_of: Sequence[int], out: Tensor | None = None) -> Tensor:
        """θ(Λ) [P] on the device; arguments as for `adaptive_merge.combine.combine`."""

    @abstractmethod
    def project(self, gradients: Sequence[Tensor | None], group_of: Sequence[int], groups: int) -> Tensor:
        """∂L/∂Λ [T, G] on the device, of this process's loss, or of the mean of all processes' losses.

        DDP averages over processes afterwards, which leaves a mean as it is.
        """

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Merge for another device from now on."""

    @property
    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes of θ₀ and τ that stay on the device between merges."""

    def open(self, rank: int, world: int) -> None:
        """A run of `world` processes begins; all of them call this, and then merge equally often."""
        self.rank, self.world = rank, world

    def close(self) -> None:
        """The run is over: from now on a process may merge alone."""
        self.rank = self.world = 0


class Resident(Placement):
    """The whole bank on the device: the fastest, at T + 1 times the memory of the model."""

    def combine(self, coefficients: Tensor, group_of: Sequence[int], out: Tensor | None = None) -> Tensor:
        return combine(self.bank, coefficients, group_of, out)

    def project(self, gradients: Sequence[Tensor | None], group_of: Sequence[int], groups: int) -> Tensor:
        return project(self.bank, gradients, group_of, groups)

    def to(self, device: torch.device) -> None:
        self.bank, self.device = self.bank.to(device), device

    @property
    def held_bytes(self) -> int:
        return _bytes(self.bank)


class Streamed(Placement):
    """The bank stays where it was loaded, memory-mapped if it came from a file, and crosses to the device in pieces.

    Twice a step, once to merge and once for the gradient. The device holds one or two pieces at a time. Where the
    device is a CPU, the pieces are views and nothing is copied.
    """

    def combine(self, coefficients: Tensor, group_of: Sequence[int], out: Tensor | None = None) -> Tensor:
        merged = torch.empty(self.bank.layout.numel, device=self.device) if out is None else out
        for part in self._pieces:
            combine(_crossed(part.bank, self.device), coefficients, part.of(group_of), merged[part.columns])
        return merged

    def project(self, gradients: Sequence[Tensor | None], group_of: Sequence[int], groups: int) -> Tensor:
        result = torch.zeros(len(self.bank.tasks), groups, device=self.device)
        flat = [None if gradient is None else gradient.reshape(-1) for gradient in gradients]
        for part in self._pieces:
            pairs = zip(part.of(flat), part.inside, strict=True)
            cut = [None if whole is None else whole[inside] for whole, inside in pairs]
            if any(gradient is not None for gradient in cut):
                result += project(_crossed(part.bank, self.device), cut, part.of(group_of), groups)
        return result

    def to(self, device: torch.device) -> None:
        self.device = device

    @property
    def held_bytes(self) -> int:
        return 0

    @cached_property
    def _pieces(self) -> list[_Part]:
        ends = range(0, self.bank.layout.numel, PIECE)
        return [_Part.of_bank(self.bank, start, min(start + PIECE, self.bank.layout.numel)) for start in ends]


class Sharded(Streamed):
    """In a run of W processes each holds one of W equal slices of the bank on its device.

    A merge combines the slice and gathers θ from all; its backward sums ∂L/∂θ over the processes, leaves each the
    part of its slice, and sums what the slices say about Λ. The P mod W last columns are held by all, so that
    slices are equal without padding. Outside a run, and for exports, it merges like `Streamed`.
    """

    def __init__(self, bank: TaskVectors) -> None:
        super().__init__(bank)
        self._held: list[_Part] | None = None

    def open(self, rank: int, world: int) -> None:
        super().open(rank, world)
        self._held = None

    def close(self) -> None:
        super().close()
        self._held = None

    def to(self, device: torch.device) -> None:
        super().to(device)
        self._held = None

    @property
    def held_bytes(self) -> int:
        return sum(_bytes(part.bank) for part in self._parts()) if self.world else 0

    def combine(self, coefficients: Tensor, group_of: Sequence[int], out: Tensor | None = None) -> Tensor:
        if not self.world:
            return super().combine(coefficients, group_of, out)
        merged = torch.empty(self.bank.layout.numel, device=self.device) if out is None else out
        own, tail = (combine(part.bank, coefficients, part.of(group_of)) for part in self._parts())
        merged[self._shared :] = tail
        if self.world == 1:
            merged[: self._shared] = own
        else:
            dist.all_gather_into_tensor(merged[: self._shared], own)
        return merged

    @torch.no_grad()
    def project(self, gradients: Sequence[Tensor | None], group_of: Sequence[int], groups: int) -> Tensor:
        if not self.world:
            return super().project(gradients, group_of, groups)
        whole = torch.zeros(self.bank.layout.numel, device=self.device)
        for gradient, place in zip(gradients, self.bank.layout.slices, strict=True):
            if gradient is not None:
                whole[place] = gradient.reshape(-1)
        own, tail = whole[: self._shared], whole[self._shared :]
        if self.world > 1:
            own = whole.new_empty(self._shared // self.world)
            dist.reduce_scatter_tensor(own, whole[: self._shared])
        # Each process's own gradient at the last columns: the sum over processes below is their sum as well.
        found = sum(
            project(part.bank, part.bank.layout.views(flat), part.of(group_of), groups).contiguous()
            for part, flat in zip(self._parts(), (own, tail), strict=True)
        )
        if self.world > 1:
            dist.all_reduce(found)
        return found / self.world

    @property
    def _shared(self) -> int:
        """Columns that are shared out."""
        return self.bank.layout.numel // self.world * self.world

    def _parts(self) -> list[_Part]:
        """This process's slice, and the last columns; copied to the device when first asked for."""
        if self._held is None:
            size = self._shared // self.world
            bounds = ((self.rank * size, (self.rank + 1) * size), (self._shared, self.bank.layout.numel))
            parts = [_Part.of_bank(self.bank, *bound) for bound in bounds]
            self._held = [part.on(self.device) for part in parts]
        return self._held


_KINDS: Final[dict[str, type[Placement]]] = {"resident": Resident, "streamed": Streamed, "sharded": Sharded}


def place(bank: TaskVectors, kind: BankKind) -> Placement:
    """The placement of a kind.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in _KINDS:
        known = ", ".join(map(repr, _KINDS))
        raise InputError(f"unknown placement of the bank {kind!r}{did_you_mean(kind, _KINDS)}; choose {known}")
    return _KINDS[kind](bank)


@dataclass(frozen=True)
class _Part:
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
    def of_bank(cls, bank: TaskVectors, start: int, stop: int) -> _Part:
        members, inside = [], []
        for member, place in enumerate(bank.layout.slices):
            first, last = max(start, place.start), min(stop, place.stop)
            if first < last:
                members.append(member)
                inside.append(slice(first - place.start, last - place.start))
        names = tuple(bank.names[member] for member in members)
        layout = Layout(names, tuple((cut.stop - cut.start,) for cut in inside))
        columns = slice(start, stop)
        part = TaskVectors(bank.tasks, layout, bank.pretrained[columns], bank.vectors[:, columns], {})
        return cls(columns, tuple(members), tuple(inside), part)

    def of(self, values: Sequence[_Value]) -> list[_Value]:
        """Those of the whole bank's parameters' values that belong to this part."""
        return [values[member] for member in self.members]

    def on(self, device: torch.device) -> _Part:
        return _Part(self.columns, self.members, self.inside, _crossed(self.bank, device))


def _crossed(bank: TaskVectors, device: torch.device) -> TaskVectors:
    """A part of a bank on the device; itself where it is there already."""
    if bank.device == device:
        return bank
    pretrained, vectors = (_cross(tensor, device) for tensor in (bank.pretrained, bank.vectors))
    return TaskVectors(bank.tasks, bank.layout, pretrained, vectors, {})


def _cross(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    # The copy from pinned memory does not wait, so the next piece is read from the bank while this one crosses;
    # torch's allocator hands the pinned block out again only when its copy is done.
    staged = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)
    return staged.to(device, non_blocking=True)


def _bytes(bank: TaskVectors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (bank.pretrained, bank.vectors))
