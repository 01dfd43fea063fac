"""STAR: spectral truncation and rescaling of each task vector (Lee et al., NAACL 2025)."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.matrices import QKV, by_matrix, check_qkv, svd

__all__ = ["STAR", "star"]


class STAR(Transform):
    """Low-rank task vectors of their old nuclear norm; published with the plain average, `Fixed("average")`.

    Published on low-rank adapters, where everything is a matrix; other tensors stay as they are.

    Args:
        eta: part of the nuclear norm that the kept singular values have to exceed, in percent, in (0, 100].
        qkv: `"fused"` or `"split"`: Q, K and V as matrices of their own.
    """

    published = "average"

    def __init__(self, eta: float = 40.0, qkv: QKV = "fused") -> None:
        if not 0 < eta <= 100:
            raise InputError(f"STAR keeps a part of the nuclear norm in (0, 100] percent, got eta {eta}")
        self.eta, self.qkv = eta, check_qkv(qkv)

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        return by_matrix(bank, partial(star, eta=self.eta), lambda other: other, self.qkv)


def star(matrices: Tensor, eta: float) -> Tensor:
    """Each of [T, m, n] with its R leading singular values only, rescaled to the sum of all.

    R is one more than the number of leading values that sum to less than eta percent of all; zero stays zero.
    """
    result = torch.zeros_like(matrices, dtype=torch.float64)
    for row, matrix in zip(result, matrices):
        u, s, vt = svd(matrix)
        partial_sums = s.cumsum(0)
        if partial_sums[-1] > 0:
            kept = min(int((partial_sums < partial_sums[-1] * (eta / 100)).sum()) + 1, len(s))
            row.copy_((u[:, :kept] * (s[:kept] * (partial_sums[-1] / partial_sums[kept - 1]))) @ vt[:kept])
    return result
