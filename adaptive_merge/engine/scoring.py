"""What one validation counts for a task: accuracy and calibration with labels, three criteria without."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from adaptive_merge.objectives.base import Prediction
from adaptive_merge.objectives.functional import jensen_shannon, normalised_entropy

__all__ = ["CRITERIA", "TaskScore"]

CRITERIA = {"agreement": 1, "js": -1, "entropy": -1}
"""Label-free, with the sign of what is better: share of images on which model and expert name the same class, mean
Jensen–Shannon divergence to the expert in nats, mean entropy over ln C."""
_BINS = 15


class TaskScore(Metric):
    """Sums over the images of one task, exact for any number of processes.

    `compute` gives `accuracy` and `ece`, the expected calibration error (Guo et al., ICML 2017) over 15 bins of equal
    width, both in [0, 1], and the `CRITERIA` where the expert's predictions were given.
    """

    full_state_update = False
    bins: Tensor
    compared: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Rows: images, correct, summed confidence. Sums, not lists: a process's share of a task may be empty.
        self.add_state("bins", torch.zeros(3, _BINS), dist_reduce_fx="sum")
        self.add_state("compared", torch.zeros(1 + len(CRITERIA)), dist_reduce_fx="sum")

    def update(self, ours: Prediction, labels: Tensor, expert: Prediction | None = None) -> None:
        """Add a batch: logits [B, C] against labels [B], and against what the expert says about the same images."""
        if not len(labels):
            return
        confidence, predicted = ours.logits.float().softmax(-1).max(-1)
        place = (confidence * _BINS).ceil().long().sub(1).clamp(0, _BINS - 1)
        rows = torch.stack([torch.ones_like(confidence), (predicted == labels).float(), confidence])
        # Not in place: `reset` may have made the sums in inference mode.
        self.bins = self.bins.index_add(1, place, rows)
        if expert is not None:
            agreed = (predicted == expert.logits.argmax(-1)).float().mean()
            found = [agreed, jensen_shannon(ours.logits, expert.logits).mean(), normalised_entropy(ours.logits)]
            self.compared = self.compared + len(labels) * torch.stack([torch.ones_like(agreed), *found])

    def compute(self) -> dict[str, Tensor]:
        """Name → value."""
        images, correct, confidence = self.bins
        found = {"accuracy": correct.sum() / images.sum(), "ece": (correct - confidence).abs().sum() / images.sum()}
        if self.compared[0]:
            found |= dict(zip(CRITERIA, self.compared[1:] / self.compared[0]))
        return found
