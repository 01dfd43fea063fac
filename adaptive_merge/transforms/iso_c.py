"""Iso-C: give the summed task vectors a flat spectrum (Marczak et al., "No Task Left Behind", ICML 2025).

The published merge is joint, α σ̄UVᵀ of Σₜ τₜ = U S Vᵀ. It is linear in the τₜ once U and S are known, which makes
it a sum of one term a task: Iso-C where all coefficients are α, and something to learn over.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.matrices import QKV, RANK_TOLERANCE, average, by_matrix, check_qkv, stacked, svd

__all__ = ["IsoC", "check_floor", "iso_c"]


class IsoC(Transform):
    """Isotropic merging in the common subspace; α is the equal coefficient of the rows.

    Args:
        floor: lowest singular value that is divided by, as a multiple of the mean one, ≥ 0. At 0 the sum is Iso-C
            exactly, but weak directions are amplified in the parts and cancel in the sum: the parts are several
            times as long as it. At 0.1 they are not, and the sum is no longer flat in its weakest directions.
        qkv: `"fused"`, as published, or `"split"`: Q, K and V as matrices of their own.
    """

    takes = "own"
    joint = True
    published = 0.7

    def __init__(self, floor: float = 0.0, qkv: QKV = "fused") -> None:
        self.floor, self.qkv = check_floor(floor), check_qkv(qkv)

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        return by_matrix(bank, partial(iso_c, floor=self.floor), average, self.qkv)


def check_floor(floor: float) -> float:
    """`floor` itself.

    Raises:
        InputError: it is negative.
    """
    if floor < 0:
        raise InputError(f"the floor of the singular values is a multiple of their mean, at least 0; got {floor}")
    return floor


def iso_c(matrices: Tensor, floor: float = 0.0) -> Tensor:
    """W τₜ, with W = σ̄ U S⁻¹ Uᵀ, for matrices [T, m, n]; of tall ones τₜ W, with W = σ̄ V S⁻¹ Vᵀ.

    S⁻¹ is that of max(S, floor · σ̄), and 0 in directions that Σₜ τₜ does not have: the published code gives
    them σ̄ as well, along vectors that depend on the solver.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return iso_c(matrices.mT, floor).mT
    u, s, _ = svd(matrices.sum(0, dtype=torch.float64))
    mean = s.mean()
    factor = torch.where(s > RANK_TOLERANCE * s[0], mean / s.clamp_min(floor * mean), 0.0)
    whitening = (u * factor) @ u.T
    return stacked(matrices, (whitening @ matrix.double() for matrix in matrices))
