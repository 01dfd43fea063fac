"""TALL-masks and Consensus: keep the entries that several tasks rely on (Wang et al., ICML 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.inner import apply_inner

__all__ = ["Consensus", "tall_masks"]


class Consensus(Transform):
    """Zero every entry that fewer than `agree` tasks keep in their TALL-mask; α is the equal coefficient of the rows.

    Args:
        transform: what makes the merged vector; default none, which is task arithmetic. `Ties()` gives Consensus
            TIES. The masks compare it with the task vectors of the bank that Consensus is given.
        threshold: λ of the masks, ≥ 0: one for all tasks, or one each. Published: of 0.2, 0.3 … 0.6, the one with
            the best labelled validation accuracy of each task.
        agree: k, the least number of tasks, ≥ 0. At 0 everything is kept, above T nothing.
    """

    takes = "experts"
    published = 0.4

    def __init__(
        self, transform: Transform | None = None, threshold: float | list[float] = 0.4, agree: int = 2
    ) -> None:
        if min(threshold if isinstance(threshold, list) else [threshold], default=0) < 0 or agree < 0:
            raise InputError(f"Consensus needs threshold ≥ 0 and agree ≥ 0, got {threshold} and {agree}")
        self.transform, self.threshold, self.agree = transform, threshold, agree

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        result = apply_inner(self.transform, bank).vectors
        # Tensor by tensor only to keep the memory low: the masks know nothing but entries.
        for part in bank.layout.slices:
            merged = result[:, part].double().sum(0)
            masks = tall_masks(bank.vectors[:, part].double(), merged, self.threshold)
            result[:, part] *= masks.sum(0) >= self.agree
        return bank.with_vectors(result)


def tall_masks(vectors: Tensor, merged: Tensor, threshold: float | list[float] = 0.4) -> Tensor:
    """mₜ = |τₜ| > λₜ |τ_MT − τₜ|, bool [T, P], for task vectors [T, P] and their unscaled merge [P].

    mₜ ⊙ τ_MT rebuilds expert t; with λ = 1 no other mask has a smaller |mₜ ⊙ τ_MT − τₜ| in any entry.

    Raises:
        InputError: a list of thresholds that has not one for each task.
    """
    if isinstance(threshold, list) and len(threshold) != len(vectors):
        raise InputError(f"{len(threshold)} thresholds for {len(vectors)} tasks; give one for all, or one each")
    scale = torch.as_tensor(threshold, dtype=merged.dtype, device=merged.device).view(-1, 1)
    return vectors.abs() > scale * (merged - vectors).abs()
