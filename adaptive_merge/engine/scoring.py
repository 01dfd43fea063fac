"""What one validation counts for a task: accuracy and calibration with labels, three criteria without."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from adaptive_merge.adapters.heads import Head
from adaptive_merge.errors import InputError
from adaptive_merge.objectives.base import Prediction
from adaptive_merge.objectives.functional import BINS, calibration_bin, jensen_shannon, normalised_entropy, undefined

__all__ = ["CRITERIA", "TaskScore"]

CRITERIA = {"agreement": 1, "js": -1, "entropy": -1}
"""Label-free, with the sign of what is better: share of units on which model and expert predict the same, mean
Jensen–Shannon divergence to the expert in nats, mean entropy over ln C."""


class TaskScore(Metric):
    """Sums over the units (images) of one task, exact for any number of processes.

    `compute` gives `accuracy`, which is the head's metric, and `ece`, the expected calibration error (Guo et al., ICML
    2017) over 15 bins of equal width, both in [0, 1], where labels were given, and the `CRITERIA` where the expert's
    predictions were; nothing where no image was counted.

    Where a route gave scores, `routing` is the share of images that it sends to this task, `known` the accuracy with
    the task's head on all images, `unknown` that of which an image sent elsewhere counts as wrong, and `gates` [T] the
    mean scores.

    Args:
        head: of the task.
        tasks: T, of a model with a route; 0: it has none.
        unknown: whether `accuracy` is that of images whose task is not known.
    """

    full_state_update = False
    bins: Tensor
    compared: Tensor
    undefined: Tensor
    routed: Tensor

    def __init__(self, head: Head, tasks: int = 0, unknown: bool = False) -> None:
        super().__init__()
        self._predict, self.metric, self._unknown = head.predict, head.metric(), unknown
        self.sent = head.metric()
        # Images, those sent here, summed scores.
        self.add_state("routed", torch.zeros(2 + tasks), dist_reduce_fx="sum")
        # Rows: units, correct, summed confidence. Sums, not lists: a process's share of a task may be empty.
        self.add_state("bins", torch.zeros(3, BINS), dist_reduce_fx="sum")
        self.add_state("compared", torch.zeros(1 + len(CRITERIA)), dist_reduce_fx="sum")
        self.add_state("undefined", torch.zeros(2), dist_reduce_fx="sum")

    def update(self, ours: Prediction, labels: Tensor | None, expert: Prediction | None = None) -> None:
        """Add a batch: logits [U, C] against labels [U], and against what the expert says about the same images."""
        predicted = self._predict(ours.logits)
        counts = [undefined(prediction.logits).sum() for prediction in (ours, expert or ours)]
        self.undefined = self.undefined + torch.stack(counts)
        if labels is not None:
            self._count(ours, predicted, labels.flatten())
        if expert is not None and len(predicted):
            agreed = (predicted == self._predict(expert.logits)).float().mean()
            compared = [agreed, jensen_shannon(ours.logits, expert.logits).mean(), normalised_entropy(ours.logits)]
            self.compared = self.compared + len(predicted) * torch.stack([torch.ones_like(agreed), *compared])

    def _count(self, ours: Prediction, predicted: Tensor, labels: Tensor) -> None:
        if len(predicted) != len(labels):
            raise InputError(
                f"{len(labels)} labels for {len(predicted)} predictions: give a label for each row of the head's logits"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise InputError(f"labels have to be integers, the class of each unit, got {labels.dtype}")
        self.metric.update(predicted, labels)
        if not len(labels):
            return
        if ours.scores is not None:
            self._route(ours.scores, ours.row, predicted, labels)
        confidence = ours.logits.float().softmax(-1).amax(-1)
        place = calibration_bin(confidence)
        rows = torch.stack([torch.ones_like(confidence), (predicted == labels).float(), confidence])
        # Not in place: `reset` may have made the sums in inference mode.
        self.bins = self.bins.index_add(1, place, rows)

    def _route(self, scores: Tensor, row: int | None, predicted: Tensor, labels: Tensor) -> None:
        here = scores.argmax(1).eq(-1 if row is None else row)
        counts = torch.stack([torch.ones_like(here), here], 1)
        self.routed = self.routed + torch.cat([counts, scores.detach().float()], 1).sum(0)
        self.sent.update(predicted.where(here.repeat_interleave(len(predicted) // len(here)), -1), labels)

    def compute(self) -> dict[str, Tensor]:
        """Name → value.

        Raises:
            InputError: logits that are NaN or infinite: whoever scores them as some class, or finds them to agree with
                others, is wrong.
        """
        ours, expert = (int(count) for count in self.undefined)
        if ours or expert:
            raise InputError(
                f"the logits of {ours or expert} images are NaN or infinite{'' if ours else ' by their expert'}: its "
                "weights overflow in this precision, or are of another tower; set --trainer.precision 32-true, or give "
                "other weights or coefficients"
            )
        units, correct, confidence = self.bins
        metrics = {}
        if units.sum():
            metrics = {"accuracy": self.metric.compute(), "ece": (correct - confidence).abs().sum() / units.sum()}
        if self.routed[0]:
            images, here, *scores = self.routed
            metrics |= {"known": metrics["accuracy"], "unknown": self.sent.compute(), "routing": here / images}
            metrics |= {f"gate {row}": score / images for row, score in enumerate(scores)}
            metrics |= {"accuracy": metrics["unknown"]} if self._unknown else {}
        if self.compared[0]:
            metrics |= dict(zip(CRITERIA, self.compared[1:] / self.compared[0]))
        return metrics

    def reset(self) -> None:
        """Start the next count."""
        super().reset()
        self.metric.reset()
        self.sent.reset()
