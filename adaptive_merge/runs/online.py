"""Prequential accuracy: each image counts as it was predicted before the run learned from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Prequential", "prequential"]

_POINTS = 20


@dataclass(frozen=True)
class Prequential:
    """One task's pass.

    Args:
        accuracy: over all images.
        images, curve: accuracy over the first so many images of the stream.
        predicted: the number of images that a step predicted; the model that was kept predicted the others.
    """

    accuracy: float
    images: list[int]
    curve: list[float]
    predicted: int


def prequential(rows: Mapping[str, Tensor], labels: Tensor, order: Tensor) -> Prequential:
    """Score a single pass over a task (Dawid, "Prequential analysis", 1984).

    Args:
        rows: "first" [N], the class that was predicted before the image was used, or −1; "final" [N], the class that
            the adapted model predicts.
        labels: int64 [N].
        order: int64 [N], the images as they came.
    """
    first, final = rows["first"], rows["final"]
    said = torch.where(first >= 0, first, final)
    correct = (said == labels).double()[order]
    ends = torch.linspace(len(order) / _POINTS, len(order), _POINTS).round().long().clamp_min(1).unique()
    running = correct.cumsum(0)[ends - 1] / ends
    return Prequential(float(correct.mean()), ends.tolist(), running.tolist(), int((first >= 0).sum()))
