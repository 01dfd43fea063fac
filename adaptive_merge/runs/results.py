"""What a run bought: accuracies of four models per task, as `results.json` and as a table for people."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from adaptive_merge.data.stream import TaskStream
from adaptive_merge.engine.identity import settings
from adaptive_merge.engine.module import AdaptiveMerge
from adaptive_merge.engine.scoring import CRITERIA
from adaptive_merge.engine.views import ROUTED, VIEWS, gain, percent
from adaptive_merge.errors import printable
from adaptive_merge.runs.online import prequential
from adaptive_merge.runs.record import MEASURES

__all__ = [
    "MOST_WARNINGS",
    "SCHEMA",
    "evaluate",
    "footing",
    "gains",
    "peak_memory",
    "score",
    "summary",
    "table",
    "uses_labels",
]

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


def table(results: Mapping[str, Any]) -> Table:
    """Accuracies, or agreements, in percent, a row per task, and the gain over the merge that the run started from."""
    chosen = " (ORACLE: labels chose the step)" if uses_labels(results) else ""
    measure = MEASURES[results.get("measure", "accuracy")]
    title = f"{_shown(results['recipe'])}: {measure} in %{chosen}"
    view = Table(title=title, title_justify="left", caption=_made(results), caption_justify="left")
    view.add_column("task")
    started = "anchor" in results["average"]
    for name in ("pre-trained", "individual", "merged", *(["start"] * started), "adapted", "gain"):
        view.add_column(name, justify="right")
    routing = results.get("routing") or None
    for name in ("task found", "task known", "task unknown") if routing else ():
        view.add_column(name, justify="right")
    unseen = results.get("unseen", {"tasks": []})
    for task, row in results["tasks"].items():
        name = f"{task} (unseen)" if task in unseen["tasks"] else task
        view.add_row(_shown(name), *_cells(row), *_routed_cells(routing, task))
    view.add_section()
    view.add_row("average", *_cells(results["average"]), *_routed_cells(routing), style="bold")
    if unseen["tasks"]:
        view.add_row("average of the unseen", *_cells(unseen["average"]), style="bold")
    return view


def _made(results: Mapping[str, Any]) -> str | None:
    """What a run without steps is, in words."""
    if results.get("steps"):
        return None
    began = "the start is all there is" if results.get("start") else "the merge as it was made"
    return f"A static recipe, no step, nothing was trained: “adapted” is {began}."


def uses_labels(results: Mapping[str, Any]) -> bool:
    """Whether labels had a part in what was learned or kept."""
    return results.get("guard", {}).get("select") == "oracle"


def gains(results: Mapping[str, Any]) -> str:
    """What was gained by what, in points of the mean accuracy, in one line; empty where nothing could be gained."""
    average = results["average"]
    merged = average.get("anchor", average["initial"])
    parts = [f"{gain(average['initial'], merged):+.1f} by the start"] if "anchor" in average else []
    parts += [f"{gain(average['adapted'], average['initial']):+.1f} by adaptation"] if results["steps"] else []
    if not parts or results.get("measure", "accuracy") != "accuracy":
        return ""
    ends = f"{percent(average['adapted']):.1f} %, the experts {percent(average['individual']):.1f} %"
    return f"{percent(merged):.1f} % merged, {', '.join(parts)}: {ends}"


def footing(results: Mapping[str, Any]) -> str:
    """The protocol in a few words: what was adapted on, what was scored."""
    protocol = results["protocol"]
    adapted, scored = (sum(protocol[part].values()) for part in ("adapted_on", "scored_on"))
    words = ", each predicted before it was used" if results.get("online") else ""
    if corruption := results.get("corruption"):
        words += f"; {corruption['kind']}, severity {corruption['severity']}"
    words += "; the task unknown" * (results.get("routing", {}).get("task") == "unknown")
    return f"protocol {protocol['name']}: adapted on {adapted:,} images, scored on {scored:,}{words}"


def peak_memory() -> int:
    """Bytes: the device's peak on CUDA, else the largest resident size of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cells(row: Mapping[str, float]) -> list[str]:
    """The gain is over the static merge: of a start and of the steps together."""
    gained = gain(row["adapted"], row.get("anchor", row["initial"]))
    shown = [view for view in (*VIEWS[:2], "anchor", *VIEWS[2:]) if view in row]
    return [*(f"{percent(row[view]):.1f}" for view in shown), f"{gained:+.1f}"]


def _shown(name: str) -> str:
    """A name as rich shows it letter by letter."""
    return escape(printable(name))


def _routed_cells(routing: Mapping[str, Any] | None, task: str | None = None) -> list[str]:
    """How a route does on a task, or on average."""
    row = {} if routing is None else routing["average"] if task is None else routing["tasks"].get(task, {})
    return [f"{100 * row[name]:.1f}" for name in ROUTED if name in row]


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
