"""A learned mask over singular directions: which parts of each task vector are merged, and how much of each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from adaptive_merge.coefficients.linear import Bounds, LayerWise
from adaptive_merge.errors import InputError, check_number
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.parts import BankPart
from adaptive_merge.merge.rule import State
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.matrices import svd

__all__ = ["Spectral"]


@dataclass(frozen=True)
class _Factors:
    """Thin SVDs of one matrix [O, I] of all tasks: left [O, T·r], singular values [T, r], right [T·r, I]."""

    left: Tensor
    singular: Tensor
    right: Tensor

    def to(self, device: torch.device) -> _Factors:
        return _Factors(self.left.to(device), self.singular.to(device), self.right.to(device))


class _Held:
    """The factors of a bank, made when they are first asked for, and the mean of its task vectors; never copied.

    Args:
        bank: whose τ.
        ranks: parameter → r.
        centred: whether the mean over the tasks is taken off first.
    """

    def __init__(self, bank: TaskVectors, ranks: dict[int, int], centred: bool) -> None:
        self.bank, self.ranks, self.centred = bank, ranks, centred
        self._made: dict[int, _Factors] = {}

    def __deepcopy__(self, memo: Any) -> _Held:
        return self

    @torch.no_grad()
    def of(self, member: int, device: torch.device) -> _Factors:
        """Of a parameter, on a device."""
        if member not in self._made:
            tau = self.bank.of(self.bank.names[member]).float()
            tau = tau - tau.mean(0) if self.centred else tau
            rank = self.ranks[member]
            left, singular, right = zip(*(svd(one) for one in tau))
            self._made[member] = _Factors(
                torch.cat([part[:, :rank].float() for part in left], 1),
                torch.stack([part[:rank].float() for part in singular]),
                torch.cat([part[:rank].float() for part in right]),
            )
        if self._made[member].left.device != device:
            self._made[member] = self._made[member].to(device)
        return self._made[member]


class Spectral(LayerWise):
    """θ = θ₀ + Σₜ λₜ Uₜ diag(mₜ ⊙ Sₜ) Vₜᵀ for the matrices of the blocks, layer-wise coefficients for all else.

    AdaRank (ICLR 2026): the mask m = 1[x > 0] learns with λ, straight through σ(x / temperature). The task vectors are
    those that the transforms leave: task arithmetic, TSV-M, and so on. Their SVDs are made once, when a run first
    merges, and held by every process whole, at 4/3 of the matrices' own memory, also where the bank is sharded; `rank`
    holds less. They are no part of a checkpoint.

    Args:
        init, bounds, trainable: of λ, as for `Coefficients`.
        keep: share of each matrix's directions, the strongest, whose mask starts at 1; that of the others starts at 0.
        margin: |x| at the start.
        temperature: of the sigmoid that gradients go through.
        rank: share of the directions that are held at all, and may be kept.
        weigh: each direction has a weight of its own that learns, from 1 (0 beyond `keep`), in place of a mask: what
            TARA-Merging (CVPR 2026) learns of the directions of LoRA adapters, here of their singular directions.
        origin: `"pretrained"`; or `"mean"`: all is relative to the mean of the experts, where λ = 0 is their average.

    Raises:
        InputError: a value outside its range.
    """

    def __init__(
        self,
        init: float | list[float] | str = 0.3,
        keep: float = 1.0,
        margin: float = 0.1,
        temperature: float = 10.0,
        rank: float = 1.0,
        weigh: bool = False,
        origin: Literal["pretrained", "mean"] = "pretrained",
        bounds: Bounds = "free",
        trainable: bool = True,
    ) -> None:
        super().__init__(init, bounds, trainable)
        for name, value in (("keep", keep), ("rank", rank)):
            if not 0 < value <= 1:
                raise InputError(f"`{name}` is a share of the directions, in (0, 1], got {value}")
        check_number("margin", margin, 0.0)
        check_number("temperature", temperature, 1e-6)
        if origin not in ("pretrained", "mean"):
            raise InputError(f"unknown origin {origin!r} of a spectral merge; choose 'pretrained' or 'mean'")
        self.keep, self.margin, self.temperature = keep, margin, temperature
        self.rank, self.weigh, self.origin = rank, weigh, origin

    def bind(self, task_vectors: TaskVectors) -> Self:
        super().bind(task_vectors)
        layout = task_vectors.layout
        whole = {member: min(layout.shapes[member]) for member in _matrices(layout)}
        ranks = {member: max(1, int(self.rank * size)) for member, size in whole.items()}
        self._held = _Held(task_vectors, ranks, self.origin == "mean")
        ends = torch.tensor([0, *ranks.values()]).cumsum(0).tolist()
        self.places = {member: slice(*bounds) for member, bounds in zip(ranks, zip(ends, ends[1:]))}
        low, high = (0.0, 1.0) if self.weigh else (-self.margin, self.margin)
        start = torch.full((len(self.tasks), ends[-1]), low)
        for member, place in self.places.items():
            strongest = max(1, int(self.keep * whole[member]))
            start[:, place.start : min(place.start + strongest, place.stop)] = high
        self.logits = nn.Parameter(start, requires_grad=self.trainable)
        return self

    def state(self) -> State:
        """Λ [T, G] and the masks [T, R] of all matrices, one after the other."""
        if self.weigh:
            return self(), self.logits
        soft = torch.sigmoid(self.logits / self.temperature)
        return self(), (self.logits > 0).float() + (soft - soft.detach())

    def kept(self) -> dict[str, dict[str, float]]:
        """Task → matrix → share of its directions that the mask keeps, or the mean of their weights."""
        masks, names = self.state()[1].detach(), self._held.bank.names
        shares = {names[member]: masks[:, place].mean(1).tolist() for member, place in self.places.items()}
        return {task: {name: row[index] for name, row in shares.items()} for index, task in enumerate(self.tasks)}

    @torch.no_grad()
    def combine(self, part: BankPart, state: State, out: Tensor) -> None:
        bank, weights = part.bank, self._weights(state[0]).to(part.bank.pretrained)
        for member, inside, place in zip(part.members, part.inside, bank.layout.slices):
            base, column = bank.pretrained[place], weights[:, self.group_of[member]]
            if member not in self.places:
                torch.addmv(base, bank.vectors[:, place].float().T, column, out=out[place])
                continue
            if self.origin == "mean":
                torch.add(base, bank.vectors[:, place].float().mean(0), out=out[place])
            else:
                out[place] = base
            rows, offset = _rows(inside, self._width(member))
            factors, scale = self._factors(member, state, bank.pretrained.device)
            active = scale.nonzero().flatten()  # of a mask of few directions, few are multiplied
            left = factors.left[rows].index_select(1, active) * scale[active]
            product = (left @ factors.right.index_select(0, active)).flatten()
            out[place] += product[offset : offset + inside.stop - inside.start]

    @torch.no_grad()
    def project(self, part: BankPart, gradients: Sequence[Tensor | None], state: State, out: State) -> None:
        bank, tasks = part.bank, len(self.tasks)
        others = torch.zeros_like(out[0])
        for member, inside, place, gradient in zip(part.members, part.inside, bank.layout.slices, gradients):
            if gradient is None:
                continue
            flat, group = gradient.reshape(-1).float(), self.group_of[member]
            if member not in self.places:
                others[:, group] += bank.vectors[:, place].float() @ flat
                continue
            width, masked = self._width(member), self.places[member]
            rows, offset = _rows(inside, width)
            padded = flat.new_zeros((rows.stop - rows.start) * width)
            padded[offset : offset + len(flat)] = flat
            factors = self._held.of(member, bank.pretrained.device)
            inner = factors.left[rows].T @ padded.view(-1, width)  # [T·r, I]: uₖᵀ G, then its product with vₖ
            along = (inner * factors.right).sum(1).view(tasks, -1) * factors.singular
            out[0][:, group] += (along * state[1][:, masked]).sum(1)
            out[1][:, masked] += along * state[0][:, group, None]
        out[0].add_(others - others.mean(0) if self.origin == "mean" else others)

    def rebase(self, task_vectors: TaskVectors) -> None:
        """λ at 0, around the start; the masks begin anew, of the task vectors from there."""
        if self.origin == "mean":
            raise InputError("a spectral merge around the mean cannot go on from a start; set `origin: pretrained`")
        super().rebase(task_vectors)
        self._held = _Held(task_vectors, self._held.ranks, False)

    @property
    def held_bytes(self) -> int:
        """Of the SVDs of all matrices."""
        shapes = self._held.bank.layout.shapes
        numbers = sum(rank * (sum(shapes[member]) + 1) for member, rank in self._held.ranks.items())
        return 4 * len(self.tasks) * numbers

    def _weights(self, coefficients: Tensor) -> Tensor:
        """What the vectors that are no matrices of blocks are weighed with, [T, G]."""
        if self.origin == "pretrained":
            return coefficients
        return coefficients + (1 - coefficients.sum(0)) / len(self.tasks)

    def _factors(self, member: int, state: State, device: torch.device) -> tuple[_Factors, Tensor]:
        """Of a matrix, and what its directions are weighed with, [T·r]."""
        factors = self._held.of(member, device)
        weights = state[0][:, self.group_of[member], None] * state[1][:, self.places[member]]
        return factors, (weights.to(device) * factors.singular).flatten()

    def _width(self, member: int) -> int:
        return self._held.bank.layout.shapes[member][1]


def _matrices(layout: Layout) -> list[int]:
    """The parameters that are masked: the matrices of the repeated blocks, as published for attention and MLP."""
    layout.depth("Spectral")
    return [member for member, block in enumerate(layout.blocks) if block and len(layout.shapes[member]) == 2]


def _rows(inside: slice, width: int) -> tuple[slice, int]:
    """The rows of a matrix that some entries of it lie in, and where the entries begin there."""
    first, last = inside.start // width, math.ceil(inside.stop / width)
    return slice(first, last), inside.start - first * width
