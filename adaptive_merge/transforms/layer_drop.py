"""LayerDrop: take back, task by task, the layers that a task hardly needs.

In the spirit of LwPTV ("Merging Smarter, Generalizing Better", arXiv 2506.09093), which drops layers of task
vectors by a saliency whose formula we have not seen. The criteria here are our own, and so is the name.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform

__all__ = ["LayerDrop", "salience"]


class LayerDrop(Transform):
    """Zero the least salient share of the parameter tensors of each task; there it falls back to θ₀ exactly.

    Args:
        share: of the parameter tensors of a task to drop, in [0, 1]; rounded down, equals in the order of the bank.
        by: the salience of tensor ℓ for task t: `"norm"`, ‖τₜ‖/‖θ₀‖, how far the task has moved it; or
            `"difference"`, 1 − cos(τₜ, mean of τ), how little the other tasks move it the same way.
    """

    def __init__(self, share: float = 0.25, by: Literal["norm", "difference"] = "norm") -> None:
        if not 0 <= share <= 1:
            raise InputError(f"LayerDrop drops a share of the tensors in [0, 1], got share {share}")
        if by not in ("norm", "difference"):
            raise InputError(f"LayerDrop ranks layers by 'norm' or 'difference', got {by!r}")
        self.share, self.by = share, by

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        result = bank.vectors.clone()
        count = int(self.share * len(bank.names))
        for row, least in zip(result, salience(bank, self.by).argsort(dim=1, stable=True)[:, :count].tolist()):
            for index in least:
                row[bank.layout.slices[index]] = 0
        return bank.with_vectors(result)


def salience(bank: TaskVectors, by: str = "norm") -> Tensor:
    """How much each task needs its change of each parameter tensor, [T, L]; lowest where it has changed nothing."""
    columns = []
    for part in bank.layout.slices:
        vectors = bank.vectors[:, part].double()
        length = vectors.norm(dim=1)
        if by == "norm":
            score = length / bank.pretrained[part].double().norm()
        else:
            mean = vectors.mean(0)
            product = length * mean.norm()
            score = 1 - torch.where(product > 0, vectors @ mean / product, 0.0)
        columns.append(torch.where(length > 0, score, -1.0))
    return torch.stack(columns, 1)
