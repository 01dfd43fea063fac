"""Which stream an image came from: what a route may learn without any label."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from adaptive_merge.errors import InputError
from adaptive_merge.objectives.base import Objective, Prediction

__all__ = ["Stream"]


class Stream(Objective):
    """Cross-entropy between a route's scores and the task whose stream the image came from (Twin-Merging, eq. 5)."""

    def losses(self, prediction: Prediction, expert: Prediction | None) -> Tensor:
        if prediction.scores is None or prediction.row is None:
            raise InputError("the objective Stream teaches a route, and this model has none; add one, such as Twin")
        rows = prediction.scores.new_full((len(prediction.scores),), prediction.row).long()
        return F.cross_entropy(prediction.scores.float(), rows, reduction="none")
