"""The figures that a run's diagnostics allow: features, interference between tasks, calibration."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from adaptive_merge.report import feature_figures
from adaptive_merge.report.panels import Plan
from adaptive_merge.report.style import label
from adaptive_merge.runs.reading import Run

__all__ = ["calibration", "features", "interference", "routes"]


def features(run: Run, tsne: bool) -> Iterator[Plan]:
    """Distances to the experts' features, and one task's features on a plane."""
    found = run.diagnostics
    if found is None:
        return
    if {"distance.initial", "distance.adapted"} <= found.arrays.keys():
        names = [run.shown(task) for task in found.tasks]
        before, after = (dict(zip(names, found.arrays[f"distance.{view}"])) for view in ("initial", "adapted"))
        yield (
            "Distance to the expert's features",
            "Representation bias: mean absolute difference per feature on the same images.",
            lambda: feature_figures.representation_distance(before, after),
            False,
        )
    place = _task_with_most_room(run, found.tasks)
    views = ("individual", "initial", "adapted")
    points = {
        view: found.arrays[f"features.{view}.{place}"] for view in views if f"features.{view}.{place}" in found.arrays
    }
    labels = found.arrays.get(f"label.adapted.{place}")
    if len(points) < 2 or labels is None or min(len(part) for part in points.values()) < 3:
        return
    name, size = label(found.tasks[place], 30), len(points["adapted"])
    for method, title in (("pca", "PCA"), ("tsne", "t-SNE"))[: 2 if tsne else 1]:
        yield (
            f"{title} of the features of {name}",
            "The same images seen by expert, merge and adapted model; colours are classes.",
            lambda method=method, title=title: feature_figures.projection(
                feature_figures.project_features(points, method), labels[:size]
            ),
            False,
        )


def interference(run: Run) -> Iterator[Plan]:
    """What experts do to one another."""
    found = run.diagnostics
    if found is None:
        return
    names = [run.shown(task) for task in found.tasks]
    if "cosine" in found.arrays:
        yield (
            "Cosine of task vectors",
            "Near 0, adding one expert hardly disturbs another.",
            lambda: feature_figures.cosine_matrix(names, found.arrays["cosine"]),
            False,
        )
    if "cross" in found.arrays:
        yield (
            "Experts on each other's tasks",
            "Accuracy in % of each expert with the head of each task.",
            lambda: feature_figures.cross_accuracy(names, found.arrays["cross"]),
            False,
        )


def routes(run: Run) -> Iterator[Plan]:
    """Where a route sends the images of each task."""
    found = run.results.get("routing")
    if isinstance(found, dict) and isinstance(found.get("tasks"), dict):
        tasks = [run.shown(task) for task in found["tasks"]]
        yield (
            "Routes by task",
            "Mean score of each task (column) on the images of each task (row); the largest score is an image's task.",
            lambda: feature_figures.route_matrix(tasks, np.array([row["scores"] for row in found["tasks"].values()])),
            False,
        )


def calibration(run: Run) -> Iterator[Plan]:
    """How sure the models are, against how right."""
    found = run.diagnostics
    if found is None:
        return
    models = {}
    for view in ("individual", "initial", "adapted"):
        parts = [
            [
                found.arrays[f"{kind}.{view}.{place}"]
                for place, task in enumerate(found.tasks)
                if task in run.merged and f"{kind}.{view}.{place}" in found.arrays
            ]
            for kind in ("confidence", "correct")
        ]
        if all(parts):
            models[view] = (np.concatenate(parts[0]), np.concatenate(parts[1]))
    if models:
        yield (
            "Reliability",
            "The images of all merged tasks together. Below the diagonal a model is surer than it is right; dots "
            "are sized by images.",
            lambda: feature_figures.reliability(models),
            False,
        )


def _task_with_most_room(run: Run, tasks: list[str]) -> int:
    """The merged task where merge and expert are furthest apart has most to show."""
    rows = [run.merged.get(task) for task in tasks]
    room = [row["individual"] - row["initial"] if row else -2 for row in rows]
    return int(np.argmax(room))
