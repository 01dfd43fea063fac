"""Where the bank lives while a run merges it: on the device, in host memory, or in slices on many devices.

A part of a bank's columns is a bank itself, so all three kinds are made of a rule's same two passes, `combine` and
`project`. Only `Sharded` communicates, and only between `open` and `close`, which all processes reach together;
outside a run every kind merges from what its own process has, so that one process alone may export or save.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Final, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.parts import BankPart
from adaptive_merge.merge.rule import Rule, State
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["PIECE", "BankKind", "Placement", "Resident", "Sharded", "Streamed", "place"]

BankKind = Literal["resident", "streamed", "sharded"]
# Columns that cross to the device at a time: T · 2^22 · 4 bytes, 134 MB for eight experts in float32.
PIECE: Final = 1 << 22


class Placement(ABC):
    """A bank, and how it is merged for a device.

    Args:
        bank: θ₀ and T task vectors.
    """

    def __init__(self, bank: TaskVectors) -> None:
        self.bank, self.device = bank, bank.device
        self.rank = self.world = 0  # no run

    @abstractmethod
    def combine(self, rule: Rule, state: State, out: Tensor | None = None) -> Tensor:
        """θ [P] on the device, in `out` where it is given. On a CPU a new buffer costs more than the merge: its pages
        fault one by one.
        """

    @abstractmethod
    def project(self, rule: Rule, gradients: Sequence[Tensor | None], state: State) -> State:
        """∂L/∂state on the device, of this process's loss, or of the mean of all processes' losses.

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

    def combine(self, rule: Rule, state: State, out: Tensor | None = None) -> Tensor:
        merged = torch.empty_like(self.bank.pretrained) if out is None else out
        rule.combine(self._whole, _on(state, self.device), merged)
        return merged

    def project(self, rule: Rule, gradients: Sequence[Tensor | None], state: State) -> State:
        result = _zeros(state)
        rule.project(self._whole, gradients, state, result)
        return result

    def to(self, device: torch.device) -> None:
        self.bank, self.device = self.bank.to(device), device
        self.__dict__.pop("_whole", None)

    @property
    def held_bytes(self) -> int:
        return self._whole.held_bytes

    @cached_property
    def _whole(self) -> BankPart:
        return BankPart.whole(self.bank)


class Streamed(Placement):
    """The bank stays where it was loaded, memory-mapped if it came from a file, and crosses to the device in pieces.

    Twice a step, once to merge and once for the gradient. The device holds one or two pieces at a time. Where the
    device is a CPU, the pieces are views and nothing is copied.
    """

    def combine(self, rule: Rule, state: State, out: Tensor | None = None) -> Tensor:
        merged = torch.empty(self.bank.layout.numel, device=self.device) if out is None else out
        for part in self._pieces:
            rule.combine(part.on(self.device), _on(state, self.device), merged[part.columns])
        return merged

    def project(self, rule: Rule, gradients: Sequence[Tensor | None], state: State) -> State:
        result = _zeros(state)
        flat = [None if gradient is None else gradient.reshape(-1) for gradient in gradients]
        for part in self._pieces:
            cut = part.cut(flat)
            if any(gradient is not None for gradient in cut):
                rule.project(part.on(self.device), cut, state, result)
        return result

    def to(self, device: torch.device) -> None:
        self.device = device

    @property
    def held_bytes(self) -> int:
        return 0

    @cached_property
    def _pieces(self) -> list[BankPart]:
        ends = range(0, self.bank.layout.numel, PIECE)
        return [BankPart.between(self.bank, start, min(start + PIECE, self.bank.layout.numel)) for start in ends]


class Sharded(Streamed):
    """In a run of W processes each holds one of W equal slices of the bank on its device.

    A merge combines the slice and gathers θ from all; its backward sums ∂L/∂θ over the processes, leaves each the
    part of its slice, and sums what the slices say about Λ. The P mod W last columns are held by all, so that
    slices are equal without padding. Outside a run, and for exports, it merges like `Streamed`.
    """

    def __init__(self, bank: TaskVectors) -> None:
        super().__init__(bank)
        self._held: list[BankPart] | None = None

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
        return sum(part.held_bytes for part in self._parts()) if self.world else 0

    def combine(self, rule: Rule, state: State, out: Tensor | None = None) -> Tensor:
        if not self.world:
            return super().combine(rule, state, out)
        merged = torch.empty(self.bank.layout.numel, device=self.device) if out is None else out
        own, tail = self._parts()
        rule.combine(tail, state, merged[self._shared :])
        piece = merged.new_empty(own.bank.layout.numel) if self.world > 1 else merged[: self._shared]
        rule.combine(own, state, piece)
        if self.world > 1:
            dist.all_gather_into_tensor(merged[: self._shared], piece)
        return merged

    @torch.no_grad()
    def project(self, rule: Rule, gradients: Sequence[Tensor | None], state: State) -> State:
        if not self.world:
            return super().project(rule, gradients, state)
        whole = torch.zeros(self.bank.layout.numel, device=self.device)
        for gradient, place in zip(gradients, self.bank.layout.slices, strict=True):
            if gradient is not None:
                whole[place] = gradient.reshape(-1)
        own, tail = whole[: self._shared], whole[self._shared :]
        if self.world > 1:
            own = whole.new_empty(self._shared // self.world)
            dist.reduce_scatter_tensor(own, whole[: self._shared])
        # Each process's own gradient at the last columns: the sum over processes below is their sum as well.
        result = _zeros(state)
        for part, flat in zip(self._parts(), (own, tail), strict=True):
            rule.project(part, part.bank.layout.views(flat), state, result)
        for value in result if self.world > 1 else ():
            dist.all_reduce(value)
        return tuple(value / self.world for value in result)

    @property
    def _shared(self) -> int:
        """Columns that are shared out."""
        return self.bank.layout.numel // self.world * self.world

    def _parts(self) -> list[BankPart]:
        """This process's slice, and the last columns; copied to the device when first asked for."""
        if self._held is None:
            size = self._shared // self.world
            bounds = ((self.rank * size, (self.rank + 1) * size), (self._shared, self.bank.layout.numel))
            parts = [BankPart.between(self.bank, *bound) for bound in bounds]
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


def _on(state: State, device: torch.device) -> State:
    return tuple(value.to(device) for value in state)


def _zeros(state: State) -> State:
    return tuple(torch.zeros_like(value, memory_format=torch.contiguous_format) for value in state)
