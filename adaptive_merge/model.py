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
        check_heads(heads, self.tasks, getattr(backbone.skeleton, "output_dim", None))
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


def check_heads(heads: Mapping[str, Tensor], tasks: tuple[str, ...], width: int | None = None) -> None:
    """Raise InputError unless there is one finite head [C, width] per task.

    Args:
        heads: task → weight [C, d].
        tasks: the tasks that need one.
        width: features of the backbone, where it says so (`output_dim`, as open_clip's towers do).
    """
    for task in tasks:
        if task not in heads:
            raise InputError(f"task {task!r} has an expert but no head; give heads for {', '.join(tasks)}")
        head = heads[task]
        width = head.shape[-1] if width is None else width
        if head.dim() != 2 or head.shape[1] != width:
            raise InputError(
                f"the head of task {task!r} has shape {tuple(head.shape)}, expected [classes, {width}]: "
                f"the backbone gives {width} features; build the head with this model's text tower"
            )
        if not torch.isfinite(head).all():
            raise InputError(f"the head of task {task!r} holds NaN or infinite values; build it again")
