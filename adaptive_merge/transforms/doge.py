"""DOGE: adaptive projective gradient descent (Wei et al., "Modeling Multi-Task Model Merging as Adaptive Projective
Gradient Descent", ICML 2025, arXiv 2501.01230). Needs no data.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.matrices import QKV, RANK_TOLERANCE, Piece, check_qkv, pieces, svd

__all__ = ["DOGE", "descend", "magnitude_thresholds", "projection", "scales"]


class DOGE(Transform):
    """λₜ (τₜ + Δ) ⊙ Mₜ in the weights of the blocks, nothing elsewhere; Σₜ of the rows at coefficient 1 is the merge.

    Biases, norms, embeddings and projections stay at θ₀, as in the authors' code. Like there, the gradient is
    projected and not Adam's step, so Δ is only nearly orthogonal to the shared subspace.

    Args:
        scale: η₀; in each matrix λₜ = η₀ / ‖τₜ‖.
        keep: share of the entries of a task vector that Mₜ keeps, its largest over all matrices, in (0, 1].
        subspace: 1/subspace of the left directions of a matrix are shared and not moved by Δ, ≥ 1.
        steps: of Adam, ≥ 0.
        lr: of Adam, in units of the weights.
        qkv: `"fused"`, as open_clip stores them, or `"split"`, as in the authors' Hugging Face models.
    """

    takes = "own"
    joint = True
    published = 1.0

    def __init__(
        self,
        scale: float = 0.07,
        keep: float = 0.3,
        subspace: int = 6,
        steps: int = 400,
        lr: float = 1e-4,
        qkv: QKV = "fused",
    ) -> None:
        if not (0 < keep <= 1 and subspace >= 1 and steps >= 0 and lr > 0):
            raise InputError(
                f"DOGE needs 0 < keep ≤ 1, subspace ≥ 1, steps ≥ 0, lr > 0; got {keep, subspace, steps, lr}"
            )
        self.scale, self.keep, self.subspace, self.steps, self.lr = scale, keep, subspace, steps, lr
        self.qkv = check_qkv(qkv)

    @torch.no_grad()
    def __call__(self, bank: TaskVectors) -> TaskVectors:
        result = torch.zeros_like(bank.vectors)
        chosen = [piece for piece in pieces(bank.layout, self.qkv, blocks_only=True) if piece.matrix]
        thresholds = magnitude_thresholds(bank.vectors, chosen, self.keep)
        for piece in chosen:
            columns = bank.vectors[:, piece.part]
            matrices = columns.double().view(-1, *piece.shape)
            weights = scales(matrices, self.scale)
            moved = matrices + descend(matrices, weights, self.subspace, self.steps, self.lr)
            kept = (columns.abs() >= thresholds[:, None]).view_as(moved)
            result[:, piece.part] = (weights[:, None, None] * moved * kept).flatten(1).to(result.dtype)
        return bank.with_vectors(result)


def magnitude_thresholds(vectors: Tensor, chosen: list[Piece], keep: float) -> Tensor:
    """The magnitude [T] from which on an entry is among the largest share `keep` of the chosen ones of its task."""
    total = sum(piece.part.stop - piece.part.start for piece in chosen)
    rank = max(total - int(total * keep), 1)
    thresholds = [torch.cat([vector[piece.part] for piece in chosen]).abs().kthvalue(rank).values for vector in vectors]
    return torch.stack(thresholds)


def scales(matrices: Tensor, scale: float) -> Tensor:
    """λₜ = scale / ‖τₜ‖ for matrices [T, m, n]; 0 where τₜ is zero."""
    length = matrices.flatten(1).norm(dim=1)
    return torch.where(length > 0, scale / length, 0.0)


def projection(matrices: Tensor, subspace: int) -> Tensor:
    """An orthonormal basis [m, ⌊r/subspace⌋] of the directions that the tasks share.

    These are the first left singular vectors of the ⌊r/T⌋ leading ones of each of [T, m, n] side by side.
    """
    rank = min(matrices.shape[1:])
    leading = rank // len(matrices)
    side_by_side = torch.zeros(matrices.shape[1], rank, dtype=matrices.dtype, device=matrices.device)
    for task, matrix in enumerate(matrices):
        u, s, _ = svd(matrix)
        # Where a task has no more rank, its vectors are arbitrary.
        side_by_side[:, task * leading : (task + 1) * leading] = u[:, :leading] * (s[:leading] > RANK_TOLERANCE * s[0])
    u, s, _ = svd(side_by_side)
    return (u * (s > RANK_TOLERANCE * s[0]))[:, : rank // subspace]


def descend(matrices: Tensor, weights: Tensor, subspace: int, steps: int, lr: float) -> Tensor:
    """Δ [m, n] of Adam on Σₜ Σ_rows ⟨τₜ, τₜ − Σᵢ λᵢ(τᵢ + Δ)⟩², from 0, for matrices τ [T, m, n] and weights λ [T].

    The gradient is projected off the shared subspace before each step.
    """
    basis = projection(matrices, subspace)
    merged = torch.einsum("t,tmn->mn", weights, matrices)
    delta, share = torch.zeros_like(merged), weights.sum()
    optimizer = torch.optim.Adam([delta], lr=lr)
    own = matrices.square().sum(-1)
    for _ in range(steps):
        gap = own - torch.einsum("tmn,mn->tm", matrices, merged + share * delta)
        gradient = -2 * share * torch.einsum("tm,tmn->mn", gap, matrices)
        delta.grad = gradient - basis @ (basis.T @ gradient)
        optimizer.step()
    return delta
