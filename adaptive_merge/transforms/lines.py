"""LiNeS: scale the task vectors linearly with depth (Wang et al., ICLR 2025)."""

from __future__ import annotations

from typing import Literal

from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform
from adaptive_merge.transforms.inner import apply_inner

__all__ = ["LiNeS", "depth"]


class LiNeS(Transform):
    """Multiply block ℓ of L by a + b · ℓ/(L − 1), and everything outside the blocks by a.

    Outside are, as published, also the tensors after the last block. Σₜ of the rows at coefficient 1 is the merge.

    Args:
        b: how much more the last block counts than the first. Published: of 0.1, 0.2 … 1.0, the one with the best
            labelled validation accuracy.
        a: of the first block; default (1/T) ‖Σₜ τₜ‖₁ / ‖Σₜ of what `transform` returns‖₁, as published: 1/T of
            plain task vectors.
        transform: what makes the vectors that are scaled; default none, which is task arithmetic.
    """

    published = 1.0

    def __init__(self, b: float = 0.5, a: float | None = None, transform: Transform | None = None) -> None:
        self.b, self.a, self.transform = b, a, transform

    @property
    def takes(self) -> Literal["rows", "experts"]:  # type: ignore[override]
        """Only the default of `a` compares the merge with the experts."""
        return "experts" if self.a is None else "rows"

    def __call__(self, bank: TaskVectors) -> TaskVectors:
        shares = depth(bank.layout)
        made = apply_inner(self.transform, bank)
        a = _same_length(bank, made) if self.a is None else self.a
        for part, share in zip(bank.layout.slices, shares):
            made.vectors[:, part] *= a + self.b * share
        return bank.with_vectors(made.vectors)


def depth(layout: Layout) -> list[float]:
    """For each parameter ℓ/(L − 1), from 0 in the first block to 1 in the last; 0 outside the blocks.

    Raises:
        InputError: there are no repeated blocks, or none that can be told by their names.
    """
    blocks = layout.depth("LiNeS")
    last = max(len(blocks) - 1, 1)
    return [blocks.index(block) / last if block else 0.0 for block in layout.blocks]


def _same_length(bank: TaskVectors, made: TaskVectors) -> float:
    """The factor that gives the merged vectors the length (sum of magnitudes) of the mean task vector."""
    before, after = _merged_length(bank), _merged_length(made)
    return before / after / len(bank.tasks) if after > 0 else 0.0


def _merged_length(bank: TaskVectors) -> float:
    return sum(bank.vectors[:, part].double().sum(0).abs().sum().item() for part in bank.layout.slices)
