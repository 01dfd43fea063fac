"""What a batch asks for by itself: certain predictions (AdaMerging, Tent), with two parts against collapse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.objectives.base import Objective, Prediction
from adaptive_merge.objectives.functional import entropy, log_probabilities

__all__ = ["Entropy"]


class Entropy(Objective):
    """Prediction entropy (AdaMerging, eq. 6; Tent), with two optional parts against collapse.

    Args:
        diversity: weight w of −w · H(p̄), where p̄ is the mean prediction of the task's batch over all processes:
            the images are to be spread over the classes while each is certain of its own.
        reliable: in (0, 1]: images of an entropy of `reliable` · ln C or more do not count, the others count by
            exp(reliable · ln C − H) (EATA, eq. 2 and 3, there with 0.4). A step that keeps no image changes nothing.
    """

    def __init__(self, diversity: float = 0.0, reliable: float | None = None) -> None:
        if not 0 <= diversity < math.inf or (reliable is not None and not 0 < reliable <= 1):
            raise InputError(
                f"`diversity` is at least 0 and `reliable`, a part of ln C, in (0, 1]; got {diversity} and {reliable}"
            )
        self.diversity, self.reliable, self.filters = diversity, reliable, reliable is not None

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        losses = entropy(prediction.logits)
        if self.reliable is not None:
            losses = losses * (self._margin(prediction) - losses.detach()).exp()
        if self.diversity:
            # Its mean is −H(p̄), and as Σₖ dp̄ₖ = 0, so is its gradient, though log p̄ is held fixed.
            log_mean = self._mean(prediction).clamp_min(torch.finfo(losses.dtype).tiny).log()
            losses = losses + self.diversity * (log_probabilities(prediction.logits).exp() * log_mean).sum(-1)
        return losses

    def keep(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        return entropy(prediction.logits.detach()) < self._margin(prediction)

    def _margin(self, prediction: Prediction) -> float:
        return math.inf if self.reliable is None else self.reliable * math.log(max(prediction.logits.shape[-1], 2))

    def statistics(self, prediction: Prediction, expert: Prediction | None) -> Tensor | None:
        return self._counted(prediction) if self.diversity else None

    def _counted(self, prediction: Prediction) -> Tensor:
        """[B, 1 + C]: whether an image counts, and its probabilities where it does."""
        kept = self.keep(prediction, None)[:, None]
        return torch.cat([kept, log_probabilities(prediction.logits.detach()).exp() * kept], 1)

    def _mean(self, prediction: Prediction) -> Tensor:
        """p̄ [C] of the images that count."""
        statistics = prediction.statistics
        if statistics is None:
            statistics = self._counted(prediction).mean(0)
        return statistics[1:] / statistics[0].clamp_min(1e-12)
