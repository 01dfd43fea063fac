"""What a run bought: accuracies of four models per task, as `results.json`."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.identity import settings
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.engine.scoring import CRITERIA
from adaptive_merge.engine.views import ROUTED
from adaptive_merge.runs.online import prequential

__all__ = ["MOST_WARNINGS", "SCHEMA", "evaluate", "peak_memory", "score", "summary"]

SCHEMA = 1
MOST_WARNINGS = 100  # of the guard, in its record
_PACKAGES = ("adaptive_merge", "torch", "torchvision", "pytorch-lightning", "open_clip_torch", "torchmetrics")


def evaluate(
    trainer: pl.Trainer, module: AdaptiveMerge, datamodule: pl.LightningDataModule
) -> dict[str, dict[str, dict[str, float]]]:
    """View → task → what `TaskScore` counts on the scored images, for all views of a module.

    `"pretrained"` is θ₀, `"individual"` each expert on its own task, `"anchor"` the static merge before a
    start, where there is one, `"initial"` the merge before the first step,
    `"adapted"` the module as it is now: after a single pass that is the final model, and `prequential` scores what it
    said on the way. Nothing is known of a task that the data do not hold.
    """
    found = {}
    for view in module.scored_views:
        with module.viewing(view):
            trainer.validate(module, datamodule=datamodule, verbose=False, weights_only=True)
        metrics = trainer.callback_metrics
        found[view] = {
            task: {
                name: float(metrics[key])
                for name in (
                    "accuracy",
                    "ece",
                    *CRITERIA,
                    *ROUTED,
                    *(f"gate {row}" for row in range(len(module.tasks))),
                )
                if (key := f"{view}/{task}/{name}") in metrics
            }
            for task in module.scored_tasks
        }
    return found


def score(
    trainer: pl.Trainer, module: AdaptiveMerge, datamodule: pl.LightningDataModule
) -> dict[str, dict[str, float]]:
    """View → task → accuracy in [0, 1] on the scored images, for all four views; see `evaluate`.

    Where images have no labels it is the agreement with the experts.
    """
    found = evaluate(trainer, module, datamodule)
    return {
        view: {task: values[module.measure] for task, values in tasks.items() if values}
        for view, tasks in found.items()
    }


def summary(
    module: AdaptiveMerge,
    evaluation: Mapping[str, Mapping[str, Mapping[str, float]]],
    stream: TaskStream,
    rows: Mapping[str, Mapping[str, Tensor]],
    *,
    steps: int,
    seconds: Mapping[str, float],
    guard: Mapping[str, Any] | None = None,
    notes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The content of `results.json`.

    Args:
        module: as it is now.
        evaluation: of `evaluate`.
        stream: the data of the run.
        rows: task → what the run noted of its images, see `Ledger`.
        steps: that were taken.
        seconds: part of the run → how long it took.
        guard: the guard's record.
        notes: checkpoint → what its reader had to say about it.
    """
    measure, labelled = module.measure, module.measure == "accuracy"
    scores = {view: {task: row[measure] for task, row in tasks.items()} for view, tasks in evaluation.items()}
    found: dict[str, Any] = {"schema": SCHEMA, "recipe": module.recipe, "seed": stream.seed, "measure": measure}
    found["protocol"] = {
        "name": stream.protocol.name,
        "settings": {name: list(v) if isinstance(v, tuple) else v for name, v in settings(stream.protocol).items()},
        "adapted_on": {task: int(row["adapted"].sum()) for task, row in rows.items()},
        "scored_on": {task: int(row["scored"].sum()) for task, row in rows.items()},
    }
    if stream.corruption:
        found["corruption"] = settings(stream.corruption)
    if module.begun is not None:
        found["start"] = dict(module.begun.record)
    if labelled and stream.protocol.one_pass and (steps or module.begun is not None):
        passes = {
            task: prequential(rows[task], stream.images[task].labels, stream.draws.order(task)) for task in module.tasks
        }
        found["online"] = {"final": scores["adapted"], "tasks": {task: asdict(one) for task, one in passes.items()}}
        scores["adapted"] = {task: one.accuracy for task, one in passes.items()}
    if module.model.route is not None:
        found["routing"] = _routing(module, evaluation["adapted"])
    sizes = found["protocol"]["scored_on"]
    found["tasks"] = {
        task: {"n": sizes[task]} | {view: scores[view][task] for view in scores} for task in module.scored_tasks
    }
    found["average"] = _means(scores, module.tasks)
    if module.unseen:
        found["unseen"] = {"tasks": list(module.unseen), "average": _means(scores, module.unseen)}
    if kept := module.coefficients.kept():
        found["kept"] = kept
    # With the names a run folder is all that its predictions need.
    found["classes"] = {
        task: list(stream.images[task].classes) for task in module.scored_tasks if task in stream.images
    }
    return found | {
        "calibration": {
            view: {task: round(row["ece"], 6) for task, row in tasks.items()} for view, tasks in evaluation.items()
        }
        if labelled
        else {},
        "criteria": {view: _criteria(evaluation[view], module.tasks) for view in ("initial", "adapted")},
        "guard": dict(guard or {}),
        "notes": {source: list(own) for source, own in (notes or {}).items() if own},
        "steps": steps,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_bytes": peak_memory(),
        "trainable_parameters": sum(parameter.numel() for parameter in module.learned),
        "versions": {"python": sys.version.split()[0]} | {name: _version(name) for name in _PACKAGES},
        "experts": {task: module.experts.fingerprints[task] for task in module.scored_tasks},
    }


def peak_memory() -> int:
    """Bytes: the device's peak on CUDA, else the largest resident size of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _routing(module: AdaptiveMerge, rows: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Task → how often the route finds it, accuracy with the task known and unknown, mean score of each task."""
    tasks = {
        task: {name: rows[task][name] for name in ROUTED}
        | {"scores": [round(rows[task][f"gate {row}"], 6) for row in range(len(module.tasks))]}
        for task in module.tasks
        if "routing" in rows[task]
    }
    average = {name: sum(row[name] for row in tasks.values()) / max(len(tasks), 1) for name in ROUTED}
    return {"task": module.task, "tasks": tasks, "average": average}


def _means(scores: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> dict[str, float]:
    return {view: sum(values[task] for task in tasks) / len(tasks) for view, values in scores.items()}


def _criteria(evaluation: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> dict[str, float]:
    """Means over the tasks of what needs no labels."""
    known = [name for name in CRITERIA if all(name in evaluation[task] for task in tasks)]
    return {name: sum(evaluation[task][name] for task in tasks) / len(tasks) for name in known}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
