"""Sufficient statistics of one task at one site: sums over tokens, so that batches and processes add up.

Products are taken in the activations' precision and summed in float64: over 10⁵ tokens a float32 sum would lose
what a small λ lives on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "Sums"]


class Moments(NamedTuple):
    """Weighted means over a task's tokens, float64.

    Args:
        gram: E[x xᵀ] [in, in]. Of a norm or of statistics, entry by entry: E[x²] [d].
        cross: E[x yᵀ] [in, out], or E[x y] [d].
        x: E[x] [in].
        y: E[y] [out].
        tokens: the sum of the weights.
        output_gram: Σ g gᵀ of the gradients at the outputs [out, out], where a method asks for them.
    """

    gram: Tensor
    cross: Tensor
    x: Tensor
    y: Tensor
    tokens: float
    output_gram: Tensor | None = None


class Sums:
    """Adds up what batches say.

    Args:
        entrywise: whether inputs and outputs are paired entry by entry, as in norms and statistics.
    """

    def __init__(self, entrywise: bool = False) -> None:
        self.entrywise = entrywise
        self.totals: list[Tensor] = []

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> None:
        """A batch: inputs [n, in], outputs [n, out] and the tokens' weights [n], 1 by default."""
        weighted = x if weights is None else x * weights[:, None]
        if self.entrywise:
            gram, cross = (weighted * x).sum(0), (weighted * y).sum(0)
        else:
            gram, cross = weighted.T @ x, weighted.T @ y
        mean_y = y.sum(0) if weights is None else weights @ y
        tokens = x.new_tensor(len(x)) if weights is None else weights.sum()
        parts = [gram, cross, weighted.sum(0), mean_y, tokens]
        if not self.totals:
            self.totals = [part.double() for part in parts]
            return
        for total, part in zip(self.totals, parts):
            total += part  # in place: a Gram of ViT-B's widest layer is 75 MB in float64

    def blank(self, inputs: int, outputs: int, device: torch.device) -> None:
        """Stand for a process that has no batch of the task, where others do."""
        if not self.totals:
            shapes: list[tuple[int, ...]] = (
                [(inputs,), (inputs,)] if self.entrywise else [(inputs, inputs), (inputs, outputs)]
            )
            shapes += [(inputs,), (outputs,), ()]
            self.totals = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes]

    def moments(self, reduce: Callable[[Tensor], Tensor]) -> Moments:
        """The means over all processes, where `reduce` sums a tensor over them; the sums are used up."""
        *totals, tokens = map(reduce, self.totals)
        self.totals = []
        gram, cross, x, y = (total.div_(tokens) for total in totals)
        return Moments(gram, cross, x, y, float(tokens))
