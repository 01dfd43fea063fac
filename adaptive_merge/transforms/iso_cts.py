"""Iso-CTS: Iso-C with its weakest directions replaced by task-specific ones (Marczak et al., ICML 2025).

Kept as T task vectors, as in `iso_c`: what is specific belongs to its task, and what is common is divided among
the tasks by what each contributes to it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.iso_c import check_floor, iso_c
from adaptive_merge.transforms.matrices import (
    QKV,
    RANK_TOLERANCE,
    average,
    by_matrix,
    check_qkv,
    leading,
    polar,
    stacked,
    svd,
)

__all__ = ["IsoCTS", "iso_cts", "ranks"]


class IsoCTS(Transform):
    """Isotropic merging in common and task-specific subspaces; α is the equal coefficient of the rows.

    Args:
        common: share of the directions that are common, in [0, 1]; published 0.8.
        floor: as of `IsoC`, for the common directions.
        qkv: `"fused"`, as published, or `"split"`: Q, K and V as matrices of their own.
    """

    takes = "own"
    joint = True
    published = 0.7

    def __init__(self, common: float = 0.8, floor: float = 0.0, qkv: QKV = "fused") -> None:
        if not 0 <= common <= 1:
            raise InputError(f"Iso-CTS keeps a share of common directions in [0, 1], got common {common}")
        self.common, self.floor, self.qkv = common, check_floor(floor), check_qkv(qkv)

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        return by_matrix(bank, partial(iso_cts, common=self.common, floor=self.floor), average, self.qkv)


def ranks(rank: int, tasks: int, common: float) -> tuple[int, int]:
    """k common directions and s specific ones a task, k + s·T = rank, as the published code rounds them."""
    specific = round((rank - int(rank * common)) / tasks)
    # Rounding up can ask for more directions than there are.
    specific = min(specific, rank // tasks)
    return rank - specific * tasks, specific


def iso_cts(matrices: Tensor, common: float = 0.8, floor: float = 0.0) -> Tensor:
    """The share of each task in σ̄ U⊥V⊥ᵀ for matrices [T, m, n].

    With U, S, V the k leading triplets of Σₜ τₜ, and Uₜ, Sₜ, Vₜ the s leading ones of τₜ − UUᵀτₜ, U⊥ and V⊥ are the
    polar factors of all left and right vectors side by side, and σ̄ is the mean of all r values. Task t has
    σ̄ (U⊥[t] V⊥[t]ᵀ + U⊥[common] S⁻¹ Uᵀ τₜ V V⊥[common]ᵀ). Where no direction is specific, it is Iso-C.
    """
    k, specific = ranks(min(matrices.shape[1:]), len(matrices), common)
    if specific == 0:
        return iso_c(matrices, floor)
    triplets = _triplets(matrices, k, specific)
    values = torch.cat([s for _, s, _ in triplets])
    exists = values > RANK_TOLERANCE * values.max()
    left = polar(torch.cat([u for u, _, _ in triplets], 1) * exists).split([k] + [specific] * len(matrices), 1)
    right = polar(torch.cat([v for _, _, v in triplets], 1) * exists).split([k] + [specific] * len(matrices), 1)
    (u, s, v), mean = triplets[0], values.mean()
    inverse = torch.where(exists[:k], 1 / s.clamp_min(floor * mean), 0.0)

    def share(matrix: Tensor, own_left: Tensor, own_right: Tensor) -> Tensor:
        common = inverse[:, None] * (u.T @ matrix.double() @ v)
        return mean * (own_left @ own_right.T + left[0] @ common @ right[0].T)

    return stacked(matrices, map(share, matrices, left[1:], right[1:]))


def _triplets(matrices: Tensor, k: int, specific: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Left vectors, values and right vectors: the common ones first, then those of each task."""
    u, s, vt = svd(matrices.sum(0, dtype=torch.float64))
    u = u[:, :k]
    bases = [(u, s[:k], vt[:k].T)]
    for matrix in matrices:
        bases.append(leading(matrix - u @ (u.T @ matrix.double()), specific))
    return bases
