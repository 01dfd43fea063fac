"""How a module is scored: one labelled batch of one task at a time, for each model that a run is compared by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import pytorch_lightning as pl
import torch
from torch import Tensor

from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.begin import Begun
from adaptive_merge.engine.model import AdaptedModel
from adaptive_merge.engine.scoring import TaskScore
from adaptive_merge.engine.teachers import FrozenViews
from adaptive_merge.engine.typed import ListOf
from adaptive_merge.engine.unknown import TaskName, predict
from adaptive_merge.engine.views import VIEWS, View
from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["CloseBank", "ScoredModule"]


class ScoredModule(pl.LightningModule):
    """The validation hooks of an `AdaptiveMerge`, and what it knows of stream and processes."""

    model: AdaptedModel
    experts: TaskVectors
    unseen: tuple[str, ...]
    views: FrozenViews
    scores: ListOf[TaskScore]
    begun: Begun | None
    recipe: str
    task: TaskName
    view: View = "adapted"
    _compares = False

    @property
    def tasks(self) -> tuple[str, ...]:
        """Task names, in the order of the bank."""
        return self.model.tasks

    @property
    def scored_tasks(self) -> tuple[str, ...]:
        """The merged tasks and the unseen ones, in the order of the experts."""
        return self.experts.tasks

    @property
    def scored_views(self) -> tuple[View, ...]:
        """What a run is compared by, in the order of scoring."""
        return VIEWS if self.begun is None else (*VIEWS[:2], "anchor", *VIEWS[2:])

    def on_validation_epoch_start(self) -> None:
        """Merge where all processes meet: they may have unequal numbers of batches."""
        self.views.prepare(self.view)

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """Count one labelled batch of one task, for the view in force."""
        task, adapted = batch["task"], self.view == "adapted"
        expert, source = None, self._source(batch["task"])
        if self.view == "individual":
            prediction = self.views.expert(task, batch, source)
        else:
            prediction = self.model(task, batch["image"], self.views.weights(self.view, task), adapted=adapted)
            if self._compares and self.view != "pretrained" and task in self.tasks and source is not None:
                expert = self.views.expert(task, batch, source)
        dict(zip(self.scored_tasks, self.scores))[task].update(prediction, batch["label"], expert)
        return {"features": prediction.features, "logits": prediction.logits}

    def on_validation_epoch_end(self) -> None:
        """Log `<view>/<task>/accuracy` and the mean over the merged tasks, and start the next count."""
        # The same tasks on every rank, also on one whose share of a task was empty: `compute` is collective.
        named = dict(zip(self.scored_tasks, self.scores))
        shown = [task for task in named if self._source(task) is not None] or list(named)
        counted = {task: values for task in shown if not (values := named[task].compute())["accuracy"].isnan()}
        found = {f"{task}/{name}": value for task, values in counted.items() for name, value in values.items()}
        for name, tasks in {"accuracy": self.tasks, "accuracy_unseen": self.unseen}.items():
            accuracies = [found[f"{task}/accuracy"] for task in tasks if task in counted]
            found |= {name: torch.stack(accuracies).mean()} if accuracies else {}
        for key, value in found.items():
            # Loggers get the accuracies alone; the rest is for `results.json`.
            self.log(f"{self.view}/{key}", value, logger=None if "accuracy" in key.rsplit("/")[-1] else False)
        for score in self.scores:
            score.reset()
        self.views.release()

    @contextmanager
    def viewing(self, view: View) -> Iterator[Self]:
        """Validate one of the models; taken in order, what the experts said serves the later ones."""
        before, self.view, self._compares = self.view, view, True
        try:
            yield self
        finally:
            self.view, self._compares = before, False

    def predict(self, images: Tensor, task: str | None = None) -> tuple[list[str], list[Tensor]]:
        """The task and the predicted classes of each image, in evaluation mode.

        Args:
            images: [B, …].
            task: of all images; None: the route says it, image by image.

        Raises:
            InputError: no task for a model without a route, or with adapters that need it.
        """
        return predict(self.model, images.to(self.model.backbone.device), task, self.recipe)

    @property
    def _stream(self) -> TaskStream | None:
        """The trainer's data module, where it is a stream of ours."""
        data = getattr(self._trainer, "datamodule", None)
        return data if isinstance(data, TaskStream) else None

    @property
    def _processes(self) -> int:
        return self._trainer.world_size if self._trainer else 1

    def _owns_tasks(self) -> bool:
        """Whether each process takes whole tasks."""
        return self._processes > 1 and self._stream is not None and self._stream.share == "tasks"

    def _mean_over_ranks(self, value: Tensor) -> Tensor:
        many = self._processes > 1
        return self.trainer.strategy.reduce(value.detach(), reduce_op="mean") if many else value.detach()

    def _source(self, task: str) -> Any:
        """The images that a batch's indices point into; None in a loop without a TaskStream."""
        return self._stream.images.get(task) if self._stream else None


class CloseBank(pl.Callback):
    """After an error a process merges alone again: it may have something to save."""

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if isinstance(pl_module, ScoredModule):
            pl_module.model.backbone.placement.close()
