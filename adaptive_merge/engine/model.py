"""The adapted model: one merged backbone for all tasks, each task's adapters and frozen head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaptive_merge.adapters.base import Adapter
from adaptive_merge.engine.typed import ListOf
from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.objectives.base import Prediction

__all__ = ["AdaptedModel"]


class AdaptedModel(nn.Module):
    """Images of a task in, the task's prediction out.

    A head is the weight [C, d] of a CLIP zero-shot classifier, logit scale included: logits are the cosine of
    feature and class embedding times the scale. Heads are frozen and, like the bank, outside `state_dict`.

    Args:
        backbone: the merged backbone.
        heads: task → weight [C, d].
        adapters: applied in order; bound to backbone and heads here.
        unseen: tasks that are not in the bank: merged weights and their own heads serve them, no adapter does.
    """

    def __init__(
        self,
        backbone: MergedBackbone,
        heads: Mapping[str, Tensor],
        adapters: Sequence[Adapter] = (),
        unseen: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tasks = backbone.task_vectors.tasks
        known = (*self.tasks, *unseen)
        _check_heads(heads, known, getattr(backbone.skeleton, "output_dim", None))
        self.heads = {task: heads[task].detach().float() for task in known}
        self.adapters: ListOf[Adapter] = ListOf(adapter.bind(backbone, self.heads) for adapter in adapters)

    @property
    def shares_tower(self) -> bool:
        """Whether all tasks see the same tower, so that one forward can serve them together."""
        return not any(adapter.changes_tower for adapter in self.adapters)

    def forward(
        self,
        task: str,
        images: Tensor | None,
        weights: Mapping[str, Tensor] | None = None,
        features: Tensor | None = None,
        adapted: bool = True,
        blocks: bool = False,
    ) -> Prediction:
        """Predict a batch of one task.

        Args:
            task: whose adapters and head to use.
            images: [B, …]; not looked at where `features` are given.
            weights: merged parameters; default: those of now.
            features: [B, d] of the shared tower, where they are known already.
            adapted: False leaves the adapters out.
            blocks: also give the mean token after each block.
        """
        adapters = tuple(self.adapters) if adapted and task in self.tasks else ()
        means: list[Tensor] = []
        if features is None:
            weights = self.backbone.merge() if weights is None else weights
            for adapter in adapters:
                weights = adapter.weights(task, weights)
            edits = self._edits(task, adapters, means) if blocks or not (self.shares_tower or not adapted) else {}
            features = self.backbone(images, weights, edits)
            means = [mean[: len(features)] for mean in means]
        return self._classify(task, features, adapters, tuple(means))

    def _classify(
        self, task: str, features: Tensor, adapters: Sequence[Adapter], means: tuple[Tensor, ...]
    ) -> Prediction:
        if task not in self.heads:
            raise InputError(f"there is no head for task {task!r}{did_you_mean(str(task), self.heads)}")
        # In float32 whatever the tower ran in: logits are cosines times 100.
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            for adapter in adapters:
                features = adapter.features(task, features)
            unit = F.normalize(features, dim=-1)
            logits = unit @ self.heads[task].T
            for adapter in adapters:
                logits = adapter.logits(task, unit, logits)
        return Prediction(features, logits, means)

    def _edits(self, task: str, adapters: Sequence[Adapter], means: list[Tensor]) -> dict[str, Any]:
        """Block name → what happens to its output: the adapters in order, then its mean token is noted."""

        def edit(index: int, tokens: Tensor) -> Tensor:
            with torch.autocast(tokens.device.type, enabled=False):
                edited = tokens.float()
                for adapter in adapters:
                    edited = adapter.block(task, index, edited)
                means.append(edited.mean(1) if edited.dim() == 3 else edited)
            return edited.to(tokens.dtype)

        return {
            name: (lambda tokens, index=index: edit(index, tokens)) for index, name in enumerate(self.backbone.blocks)
        }

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedModel:
        super()._apply(fn, recurse)
        device = self.backbone.device
        self.heads = {task: head.to(device) for task, head in self.heads.items()}
        return self


def _check_heads(heads: Mapping[str, Tensor], tasks: tuple[str, ...], width: int | None) -> None:
    """One finite head [C, width] per task; the first head says the width where the backbone does not."""
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
