"""The losses of one step over all processes: each process holds a part of every task's images, or whole tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adaptive_merge.engine.step import Batch
from adaptive_merge.objectives import Objective, Prediction, normalised_entropy

__all__ = ["StepLosses"]

Reduce = Callable[[Tensor], Tensor]


class StepLosses:
    """Call it with each task's prediction; it gives the task's loss, and remembers what was said on the way.

    DDP averages the gradients over the W processes. A task's loss on a process is therefore W times this process's
    part of the mean over all images, or over all images that the objective keeps.

    Args:
        objective: what the images ask for.
        batch: task → {"image", "index"}, and "weight" where the processes hold unequal parts.
        expert: task → the expert's prediction; asked where the objective needs it.
        mean_over_ranks: the mean of a number over the processes.
        owns: whether a process holds whole tasks.
    """

    def __init__(
        self,
        objective: Objective,
        batch: Batch,
        expert: Callable[[str], Prediction],
        mean_over_ranks: Reduce,
        owns: bool,
    ) -> None:
        self.objective, self.batch, self.expert, self.owns = objective, batch, expert, owns
        self.mean_over_ranks = mean_over_ranks
        self.said: dict[str, Tensor] = {}
        self.entropies: dict[str, Tensor] = {}
        self.kept: dict[str, Tensor] = {}

    def __call__(self, task: str, prediction: Prediction) -> Tensor:
        """The loss of a task, a scalar."""
        objective, weight = self.objective, self.batch[task].get("weight", 1.0)

        def average(values: Tensor) -> Tensor:
            # A mean over this process's images as one over all of them; a task's owner has them all.
            return values if self.owns else self.mean_over_ranks(weight * values)

        self.said[task], self.entropies[task] = prediction.logits.detach(), normalised_entropy(prediction.logits)
        expert = self.expert(task) if objective.needs_expert else None
        objective.average = average
        try:
            losses = objective.losses(prediction, expert)
            keep = objective.keep(prediction, expert) if objective.filters else None
        finally:
            del objective.average  # it holds on to the batch, and an objective may be used again elsewhere
        if keep is None:
            return weight * _mean(losses)
        self.kept[task] = average(_mean(keep.float()))
        return weight * _mean(losses.where(keep, 0.0)) / self.kept[task].clamp_min(1e-12)

    def gather(self, loss: Tensor, tasks: Sequence[str], processes: int) -> Tensor:
        """The loss for the log: this process's part of it. Where processes own tasks it is that of the whole step, and
        the entropies and kept shares of all tasks come in.
        """
        if not self.owns:
            return loss.detach()
        zero, middle = torch.zeros_like(loss), len(tasks)
        told = [part.get(task, zero) for part in (self.entropies, self.kept) for task in tasks]
        total, *values = self.mean_over_ranks(torch.stack([loss.detach(), *told]))
        values = [processes * value for value in values]  # each was told by one process, and is 0 on the others
        self.entropies = dict(zip(tasks, values[:middle]))
        self.kept = dict(zip(tasks, values[middle:])) if self.objective.filters else {}
        return total


def _mean(values: Tensor) -> Tensor:
    """The mean; 0 of nothing, with a gradient of 0."""
    return values.mean() if len(values) else values.sum()
