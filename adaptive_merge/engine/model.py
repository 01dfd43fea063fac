"""The adapted model: one merged backbone for all tasks, each task's adapters and frozen head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_merge.adapters.base import Adapter
from adaptive_merge.adapters.heads import HeadLike, check_width, frozen_heads, warn_of_scales
from adaptive_merge.adapters.route import Route
from adaptive_merge.engine.typed import ListOf
from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.backbone import MergedBackbone
from adaptive_merge.merge.edits import Edit, Instead
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.objectives.base import Prediction

__all__ = ["AdaptedModel"]

Means = list[Tensor] | None


class AdaptedModel(nn.Module):
    """Images of a task in, the task's prediction out.

    Heads are frozen and, like the bank, outside `state_dict`.

    Args:
        backbone: the merged backbone.
        heads: task → head; a tensor [C, d] is the weight of a CLIP zero-shot classifier, logit scale included.
        adapters: applied in order; bound to backbone and heads here.
        unseen: tasks that are not in the bank: merged weights and their own heads serve them, no adapter does.
    """

    def __init__(
        self,
        backbone: MergedBackbone,
        heads: Mapping[str, HeadLike],
        adapters: Sequence[Adapter] = (),
        unseen: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.tasks = backbone.task_vectors.tasks
        # In a plain dict they are no submodules, so that no checkpoint holds them.
        self.heads = frozen_heads(heads, (*self.tasks, *unseen), getattr(backbone.skeleton, "output_dim", None))
        warn_of_scales(self.heads)
        self.adapters: ListOf[Adapter] = ListOf(adapter.bind(backbone, self.heads) for adapter in adapters)

    def rebase(self, task_vectors: TaskVectors) -> None:
        """Go on from another bank at its θ₀; adapters are made anew, for a tinted layer starts at the merged one."""
        self.backbone.rebase(task_vectors)
        for adapter in self.adapters:
            adapter.bind(self.backbone, self.heads)

    @property
    def shares_tower(self) -> bool:
        """Whether all tasks see the same tower, so that one forward can serve them together."""
        return not any(adapter.changes_tower and adapter.needs_task for adapter in self.adapters)

    @property
    def route(self) -> Route | None:
        """The adapter that says which task an image is of; None: there is none."""
        return next((adapter for adapter in self.adapters if isinstance(adapter, Route)), None)

    @property
    def plain_tower(self) -> bool:
        """Whether the tower is the merged backbone and nothing else, so that a fixed merge has fixed features."""
        return not any(adapter.changes_tower for adapter in self.adapters)

    def forward(
        self,
        task: str,
        images: Tensor | None,
        weights: Mapping[str, Tensor] | None = None,
        features: Tensor | None = None,
        adapted: bool = True,
        blocks: bool = False,
        scores: Tensor | None = None,
    ) -> Prediction:
        """Predict a batch of one task.

        Args:
            task: whose adapters and head to use.
            images: [B, …]; not looked at where `features` are given.
            weights: merged parameters; default: those of now.
            features: [B, d] of the shared tower, where they are known already.
            adapted: False leaves the adapters out.
            blocks: also give the mean token after each block.
            scores: [B, T] of the route, where `features` are given.
        """
        adapters = tuple(self.adapters) if adapted and task in self.tasks else ()
        means: list[Tensor] = []
        if features is None:
            features = self._features(task, images, weights, adapters, means if blocks else None)
            scores = self.scores(features.shape[0]) if adapters else None
        prediction = self._classify(task, features, adapters, tuple(mean[: features.shape[0]] for mean in means))
        return replace(prediction, scores=scores, row=self.tasks.index(task)) if adapters else prediction

    def scores(self, images: int) -> Tensor | None:
        """The route's scores [B, T] of the images that ran last; of none, towers are given one nevertheless."""
        return None if self.route is None else self.route.scores()[:images]

    def shared_features(
        self, images: Tensor, weights: Mapping[str, Tensor] | None = None, adapted: bool = True
    ) -> Tensor:
        """Features [B, d] of any tasks' images in one forward, with what adapts the tower alike for all tasks.

        They are the model's features where `shares_tower` is true.

        Args:
            images: [B, …].
            weights: merged parameters; default: those of now.
            adapted: False leaves the adapters out.
        """
        adapters = [adapter for adapter in self.adapters if adapted and not adapter.needs_task]
        return self._features(None, images, weights, adapters, None)

    def merged_state_dict(self, task: str | None) -> dict[str, Tensor]:
        """The merged weights as plain tensors; with a task, as its adapters change them."""
        merged = self.backbone.merged_state_dict()
        if task is None:
            return merged
        for adapter in self.adapters:
            merged = {name: value.detach().clone() for name, value in adapter.weights(task, merged).items()}
        return merged

    def _features(
        self,
        task: str | None,
        images: Tensor | None,
        weights: Mapping[str, Tensor] | None,
        adapters: Sequence[Adapter],
        means: Means,
    ) -> Tensor:
        weights = self.backbone.merge() if weights is None else weights
        for adapter in adapters:
            if images is not None:
                adapter.look(self.backbone, images, weights)
            weights = adapter.weights(_subject(adapter, task), weights)
        return self.backbone(images, weights, self._edits(task, adapters, weights, means))

    def _classify(
        self, task: str, features: Tensor, adapters: Sequence[Adapter], means: tuple[Tensor, ...]
    ) -> Prediction:
        if task not in self.heads:
            raise InputError(f"there is no head for task {task!r}{did_you_mean(str(task), self.heads)}")
        # In float32 whatever the tower ran in: logits are cosines times 100.
        check_width(task, self.heads[task], features.shape[-1])
        with _no_autocast(features):
            features = features.float()
            for adapter in adapters:
                features = adapter.features(task, features)
            seen = self.heads[task].seen(features)
            logits = self.heads[task].logits(seen)
            for adapter in adapters:
                logits = adapter.logits(task, seen, logits)
        return Prediction(features, logits, means)

    def _edits(
        self, task: str | None, adapters: Sequence[Adapter], weights: Mapping[str, Tensor], means: Means
    ) -> list[tuple[str, Edit]]:
        """Submodule and what happens to its output, in order: sites, then blocks, whose mean tokens are then noted."""
        edits: list[tuple[str, Edit]] = []
        for adapter in adapters:
            for name, site in adapter.sites(self.backbone, weights).items():
                edit = partial(site, _subject(adapter, task))
                edits.append((name, Instead(edit) if adapter.replaces else edit))
        operating = [adapter for adapter in adapters if adapter.overrides("block")]
        if operating or means is not None:
            blocks = enumerate(self.backbone.blocks)
            edits += [(name, partial(_edit_block, task, operating, means, index)) for index, name in blocks]
        return edits

    def _apply(self, fn: Any, recurse: bool = True) -> AdaptedModel:
        super()._apply(fn, recurse)
        for head in self.heads.values():
            head.to(self.backbone.device)
        return self


def _subject(adapter: Adapter, task: str | None) -> Any:
    """The task, as far as the adapter's part in the tower is to know it."""
    return task if adapter.needs_task else None


def _edit_block(
    task: str | None, adapters: Sequence[Adapter], means: Means, index: int, _: Tensor | None, output: Any
) -> Any:
    tokens, *others = output if isinstance(output, tuple) else (output,)
    if tokens.dim() > 3:
        raise InputError(
            f"block {index} gives maps of shape {tuple(tokens.shape)}; what is done to blocks needs tokens [B, N, d], "
            "as vision transformers have them"
        )
    with _no_autocast(tokens):
        edited = tokens.float()
        for adapter in adapters:
            edited = adapter.block(_subject(adapter, task), index, edited)
        if means is not None:
            means.append(edited.mean(1) if edited.dim() == 3 else edited)
    edited = edited.to(tokens.dtype)
    return (edited, *others) if isinstance(output, tuple) else edited


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Nothing where autocast is off: exporters of graphs cannot trace the context."""
    kind = tensor.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()
