"""TSV-M: merge the leading singular vectors of the tasks after decorrelating them (Gargiulo et al., CVPR 2025).

The published merge is a sum of one term a task, so it is kept as T task vectors: with all coefficients at 1 they
are TSV-M, and coefficients can learn over them from there.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.matrices import (
    QKV,
    RANK_TOLERANCE,
    average,
    by_matrix,
    check_qkv,
    leading,
    polar,
    stacked,
)

__all__ = ["TSVM", "tsvm"]


class TSVM(Transform):
    """Task singular vectors, merged; Δ = Σₜ of the rows at coefficient 1.

    Args:
        qkv: `"fused"`, as published, or `"split"`: Q, K and V as matrices of their own.
    """

    takes = "own"
    joint = True
    published = 1.0

    def __init__(self, qkv: QKV = "fused") -> None:
        self.qkv = check_qkv(qkv)

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        return by_matrix(bank, tsvm, average, self.qkv)


def tsvm(matrices: Tensor) -> Tensor:
    """The share of each task in TSV-M: U⊥[:, slot t] diag(Sₜ) V⊥[:, slot t]ᵀ for matrices [T, m, n].

    Each task gives its ⌊r/T⌋ leading singular triplets, r = min(m, n); U⊥ and V⊥ are the polar factors of all
    left and right vectors side by side. A matrix with fewer singular values than tasks is averaged.
    """
    kept = min(matrices.shape[1:]) // len(matrices)
    if kept == 0:
        return average(matrices)
    lefts, values, rights = zip(*map(partial(_leading, kept=kept), matrices))
    left, right = polar(torch.cat(lefts, 1)), polar(torch.cat(rights, 1))
    scaled = left * torch.cat(values)
    return stacked(matrices, (u @ v.T for u, v in zip(scaled.split(kept, 1), right.split(kept, 1))))


def _leading(matrix: Tensor, kept: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first columns of U and V and singular values; zero vectors where the matrix has no more rank."""
    u, s, v = leading(matrix, kept)
    # The vectors of zero values are arbitrary; left in, they would turn those of the other tasks.
    exists = s > RANK_TOLERANCE * s[0]
    return u * exists, s, v * exists
