"""CART: low-rank experts around their centre instead of around the pre-trained model (Choi et al., 2024).

θ = θ̄ + α Σₜ LRᵣ(θₜ − θ̄) with θ̄ the mean of the experts. Kept as T task vectors, (θ̄ − θ₀)/T + α LRᵣ(θₜ − θ̄), it is
CART where all coefficients are 1, and the base that layer-wise AdaMerging gains most from in their tables.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.matrices import QKV, by_matrix, check_qkv, leading, stacked

__all__ = ["CART", "cart"]


class CART(Transform):
    """Centred, rank-reduced task vectors; Δ = Σₜ of the rows at coefficient 1.

    Args:
        rank: share of the singular values of a matrix to keep, in [0, 1]. Published with ViT-B/32: 0.12, 0.16 and
            0.32 for 8, 14 and 20 tasks.
        scale: α of the centred vectors. Published with ViT-B/32: 2.0, 1.5 and 1.9.
        qkv: `"fused"`, as published, or `"split"`: Q, K and V as matrices of their own.
    """

    takes = "own"
    joint = True
    published = 1.0

    def __init__(self, rank: float = 0.12, scale: float = 2.0, qkv: QKV = "fused") -> None:
        if not 0 <= rank <= 1:
            raise InputError(f"CART keeps a share of the singular values in [0, 1], got rank {rank}")
        self.rank, self.scale, self.qkv = rank, scale, check_qkv(qkv)

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        matrix, other = partial(cart, rank=self.rank, scale=self.scale), partial(cart, rank=1.0, scale=self.scale)
        return by_matrix(bank, matrix, other, self.qkv, blocks_only=True)


def cart(tensors: Tensor, rank: float, scale: float) -> Tensor:
    """τ̄/T + scale · LR(τₜ − τ̄) for tensors [T, …]; LR keeps ⌊rank · r⌋ singular values, all of them at rank 1.

    Only the weights in the blocks (attention and MLP) are cut; of everything else the centred vectors sum to zero.
    """
    mean = tensors.mean(0, dtype=torch.float64)
    centred = stacked(tensors, (tensor.double() - mean for tensor in tensors))  # from here on changed in place
    if rank < 1:
        for matrix in centred:
            u, s, v = leading(matrix, int(rank * min(matrix.shape)))
            matrix.copy_((u * s) @ v.T)
    return centred.mul_(scale).add_(mean / len(tensors))
