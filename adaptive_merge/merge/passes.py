"""The two passes over a bank that a merge is made of: θ from Λ, and ∂L/∂Λ from ∂L/∂θ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

import torch
from torch import Tensor

from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["combine", "project"]

# A bfloat16 bank is widened to float32, and factors are multiplied out, piece by piece, so that the merge accumulates
# in float32 and the temporary copy, of so many entries, stays small. On a CPU that is in its cache, and in memory that
# is at hand: a copy of more than 32 MiB is new pages each time, whose faults cost more than the merge.
_WIDEN: Final = {"cpu": 1 << 20, "cuda": 1 << 23}


@torch.no_grad()
def combine(bank: TaskVectors, coefficients: Tensor, group_of: Sequence[int], out: Tensor | None = None) -> Tensor:
    """θ₀ + Σₜ λ_{t,g(p)} τ_{t,p} as one flat buffer [P], float32.

    Args:
        bank: θ₀ and T task vectors.
        coefficients: Λ [T, G].
        group_of: for each parameter of the bank, the column of Λ that weighs it.
        out: a buffer [P] to write to. On a CPU a new one costs more than the merge: its pages fault one by one.
    """
    merged = torch.empty_like(bank.pretrained) if out is None else out
    weights = coefficients.T.to(bank.pretrained).contiguous()
    for group, part in _runs(bank, group_of):
        for piece in _pieces(bank, part):
            _add(bank.pretrained[piece], weights[group], bank.vectors[:, piece].float(), merged[piece])
    return merged


def _add(base: Tensor, weights: Tensor, rows: Tensor, out: Tensor) -> None:
    """base [n] + weights [T] · rows [T, n]."""
    if rows.device.type == "cpu":  # a row times a matrix takes 0.8 times as long as its transpose times a column
        torch.addmm(base[None], weights[None], rows, out=out[None])
    else:  # a product of matrices would be rounded to TF32 where the user allows that
        torch.addmv(base, rows.T, weights, out=out)


@torch.no_grad()
def project(bank: TaskVectors, gradients: Sequence[Tensor | None], group_of: Sequence[int], groups: int) -> Tensor:
    """∂L/∂Λ [T, G] from ∂L/∂θ: ⟨τ_{t,p}, ∂L/∂θ_p⟩ summed over the parameters p of each group.

    Args:
        bank: the bank that was merged.
        gradients: ∂L/∂θ, one tensor per parameter; None where a parameter got none.
        group_of: as for `combine`.
        groups: G.
    """
    result = bank.pretrained.new_zeros(groups, len(bank.tasks))
    for gradient, part, group in zip(gradients, bank.layout.slices, group_of):
        if gradient is None:
            continue
        flat = gradient.reshape(-1).float()
        for piece in _pieces(bank, part):
            columns = bank.vectors[:, piece].float()
            result[group] += torch.mv(columns, flat[piece.start - part.start : piece.stop - part.start])
    return result.T


def _runs(bank: TaskVectors, group_of: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Neighbouring parameters of one group form one run: task-wise is a single matrix-vector product."""
    pairs = zip(group_of, bank.layout.slices)
    for group, members in groupby(pairs, key=lambda pair: pair[0]):
        parts = [part for _, part in members]
        yield group, slice(parts[0].start, parts[-1].stop)


def _pieces(bank: TaskVectors, part: slice) -> Iterator[slice]:
    if bank.factors is None and bank.vectors.dtype == torch.float32:
        yield part
        return
    size = max(_WIDEN.get(bank.device.type, _WIDEN["cpu"]) // len(bank.tasks), 1)
    for start in range(part.start, part.stop, size):
        yield slice(start, min(start + size, part.stop))
