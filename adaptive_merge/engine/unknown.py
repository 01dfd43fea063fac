"""Predictions without the task's name: a route says which task an image is of, and that task's head classifies it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from adaptive_merge.adapters.route import Route
from adaptive_merge.data.protocols import Protocol
from adaptive_merge.engine.model import AdaptedModel
from adaptive_merge.errors import InputError

__all__ = ["TaskName", "check_protocol", "check_task_name", "predict"]

TaskName = Literal["known", "unknown"]


def check_task_name(task: TaskName, model: AdaptedModel, recipe: str) -> TaskName:
    """`task` itself.

    Raises:
        InputError: neither `"known"` nor `"unknown"`, or unknown to a model that needs it.
    """
    if task not in ("known", "unknown"):
        raise InputError(f"task is 'known' (each image comes with its task's name) or 'unknown', got {task!r}")
    if task == "unknown":
        check_routed(model, recipe)
    return task


def check_routed(model: AdaptedModel, recipe: str) -> Route:
    """The model's route; InputError where the model cannot predict without the task's name."""
    route = model.route
    if route is None:
        raise InputError(
            f"recipe {recipe!r} needs the task's name to predict: it has no route that would pick the head; add one, "
            "such as WEMoE or MASS, or leave the task known (--model.task known)"
        )
    needing = [type(one).__name__ for one in model.adapters if one.changes_tower and one.needs_task]
    if needing:
        raise InputError(
            f"recipe {recipe!r} needs the task's name to predict: its {needing[0]} changes the tower task by task, "
            "before a route has seen the image; leave it out, or leave the task known (--model.task known)"
        )
    return route


def check_protocol(protocol: Protocol) -> None:
    """InputError where a protocol's numbers are not those of a route."""
    if protocol.one_pass or protocol.unseen:
        raise InputError(
            f"with the task unknown, the protocol {protocol.name!r} cannot be scored: a single pass notes what the "
            "known task's head says, and no route leads to a task that is left out; choose Transductive or Holdout, or "
            "leave the task known (--model.task known)"
        )


@torch.no_grad()
def predict(model: AdaptedModel, images: Tensor, task: str | None, recipe: str) -> tuple[list[str], list[Tensor]]:
    """The task of each image, and what its head says: [k] for a head of k units an image.

    Args:
        model: the adapted model.
        images: [B, …].
        task: of all images; None: an image's own, by the route.
        recipe: for the message.
    """
    if task is not None:
        named = [task] * len(images)
        return named, _units(model.heads[task].predict(model(task, images).logits), len(images))
    route = check_routed(model, recipe)
    features = model.shared_features(images)
    chosen = route.scores()[: len(images)].argmax(1).tolist()
    classes: list[Tensor] = [features] * len(images)
    for row in set(chosen):
        places = [place for place, own in enumerate(chosen) if own == row]
        one = model.tasks[row]
        predictions = model.heads[one].predict(model(one, None, features=features[places]).logits)
        for place, units in zip(places, _units(predictions, len(places)), strict=True):
            classes[place] = units
    return [model.tasks[row] for row in chosen], classes


def _units(predicted: Tensor, images: int) -> list[Tensor]:
    return list(predicted.view(images, -1)) if images else []
