"""TIES: trim each task vector, elect a sign per entry, keep what agrees with it (Yadav et al., NeurIPS 2023).

Kept per task and not summed, the result is what AdaMerging++ learns coefficients over; with all coefficients
at 0.3 it is TIES with a disjoint sum, as the AdaMerging authors run it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform

__all__ = ["Ties", "ties"]


class Ties(Transform):
    """TIES as a transform.

    Args:
        density: share of the entries of a task vector to keep, in (0, 1].
        counted_over: number of entries that the share is taken of. The published ViT-B/32 runs count
            113,448,705, dead text tensors included, which keeps 25.8 % of the 87,849,216 vision entries.
            Default: the entries of the bank.
        reduce: `"sum"` leaves the entries as they are; `"mean"` divides each by the number of tasks that
            keep it, so that equal coefficients of 1 give the disjoint mean.
    """

    published = 0.3

    def __init__(
        self, density: float = 0.2, counted_over: int | None = None, reduce: Literal["sum", "mean"] = "sum"
    ) -> None:
        if not 0 < density <= 1:
            raise InputError(f"TIES keeps a share of the entries in (0, 1], got density {density}")
        if reduce not in ("sum", "mean"):
            raise InputError(f"TIES reduces by 'sum' or 'mean', got {reduce!r}")
        self.density, self.counted_over, self.reduce = density, counted_over, reduce

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        return bank.with_vectors(ties(bank.vectors, self.density, self.counted_over, self.reduce))


def ties(vectors: Tensor, density: float = 0.2, counted_over: int | None = None, reduce: str = "sum") -> Tensor:
    """Trim, elect, and mask task vectors [T, P]; returns [T, P] of the same dtype.

    Trim keeps, per task and over the whole vector, entries at least as large as the threshold (ties
    are kept). The elected sign of an entry is that of the sum over tasks; where the sum is zero, the majority
    sign of all entries.
    """
    kept = torch.empty_like(vectors)
    for row, vector in zip(kept, vectors):
        row.copy_(_trim(vector, density, counted_over))
    sign = kept.float().sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    kept *= kept.sign() == sign
    if reduce == "mean":
        kept /= kept.count_nonzero(0).clamp_min(1)
    return kept


def _trim(vector: Tensor, density: float, counted_over: int | None) -> Tensor:
    counted = counted_over or vector.numel()
    if counted < vector.numel():
        raise InputError(f"TIES counts its density over {counted} entries, but the bank has {vector.numel()}")
    # The threshold is the k-th smallest of the counted entries, k = counted − ⌊density · counted⌋. Those that
    # are not in the bank are zeros, smaller than all others, so they only shift the rank.
    rank = max(vector.numel() - int(density * counted), 1)
    size = vector.abs()
    return vector * (size >= size.kthvalue(rank).values)
