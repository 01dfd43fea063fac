"""What an unlabelled batch asks for: losses on predictions, alone or against the task's own expert.

The mathematics are pure functions; the classes below them are what a recipe names.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["Entropy", "Objective", "Prediction", "entropy", "normalised_entropy"]


@dataclass(frozen=True)
class Prediction:
    """What a model says about a batch of one task.

    Args:
        features: [B, d], after the task's adapters.
        logits: [B, C] of the task's head.
    """

    features: Tensor
    logits: Tensor


class Objective(ABC):
    """A loss on one task's unlabelled batch. Class attribute `needs_expert`: whether it looks at the expert."""

    needs_expert: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        """The loss, a scalar; `expert` is the frozen expert's prediction for the same images."""


def entropy(logits: Tensor) -> Tensor:
    """H(x) = −Σₖ pₖ log pₖ in nats, [B] from logits [B, C]; finite, with finite gradients, for saturated logits."""
    log_p = logits.float().log_softmax(-1)
    # A class at −inf has p = 0: its clamped logarithm keeps 0 · log 0 at 0, in the gradient as well.
    return -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)


def normalised_entropy(logits: Tensor) -> Tensor:
    """Mean entropy of a batch over ln C: 0 is certain, 1 knows nothing. Scalar, no gradient."""
    return entropy(logits.detach()).mean() / math.log(max(logits.shape[-1], 2))


class Entropy(Objective):
    """Mean prediction entropy (AdaMerging, eq. 6; Tent)."""

    def __call__(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        return entropy(prediction.logits).mean()
