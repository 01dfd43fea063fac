"""The adapted model: one merged backbone for all tasks, and each task's frozen head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge import MergedBackbone
from adaptive_merge.objectives import Prediction

__all__ = ["AdaptedModel", "check_heads"]


class AdaptedModel(nn.Module):
    """Images of a task in, the task's prediction out.

    A head is the weight [C, d] of a CLIP zero-shot classifier, logit scale included: logits are the cosine of
    feature and class embedding times the scale. Heads are frozen and, like the bank, outside `state_dict`.

    Args:
        backbone: the merged backbone.
        heads: task → weight [C, d].
    """

    def __init__(self, backbone: MergedBackbone, heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.backbone = backbone
        self.tasks = backbone.task_vectors.tasks
        check_heads(heads, self.tasks)
        self.__dict__["heads"] = {task: heads[task].detach().float() for task in self.tasks}

    def forward(self, task: str, images: Tensor, weights: Mapping[str, Tensor] | None = None) -> Prediction:
        """Predict a batch of one task; `weights` are merged parameters, by default those of now."""
        return self.classify(task, self.backbone(images, weights))

    def classify(self, task: str, features: Tensor) -> Prediction:
        """The prediction from backbone features [B, d]; in float32 whatever the tower ran in."""
        if task not in self.heads:
            raise InputError(f"there is no head for task {task!r}{did_you_mean(task, self.heads)}")
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            logits = F.normalize(features, dim=-1) @ self.heads[task].T
        return Prediction(features, logits)

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedModel:
        super()._apply(fn, recurse)
        device = self.backbone.task_vectors.device
        self.__dict__["heads"] = {task: head.to(device) for task, head in self.heads.items()}
        return self


def check_heads(heads: Mapping[str, Tensor], tasks: tuple[str, ...]) -> None:
    """Raise InputError unless there is one two-dimensional finite head per task."""
    for task in tasks:
        if task not in heads:
            raise InputError(f"task {task!r} has an expert but no head; give heads for {', '.join(tasks)}")
        head = heads[task]
        if head.dim() != 2 or not torch.isfinite(head).all():
            raise InputError(f"the head of task {task!r} must be a finite matrix [classes, features], "
                             f"got shape {tuple(head.shape)}{'' if head.isfinite().all() else ' with NaN or infinite values'}")
    widths = {task: heads[task].shape[1] for task in tasks}
    for task, width in widths.items():
        if width != widths[tasks[0]]:
            raise InputError(f"the head of task {task!r} takes {width} features, that of {tasks[0]!r} takes {widths[tasks[0]]}; "
                             "all heads read the same backbone")
