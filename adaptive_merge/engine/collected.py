"""Gradients of one task's loss after another, of their sum or of their smooth maximum, without running a task twice."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["Collected"]


class Collected:
    """What leaves collect from the losses of tasks.

    A smooth maximum's weights, softmax(z), are known after the last task only. As one sums a softmax online, a task
    counts by exp(z − the largest z so far), what is collected shrinks when a larger one comes, and is divided at the
    end.

    Args:
        leaves: whose gradients are collected; some may get none.
    """

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self.leaves = leaves
        self._peak: Tensor | None = None

    def add(self, loss: Tensor, exponent: Tensor | None = None) -> None:
        """Back-propagate the loss of one task.

        Args:
            loss: scalar.
            exponent: its z, where the smooth maximum is asked for.
        """
        if exponent is not None:
            if self._peak is None or exponent > self._peak:
                before, self._peak = self._peak, exponent
                if before is not None:
                    self._scale((before - exponent).exp())
            loss = (exponent - self._peak).exp() * loss
        loss.backward()

    def divide(self, log_sum: Tensor, tasks: int) -> None:
        """Weigh by softmax(z) / tasks what was weighed by exp(z − largest z); `log_sum` is log Σ exp(z)."""
        if self._peak is not None:
            self._scale((self._peak - log_sum).exp() / tasks)

    def _scale(self, factor: Tensor) -> None:
        for leaf in self.leaves:
            if leaf.grad is not None:
                leaf.grad.mul_(factor)
