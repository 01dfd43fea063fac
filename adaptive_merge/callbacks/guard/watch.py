"""`Watch`: what the merged model and its start say about a few images of every task, over all processes."""

from __future__ import annotations

from collections.abc import Mapping

import pytorch_lightning as pl
import torch
from torch import Tensor

from adaptive_merge.callbacks.guard.collapse import Signals, sums
from adaptive_merge.callbacks.safe.ranks import Ranks
from adaptive_merge.engine.frozen import FrozenOutputs
from adaptive_merge.engine.teachers import FrozenViews
from adaptive_merge.engine.views import View

__all__ = ["Watch"]


class Watch:
    """Forward passes for the guard: no gradient, no random number, no label.

    What frozen networks say is kept here and not in the module's cache: the last bits of an image's features depend
    on the images that it was run with, and a run is to learn the same bits with a guard and without.

    Args:
        module: whose model is watched.
        ranks: the processes, which share the images.
        images: of each task.
    """

    def __init__(self, module: pl.LightningModule, ranks: Ranks, images: int) -> None:
        self.ranks, self.images = ranks, images
        self._views = FrozenViews(module.model, module.experts, FrozenOutputs())
        self._views.initial = module.views.initial
        self._index: dict[str, Tensor] = {}
        self.start: dict[str, Signals] = {}

    @torch.no_grad()
    def compare(self, trainer: pl.Trainer, module: pl.LightningModule) -> tuple[dict[str, Signals], dict[str, Signals]]:
        """Task → signals of the model and of the start on the same images; empty where there are no images yet."""
        stream, world = trainer.datamodule, trainer.world_size
        if not hasattr(stream, "watched"):
            return {}, {}
        found = {task: stream.watched(task, self.images, trainer.global_step) for task in module.tasks}
        index = {task: places for task, places in found.items() if len(places)}
        if not index:
            return {}, {}
        parts = {}
        for task, places in index.items():
            mine = places[trainer.global_rank :: world]
            parts[task] = {"image": stream.images[task].take(mine).to(module.device), "index": mine.to(module.device)}
        # Only where all processes do: with a bank that is shared out, every merge is the work of all.
        if any(not torch.equal(places, self._index.get(task, places[:0])) for task, places in index.items()):
            self.start = self._signals(trainer, module, parts, "initial")
            self._index = index
        now = self._signals(trainer, module, parts, "adapted")
        self._views.release()
        return now, self.start

    def _signals(
        self, trainer: pl.Trainer, module: pl.LightningModule, parts: Mapping[str, dict[str, Tensor]], view: View
    ) -> dict[str, Signals]:
        width = max(module.model.heads[task].classes for task in parts)
        with trainer.precision_plugin.forward_context():
            known = self._features(trainer, module, parts, view)
            rows = []
            for task, part in parts.items():
                weights = None if known[task] is not None else self._views.weights(view, task)
                # Adapters start as the identity.
                options = {"weights": weights, "features": known[task], "adapted": view == "adapted"}
                prediction = module.model(task, part["image"], **options)
                expert = self._views.expert(task, part, trainer.datamodule.images[task])
                rows.append(sums(prediction, expert, width, module.model.heads[task].predict))
        total = self.ranks.gather(torch.stack(rows)).sum(0)
        return {task: Signals.of(row, module.model.heads[task].classes) for task, row in zip(parts, total)}

    def _features(
        self, trainer: pl.Trainer, module: pl.LightningModule, parts: Mapping[str, dict[str, Tensor]], view: View
    ) -> dict[str, Tensor | None]:
        """The shared tower's features, where a frozen tower's are kept or one forward can serve all tasks."""
        if view == "adapted" or not module.rule_parameters:
            images = trainer.datamodule.images
            known = {task: self._views.features(task, part, images[task]) for task, part in parts.items()}
            if all(features is not None for features in known.values()):
                return known
        at_once = module.accumulate == "joint" or (module.accumulate == "auto" and module.device.type == "cuda")
        if not at_once or (view == "adapted" and not module.model.shares_tower):
            return dict.fromkeys(parts)
        weights = self._views.weights(view, next(iter(parts)))
        images = torch.cat([part["image"] for part in parts.values()])
        features = module.model.shared_features(images, weights, adapted=view == "adapted")
        return dict(zip(parts, features.split([len(part["image"]) for part in parts.values()])))
