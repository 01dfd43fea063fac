"""What task vectors do to one another and to their merge, from the weights alone: signs, masks, subspaces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.consensus import tall_masks
from adaptive_merge.transforms.matrices import QKV, pieces

__all__ = ["EPSILON", "MaskStatistics", "alignment", "cosines", "mask_statistics", "sign_conflicts"]

EPSILON = 0.05  # of SAR's rank: the share of the norm that may be left out (Marczak et al., ICML 2025)
_PIECE = 1 << 22


@dataclass(frozen=True)
class MaskStatistics:
    """How the TALL-masks of T tasks lie to one another, over the entries that some expert has moved.

    Args:
        density: share of the entries that each task keeps, [T].
        jaccard: entries that both tasks keep over those that one of them keeps, [T, T]; 0 where neither keeps any.
        kept_by: share of the entries that exactly 0, 1 … T tasks keep, [T + 1]; catastrophic ones are kept by none, and
            moved by the sum of the task vectors alone, selfish ones by one task.
    """

    density: Tensor
    jaccard: Tensor
    kept_by: Tensor


def cosines(vectors: Tensor) -> Tensor:
    """[T, T] cosines of the rows of a bank [T, P], read in pieces."""
    gram = torch.zeros(len(vectors), len(vectors), dtype=torch.float64, device=vectors.device)
    for piece in vectors.split(_PIECE, dim=1):
        gram += (piece.float() @ piece.float().T).double()
    norms = gram.diagonal().sqrt().clamp_min(1e-30)
    return (gram / norms[:, None] / norms).float()


def sign_conflicts(bank: TaskVectors) -> Tensor:
    """Where task vectors pull in opposite directions, per parameter: [2, G].

    Row 0: share of the entries on which any two tasks disagree, of those that at least two of them move. It nears 1 for
    many tasks whatever they are. Row 1: the mean over pairs of tasks, in which signs drawn at random disagree on 0.5.
    """
    rows = []
    for part in bank.layout.slices:
        signs = bank.vectors[:, part].sign()
        up, down = ((signs == side).sum(0).double() for side in (1, -1))
        moved = up + down
        shared, pairs = (moved >= 2).sum(), (moved * (moved - 1) / 2).sum()
        opposed = ((up > 0) & (down > 0)).sum() / shared.clamp_min(1)
        rows.append(torch.stack([opposed, (up * down).sum() / pairs.clamp_min(1)]))
    return torch.stack(rows, 1).float()


def mask_statistics(bank: TaskVectors, threshold: float = 0.4) -> MaskStatistics:
    """Density and overlap of the TALL-masks against Σ τ (Wang et al., ICML 2024).

    Args:
        bank: of the experts' own task vectors.
        threshold: λ of the masks, see `tall_masks`.
    """
    tasks = len(bank.tasks)
    both = torch.zeros(tasks, tasks, dtype=torch.float64, device=bank.device)
    counts = torch.zeros(tasks + 1, dtype=torch.float64, device=bank.device)
    for piece in bank.vectors.split(_PIECE, dim=1):
        columns = piece.float()
        columns = columns[:, columns.any(0)]
        masks = tall_masks(columns, columns.sum(0), threshold)
        both += (masks.float() @ masks.float().T).double()  # counts below 2²⁴: exact
        counts += masks.sum(0).bincount(minlength=tasks + 1)
    kept, moved = both.diagonal(), counts.sum().clamp_min(1)
    jaccard = both / (kept[:, None] + kept - both).clamp_min(1)
    return MaskStatistics((kept / moved).float(), jaccard.float(), (counts / moved).float())


@torch.no_grad()
def alignment(bank: TaskVectors, merged: Mapping[str, Tensor], epsilon: float = EPSILON, qkv: QKV = "fused") -> Tensor:
    """Subspace alignment ratio of each task with a merge, [T] in [0, 1]: the mean over matrices of ‖UₖUₖᵀτₜ‖ / ‖τₜ‖.

    Uₖ are the leading left singular vectors of the merge's Δ = θ − θ₀, k the least rank with Σ_{i>k} σᵢ² ≤ ε² Σ σᵢ²
    (Marczak et al., "No Task Left Behind", ICML 2025). A matrix that the merge leaves at θ₀ counts 0; one that an
    expert has not moved does not count for it; NaN without any.

    Args:
        bank: of the experts' own task vectors.
        merged: name → merged parameter.
        epsilon: share of Δ's norm that may be left out.
        qkv: whether the fused projection of attention is one matrix.
    """
    flat = torch.cat([merged[name].detach().flatten().to(bank.device) for name in bank.names]) - bank.pretrained
    total = torch.zeros(2, len(bank.tasks), dtype=torch.float64, device=bank.device)
    for piece in pieces(bank.layout, qkv):
        if piece.matrix:
            vectors = bank.vectors[:, piece.part].double().view(-1, *piece.shape)
            norms = vectors.flatten(1).norm(dim=1)
            basis = _leading(flat[piece.part].double().view(piece.shape), epsilon)
            within = (basis.T @ vectors).flatten(1).norm(dim=1)
            total += torch.stack([(within / norms).where(norms > 0, norms), (norms > 0).double()])
    return (total[0] / total[1]).float()


def _leading(matrix: Tensor, epsilon: float) -> Tensor:
    """Uₖ [m, k] of a matrix [m, n], from the smaller of its two Gram matrices: at 1 − ε² of the energy they suffice."""
    tall = matrix.shape[0] > matrix.shape[1]
    energies, basis = torch.linalg.eigh(matrix.T @ matrix if tall else matrix @ matrix.T)  # ascending
    left_out = energies.clamp_min(0).cumsum(0) <= epsilon**2 * energies.clamp_min(0).sum()
    kept = basis[:, ~left_out]
    return matrix @ kept / energies[~left_out].sqrt() if tall else kept
