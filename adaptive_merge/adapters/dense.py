"""Heads for dense prediction: a class for every token, such as a patch of an image to segment."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric

from adaptive_merge.adapters.heads import Head
from adaptive_merge.errors import InputError

__all__ = ["DenseHead", "MeanIoU"]


class DenseHead(Head):
    """One linear layer on each of the k tokens of an image: logits [B · k, C] from features [B, k · d].

    The backbone gives the tokens of an image one after the other, flattened to one row; labels are int64 [N, k].

    Args:
        weight: [C, d].
        bias: [C]; None: none.
        tokens: k, the units of an image.

    Raises:
        InputError: shapes that do not fit.
    """

    formula = "features.unflatten(-1, (tokens, -1)) @ weight.T (+ bias)"

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, tokens: int) -> None:
        if weight.dim() != 2 or tokens < 1 or (bias is not None and bias.shape != weight.shape[:1]):
            raise InputError(
                f"a dense head has a weight [classes, channels], a bias [classes] or none, and at least one token; got "
                f"{tuple(weight.shape)}, {None if bias is None else tuple(bias.shape)} and {tokens}"
            )
        super().__init__(len(weight), tokens * weight.shape[1])
        self.tokens = tokens
        self.weight = nn.Parameter(weight.detach().float())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float())

    def logits(self, features: Tensor) -> Tensor:
        tokens = features.unflatten(-1, (self.tokens, -1)).flatten(0, 1)
        return F.linear(tokens, self.weight, self.bias)

    def metric(self) -> Metric:
        return MeanIoU(self.classes)

    def tintable(self) -> Self:
        bias = self.weight.new_zeros(self.classes) if self.bias is None else self.bias
        return type(self)(self.weight, bias, tokens=self.tokens)


class MeanIoU(Metric):
    """Intersection over union of prediction and label, averaged over the classes that either of them has.

    Exact for any number of processes; NaN of no unit.

    Args:
        classes: C.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(classes, classes), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, labels: Tensor) -> None:
        """Add predictions [U] and labels [U]."""
        classes = len(self.counts)
        pairs = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
        self.counts = self.counts + pairs

    def compute(self) -> Tensor:
        """The mean over the classes, a scalar."""
        both, either = self.counts.diagonal(), self.counts.sum(0) + self.counts.sum(1) - self.counts.diagonal()
        return (both / either)[either > 0].mean()
