"""The contract of an objective: a loss per unit of an unlabelled batch.

A unit is what the head gives a row of logits for: an image, or each of its tokens or pixels (see `heads.Head`). Losses
are per unit, not means: the engine divides by the number of units kept over all processes, so that a filter that keeps
three here and seven there weighs them alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Objective", "Prediction"]


@dataclass(frozen=True)
class Prediction:
    """What a model says about a batch of one task.

    Args:
        features: [B, d], after the task's adapters.
        logits: [U, C] of the task's head; U = B where a unit is an image.
        blocks: mean token [B, width] after each block, where an objective looks at them.
        statistics: [S], what `Objective.statistics` gives for the images, averaged over all images of the task on all
            processes; None outside a step.
        perturbed: logits [U, C] of the same images under the perturbation of `Adversarial`; None outside a step of it.
        scores: [B, T] of the model's route, where it has one: the largest is an image's task.
        row: the task's position among the merged ones; None for others.
    """

    features: Tensor
    logits: Tensor
    blocks: tuple[Tensor, ...] = ()
    statistics: Tensor | None = None
    perturbed: Tensor | None = None
    scores: Tensor | None = None
    row: int | None = None


class Objective(ABC):
    """A loss per unit of one task's unlabelled batch."""

    needs_expert: bool = False
    """Whether it looks at the expert's prediction."""

    needs_blocks: bool = False
    """Whether it looks at the tower's blocks."""

    filters: bool = False
    """Whether `keep` may leave images out."""

    perturbs: bool = False
    """Whether it looks at `Prediction.perturbed`: the images under a perturbation of its own, one task at a time."""

    smooth_maximum: float | None = None
    """α, where a step asks for α · log Σₜ exp(ℓₜ / (T α)) of the losses ℓₜ of T tasks; None: for their sum."""

    @abstractmethod
    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        """The loss of each unit, [U], or image, [B]; `expert` is the frozen expert's prediction for the same images."""

    def keep(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        """Which losses count, bool of their shape; not differentiated. Asked where `filters` is true; default: all."""
        return torch.ones_like(prediction.logits[:, 0], dtype=torch.bool)

    def statistics(self, prediction: Prediction, expert: Prediction | None) -> Tensor | None:
        """[U, S] of which `losses` needs the mean over all images of the task, not this process's alone; no gradient.

        The engine hands the mean back as `prediction.statistics`. Default: none is needed.
        """
        return None

    def perturbation(self, task: str, like: Tensor) -> Tensor:
        """δ of a task, of the shape of one of the images `like` [B, …]. Asked where `perturbs` is true."""
        return torch.zeros(like.shape[1:], device=like.device)

    def ascend(self, task: str, gradient: Tensor) -> None:  # noqa: B027
        """Move δ against the model: up the gradient, of δ's shape, which is the mean over all processes."""

    def state_dict(self) -> dict[str, Any]:
        """What it has learned for itself, as tensors: a resumed run goes on with it. Default: nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from what `state_dict` gave."""
