"""Tinting: each task has its own copy of one layer, trained jointly with the coefficients.

By default the layer is the task's classification head, as in the released code of Model Tinting (Jung et al.,
arXiv 2412.19098); any named parameter of the backbone can take its place.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adaptive_merge.adapters.base import Adapter, stacked
from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.backbone import MergedBackbone

__all__ = ["Tint"]


class Tint(Adapter):
    """A per-task copy of one layer, which starts as the layer is.

    Args:
        layer: `"head"`: weight and bias of the task's head. Otherwise the name of a backbone parameter, such
            as `"proj"`; it starts at the merged value and then no longer follows the coefficients.
    """

    def __init__(self, layer: str = "head") -> None:
        super().__init__()
        self.layer = layer
        self.changes_tower = layer != "head"

    def create(self, backbone: MergedBackbone, heads: Mapping[str, Tensor]) -> None:
        if self.layer == "head":
            self.weight = stacked([heads[task] for task in self.tasks])
            self.bias = stacked([torch.zeros(len(heads[task])) for task in self.tasks])
            return
        known = backbone.task_vectors.names
        if self.layer not in known:
            near = did_you_mean(self.layer, known)
            raise InputError(f"there is no layer {self.layer!r} to tint: name 'head' or a backbone parameter{near}")
        self.weight = stacked([backbone.merge()[self.layer]] * len(self.tasks))

    def weights(self, task: str, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.layer == "head":
            return weights
        return {**weights, self.layer: self.weight[self.row(task)]}

    def logits(self, task: str, features: Tensor, logits: Tensor) -> Tensor:
        if self.layer != "head":
            return logits
        row = self.row(task)
        return torch.nn.functional.linear(features, self.weight[row], self.bias[row])
