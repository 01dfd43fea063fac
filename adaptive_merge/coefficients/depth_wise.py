"""LiNeS with its two numbers learned: a coefficient for each task that is linear in depth."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from adaptive_merge.coefficients.linear import LinearRule
from adaptive_merge.errors import InputError
from adaptive_merge.merge.layout import Layout
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.lines import depth

__all__ = ["DepthWise"]

OUTSIDE = "outside"  # the group of what lies in no block


class DepthWise(LinearRule):
    """λₜ(ℓ) = aₜ + bₜ · ℓ/(L − 1) in block ℓ of L, and aₜ outside the blocks: two numbers a task.

    The scale by depth of LiNeS (Wang et al., ICLR 2025), which chooses one b for all tasks by labels. Nothing bounds
    the line.

    Args:
        init: of aₜ: a number, one per task, or a name as for `Coefficients`. Or a run folder or file: of coefficients
            by block, the line nearest to them, and of one coefficient a task, that as aₜ.
        slope: start value of bₜ, added to that of a file.
        trainable: whether the line learns.
    """

    granularity = "block"

    def __init__(self, init: float | list[float] | str = 0.3, slope: float = 0.0, trainable: bool = True) -> None:
        super().__init__()
        self.init, self.slope, self.trainable = init, slope, trainable
        self.shares: list[float] = []

    def bind(self, task_vectors: TaskVectors) -> Self:
        """Make the line for a bank and set it to its start. Returns itself.

        Raises:
            InputError: the backbone has no numbered blocks; `layerwise_…`, which no line is.
        """
        if isinstance(self.init, str) and self.init.startswith("layerwise_"):
            raise InputError(f"init {self.init!r} is no line in depth; leave out 'layerwise_'")
        start, places = self.arrange(task_vectors), depth(task_vectors.layout)
        self.shares = [places[self.group_of.index(group)] for group in range(len(self.groups))]
        self.line = nn.Parameter(_nearest_line(start, self.shares), requires_grad=self.trainable)
        with torch.no_grad():
            self.line[:, 1] += self.slope
        self.free = self.trainable
        return self

    def group_names(self, layout: Layout) -> list[str]:
        return [block or OUTSIDE for block in layout.blocks]

    def forward(self) -> Tensor:
        """Λ [T, G] as the merge uses it."""
        return self.line[:, :1] + self.line[:, 1:] * self.line.new_tensor(self.shares)

    @torch.no_grad()
    def rebase(self, task_vectors: TaskVectors) -> None:
        """A line at 0, where the merge is the start itself."""
        self.line.zero_()


def _nearest_line(values: Tensor, shares: list[float]) -> Tensor:
    """(a, b) [T, 2] of the line in `shares` [G] that is nearest to `values` [T, G]; exact where they are all equal."""
    if bool((values == values[:, :1]).all()):
        return torch.stack([values[:, 0], torch.zeros(len(values))], 1)
    design = torch.stack([torch.ones(len(shares)), torch.tensor(shares)], 1).double()
    return torch.linalg.lstsq(design, values.double().T).solution.T.float().contiguous()
