"""How a module is scored: one labelled batch of one task at a time, for each model that a run is compared by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Self

import pytorch_lightning as pl
import torch
from torch import Tensor

from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.begin import Begun
from adaptive_merge.engine.model import AdaptedModel
from adaptive_merge.engine.scoring import TaskScore
from adaptive_merge.engine.teachers import FrozenViews
from adaptive_merge.engine.typed import ListOf
from adaptive_merge.engine.unknown import TaskName, check_protocol, predict
from adaptive_merge.engine.views import VIEWS, View
from adaptive_merge.errors import InputError
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.schedule import Stage

__all__ = ["Measure", "ScoredModule"]

Measure = Literal["accuracy", "agreement"]


class ScoredModule(pl.LightningModule):
    """The validation hooks of an `AdaptiveMerge`, and what it knows of stream and processes."""

    model: AdaptedModel
    experts: TaskVectors
    unseen: tuple[str, ...]
    views: FrozenViews
    scores: ListOf[TaskScore]
    begun: Begun | None
    stages: Sequence[Stage]
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
        """Count one batch of one task, for the view in force: against labels, and against the task's expert."""
        task, adapted = batch["task"], self.view == "adapted"
        expert, source = None, self._source(batch["task"])
        if self.view == "individual":
            prediction = self.views.expert(task, batch, source)
            expert = prediction if self.measure == "agreement" else None
        else:
            prediction = self.model(task, batch["image"], self.views.weights(self.view, task), adapted=adapted)
            if self.measure == "agreement" or (self._compares and self._merged(task) and source is not None):
                expert = self.views.expert(task, batch, source)
        dict(zip(self.scored_tasks, self.scores))[task].update(prediction, batch.get("label"), expert)
        return {"features": prediction.features, "logits": prediction.logits}

    def _merged(self, task: str) -> bool:
        """Whether the view in force is a merge that this task has a part in."""
        return self.view != "pretrained" and task in self.tasks

    @property
    def measure(self) -> Measure:
        """What views are compared by: accuracy, or agreement with the experts where images have no labels."""
        images = self._stream.images.values() if self._stream else ()
        return "agreement" if any(source.labels is None for source in images) else "accuracy"

    def on_validation_epoch_end(self) -> None:
        """Log `<view>/<task>/<measure>` and the mean over the merged tasks, and start the next count."""
        # The same tasks on every rank, also on one whose share of a task was empty: `compute` is collective.
        named = dict(zip(self.scored_tasks, self.scores))
        shown = [task for task in named if self._source(task) is not None] or list(named)
        counts = {task: self._counted(task, named[task]) for task in shown}
        counted = {task: values for task, values in counts.items() if self.measure in values}
        metrics = {f"{task}/{name}": value for task, values in counted.items() for name, value in values.items()}
        for name, tasks in {self.measure: self.tasks, f"{self.measure}_unseen": self.unseen}.items():
            means = [metrics[f"{task}/{self.measure}"] for task in tasks if task in counted]
            metrics |= {name: torch.stack(means).mean()} if means else {}
        for key, value in metrics.items():
            # Loggers get what views are compared by; the rest is for `results.json`.
            self.log(f"{self.view}/{key}", value, logger=None if self.measure in key.rsplit("/")[-1] else False)
        for score in self.scores:
            score.reset()
        self.views.release()

    def _counted(self, task: str, score: TaskScore) -> dict[str, Tensor]:
        try:
            return score.compute()
        except InputError as error:
            raise InputError(f"task {task!r}, model {self.view!r}: {error}") from error

    def on_predict_epoch_start(self) -> None:
        """Merge where all processes meet, as in validation."""
        self.views.prepare("adapted")

    def predict_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """What the adapted model says about a batch of one task; nothing of it is a label.

        Returns:
            "task"; "index" of the batch, where it has one; "predicted" [U], the class, and "confidence" [U], the
            probability that the head gives it.
        """
        task = batch["task"]
        logits = self.model(task, batch["image"], self.views.weights("adapted", task)).logits
        confidence = logits.float().softmax(-1).amax(-1)
        output = {"task": task, "predicted": self.model.heads[task].predict(logits), "confidence": confidence}
        return output | ({"index": batch["index"]} if "index" in batch else {})

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

    def _check_stream(self) -> None:
        """InputError where the stream does not fit what is merged, or what a step asks for."""
        stream = self._stream
        if stream and set(stream.protocol.unseen) != set(self.unseen):
            left_out = [list(stream.protocol.unseen), list(self.unseen)]
            raise InputError("the protocol leaves out {}, the module {}; give both the same tasks".format(*left_out))
        if stream and self.task == "unknown":
            check_protocol(stream.protocol)
        balanced = any(stage.objective.smooth_maximum is not None for stage in self.stages)
        if stream and balanced and stream.schedule == "shuffled":
            raise InputError(
                "an objective that balances tasks needs all of them in a step, and a shuffled schedule has one task a "
                "step; set data.schedule to joint"
            )

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
