"""What a step asks for of all tasks together: that none is left behind."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.objectives.base import Objective, Prediction
from adaptive_merge.objectives.certainty import Entropy
from adaptive_merge.objectives.taught import required

__all__ = ["Balance"]


class Balance(Objective):
    """The smooth worst task: α · log Σₜ exp(pₜ (ℓₜ − ℓₜ*) / α), pₜ = 1/T (TARA-Merging, CVPR 2026).

    ℓₜ is a task's loss and ℓₜ* the same loss of its expert's own prediction, so that a task that is hard for its
    expert as well does not count as left behind: with entropy Hₜ − Hₜ*, as published; with a divergence ℓₜ* = 0. A
    small α asks for the worst task alone, a large one for the mean.

    Args:
        objective: the loss of a task; default `Entropy()`.
        alpha: α; published: 1, with entropies of logits without CLIP's factor 100.
    """

    needs_expert = True

    def __init__(self, objective: Objective | None = None, alpha: float = 1.0) -> None:
        if not 0 < alpha < math.inf:
            raise InputError(f"`alpha` is a positive number, got {alpha}")
        self.objective, self.alpha = objective or Entropy(), alpha
        if self.objective.smooth_maximum is not None:
            raise InputError("the objective that is balanced is that of one task; give it one that is not balanced")
        self.smooth_maximum, self.filters = alpha, self.objective.filters
        self.needs_blocks = self.objective.needs_blocks

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        own = required(expert)
        if prediction.statistics is not None:
            ours, theirs = prediction.statistics.chunk(2)
            prediction, own = replace(prediction, statistics=ours), replace(own, statistics=theirs)
        return self.objective.losses(prediction, own) - self.objective.losses(own, own).detach()

    def keep(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        return self.objective.keep(prediction, expert)

    def statistics(self, prediction: Prediction, expert: Prediction | None) -> Tensor | None:
        """Those of the model and those of the expert, [U, 2 S]."""
        both = [self.objective.statistics(one, expert) for one in (prediction, required(expert))]
        return torch.cat([one for one in both if one is not None], 1) if both[0] is not None else None
