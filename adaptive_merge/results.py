"""What a run bought: accuracies of four models per task, as `results.json` and as a table for people."""

from __future__ import annotations

import importlib.metadata
import resource
import sys
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from rich.table import Table

from adaptive_merge.module import AdaptiveMerge
from adaptive_merge.views import VIEWS

__all__ = ["SCHEMA", "peak_memory", "score", "summary", "table"]

SCHEMA = 1
_PACKAGES = ("adaptive_merge", "torch", "torchvision", "pytorch-lightning", "open_clip_torch", "torchmetrics")


def score(
    trainer: pl.Trainer, module: AdaptiveMerge, datamodule: pl.LightningDataModule
) -> dict[str, dict[str, float]]:
    """View → task → top-1 accuracy in [0, 1] on the labelled images, for all four views of a module.

    `"pretrained"` is θ₀, `"individual"` each expert on its own task, `"initial"` the merge before adaptation,
    `"adapted"` the module as it is now.
    """
    scores = {}
    for view in VIEWS:
        with module.viewing(view):
            trainer.validate(module, datamodule=datamodule, verbose=False, weights_only=True)
        metrics = trainer.callback_metrics
        scores[view] = {task: float(metrics[f"{view}/{task}/accuracy"]) for task in module.tasks}
    return scores


def summary(
    module: AdaptiveMerge,
    scores: Mapping[str, Mapping[str, float]],
    *,
    seed: int,
    steps: int,
    seconds: Mapping[str, float],
    sizes: Mapping[str, int],
) -> dict[str, Any]:
    """The content of `results.json`; `sizes` is the number of scored images per task."""
    tasks = {task: {"n": sizes[task]} | {view: scores[view][task] for view in scores} for task in module.tasks}
    average = {view: sum(values.values()) / len(values) for view, values in scores.items()}
    return {
        "schema": SCHEMA,
        "recipe": module.recipe,
        "seed": seed,
        "tasks": tasks,
        "average": average,
        "steps": steps,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_memory_bytes": peak_memory(),
        "trainable_parameters": sum(parameter.numel() for parameter in module.learned),
        "versions": {"python": sys.version.split()[0]} | {name: _version(name) for name in _PACKAGES},
        "experts": {task: module.experts.fingerprints[task] for task in module.tasks},
    }


def table(results: Mapping[str, Any]) -> Table:
    """Accuracies in percent, a row per task, and what the adaptation gained over the merge it started from."""
    view = Table(title=f"{results['recipe']}: accuracy in %", title_justify="left")
    view.add_column("task")
    for name in ("pre-trained", "individual", "merged", "adapted", "gain"):
        view.add_column(name, justify="right")
    for task, row in results["tasks"].items():
        view.add_row(task, *_cells(row))
    view.add_section()
    view.add_row("average", *_cells(results["average"]), style="bold")
    return view


def peak_memory() -> int:
    """Bytes: the device's peak on CUDA, else the largest resident size of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cells(row: Mapping[str, float]) -> list[str]:
    gain = row["adapted"] - row["initial"]
    return [*(f"{100 * row[view]:.1f}" for view in VIEWS), f"{100 * gain:+.1f}"]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
