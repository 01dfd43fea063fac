"""Tinting: each task has its own copy of one layer, trained jointly with the coefficients.

By default the layer is the task's classification head, as in the released code of Model Tinting (Jung et al.,
arXiv 2412.19098); any named parameter of the backbone can take its place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from adaptive_merge.adapters.base import Adapter, stacked
from adaptive_merge.adapters.heads import Head
from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.backbone import MergedBackbone

__all__ = ["Tint"]


class Tint(Adapter):
    """A per-task copy of one layer, which starts as the layer is.

    Args:
        layer: `"head"`: all parameters of the task's head; a linear one without a bias gets one of zeros. Otherwise
            the name of a backbone parameter, such as `"proj"`; it starts at the merged value and then no longer
            follows the coefficients.
    """

    def __init__(self, layer: str = "head") -> None:
        super().__init__()
        self.layer = layer
        self.changes_tower = layer != "head"
        self._heads: dict[str, Head] = {}

    def create(self, backbone: MergedBackbone, heads: Mapping[str, Head]) -> None:
        if self.layer == "head":
            self._copy({task: heads[task].tintable() for task in self.tasks})
            return
        known = backbone.task_vectors.names
        if self.layer not in known:
            near = did_you_mean(self.layer, known)
            raise InputError(f"there is no layer {self.layer!r} to tint: name 'head' or a backbone parameter{near}")
        self.weight = stacked([backbone.merge()[self.layer]] * len(self.tasks))

    def _copy(self, heads: dict[str, Head]) -> None:
        """One list per parameter of the heads, such as `weight`; the heads say what to compute with them."""
        self._heads = heads
        names = [[name for name, _ in head.named_parameters()] for head in heads.values()]
        if not names[0] or any(other != names[0] for other in names):
            raise InputError(f"tinted heads need the same parameters in all tasks, at least one; they have {names}")
        for name in names[0]:
            copies = stacked([head.get_parameter(name) for head in heads.values()])
            setattr(self, _attribute(name), copies)

    def _own(self, task: str) -> dict[str, Tensor]:
        """The parameters of the task's tinted head by name."""
        row = self.row(task)
        return {name: getattr(self, _attribute(name))[row] for name, _ in self._heads[task].named_parameters()}

    def weights(self, task: str, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if self.layer == "head":
            return weights
        return {**weights, self.layer: self.weight[self.row(task)]}

    def logits(self, task: str, features: Tensor, logits: Tensor) -> Tensor:
        if self.layer != "head":
            return logits
        own = self._own(task)
        return functional_call(self._heads[task], own, (features,))

    def fold(self, task: str, weights: Mapping[str, Tensor], head: Head) -> tuple[Mapping[str, Tensor], Head]:
        """The layer in the tower's weights, or a head with the tinted parameters."""
        if self.layer != "head":
            return self.weights(task, weights), head
        tinted = copy.deepcopy(self._heads[task])
        tinted.load_state_dict(self._own(task), strict=False)
        return weights, tinted

    def _apply(self, fn: Any, recurse: bool = True) -> Tint:
        super()._apply(fn, recurse)
        for head in self._heads.values():  # buffers of a user's head; the tinted parameters take the others' place
            head.to(fn(torch.empty(0)).device)
        return self


def _attribute(name: str) -> str:
    """A parameter's name as an attribute: those of nested modules have dots."""
    return name.replace(".", "__")
