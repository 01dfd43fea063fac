"""Model Breadcrumbs: drop the outliers and the small entries of each row (Davari and Belilovsky, ECCV 2024)."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform

__all__ = ["Breadcrumbs", "breadcrumbs"]


class Breadcrumbs(Transform):
    """Breadcrumbs along the last dimension, as in the authors' code; α (published 0.2) is the equal coefficient.

    Short rows lose everything: with ⌊density · n⌋ = 0 entries to keep, as in the kernels of small convolutions.

    Args:
        density: β, the share of a row that is kept, in [0, 1].
        outliers: γ, the share of a row that is dropped first, its largest entries, in [0, 1].
    """

    published = 0.5

    def __init__(self, density: float = 0.15, outliers: float = 0.006) -> None:
        if not (0 <= density <= 1 and 0 <= outliers <= 1):
            raise InputError(f"Breadcrumbs takes shares in [0, 1], got density {density} and outliers {outliers}")
        self.density, self.outliers = density, outliers

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        result = bank.vectors.clone()
        for part, shape in zip(bank.layout.slices, bank.layout.shapes):
            # A number without dimensions, such as a temperature, is left as it is.
            for row in result[:, part] if shape else ():
                row.copy_(breadcrumbs(row.view(shape), self.density, self.outliers).flatten())
        return bank.with_vectors(result)


def breadcrumbs(tensor: Tensor, density: float, outliers: float) -> Tensor:
    """`tensor` [..., n] without the ⌊outliers · n⌋ largest entries of each row, and with only the next ⌊density · n⌋.

    Large means in magnitude; what is not kept is zero.
    """
    n = tensor.shape[-1]
    first, kept = int(n * outliers), int(n * density)
    chosen = tensor.abs().topk(min(first + kept, n), dim=-1).indices[..., first:]
    return torch.zeros_like(tensor).scatter(-1, chosen, tensor.gather(-1, chosen))
