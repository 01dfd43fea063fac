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
            f"Representation bias: mean absolute difference per feature on the same {_counts(run)} images of a task.",
            lambda: feature_figures.representation_distance(before, after),
            False,
        )
    place = _task_with_most_room(run, found.tasks)
    views = ("individual", "initial", "adapted")
    points = {
        view: found.arrays[f"features.{view}.{place}"] for view in views if f"features.{view}.{place}" in found.arrays
    }
    labels = found.arrays.get(f"label.adapted.{place}")
    if labels is not None and f"sample.{place}" in found.arrays:  # files of older versions hold the first images
        labels = labels[found.arrays[f"sample.{place}"]]
    if len(points) < 2 or labels is None or min(len(part) for part in points.values()) < 3:
        return
    name, size = label(found.tasks[place], 30), len(points["adapted"])
    for method, title in (("pca", "PCA"), ("tsne", "t-SNE"))[: 2 if tsne else 1]:
        yield (
            f"{title} of the features of {name}",
            f"The same {size:,} images, drawn at random, seen by expert, merge and adapted model; colours are classes.",
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
    known = found.interference()
    if "sign_conflicts" in known:
        yield (
            "Sign conflicts",
            "Share of entries on which the task vectors of two tasks point in opposite directions, mean over pairs; "
            "signs drawn at random would give 50 %.",
            lambda: feature_figures.sign_conflicts(found.parameters, found.arrays["sign_conflicts"][1]),
            False,
        )
    if "masks" in known:
        density, lost, alone = (known["masks"][name] for name in ("density", "catastrophic", "selfish"))
        yield (
            "Overlap of TALL-masks",
            "Jaccard index of the entries that tasks rely on. "
            f"A task keeps {100 * np.mean(list(density.values())):.0f} % of them on average; "
            f"{100 * alone:.0f} % serve one task alone (selfish), {100 * lost:.0f} % none (catastrophic).",
            lambda: feature_figures.mask_overlap(names, found.arrays["masks.jaccard"]),
            False,
        )
    if "alignment" in known:
        yield (
            "Subspace alignment",
            "Share of each task vector's norm that lies in the leading directions of the merge (SAR, ε = 0.05), mean "
            "over matrices.",
            lambda: feature_figures.subspace_alignment(
                {view: dict(zip(names, values.values())) for view, values in known["alignment"].items()}
            ),
            False,
        )
    if "contribution" in known:
        yield (
            "Contribution of the layers",
            "Percentage points of agreement with the task's expert that are lost when a layer goes back to the "
            "pre-trained weights; below zero the task would be served better without its share.",
            lambda: feature_figures.layer_contributions(found.layers, names, found.arrays["contribution"]),
            False,
        )
    if "cross" in found.arrays:
        yield (
            "Experts on each other's tasks",
            f"Accuracy in % of each expert with each task's head, on {_crossed(run)} images of it, drawn at random.",
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
    models, errors = {}, {}
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
            recorded = run.calibration_error(view)
            alone = [feature_figures.calibration_error(*pair) for pair in zip(*parts)]
            errors[view] = float(np.mean(alone)) if recorded is None else recorded
    if models:
        yield (
            "Reliability",
            f"The {len(models[next(iter(models))][0]):,} images of all merged tasks together; ECE is the mean over the "
            "tasks, as in the tables. Below the diagonal a model is surer than it is right; dots are sized by images.",
            lambda: feature_figures.reliability(models, errors),
            False,
        )


def _task_with_most_room(run: Run, tasks: list[str]) -> int:
    """The merged task where merge and expert are furthest apart has most to show."""
    rows = [run.merged.get(task) for task in tasks]
    room = [row["individual"] - row["initial"] if row else -2 for row in rows]
    return int(np.argmax(room))


def _counts(run: Run) -> str:
    """Images of a task whose features were kept."""
    arrays = run.diagnostics.arrays
    return _range([len(values) for name, values in arrays.items() if name.startswith("features.adapted.")])


def _crossed(run: Run) -> str:
    """Images of a task that all experts saw; older files do not say."""
    return _range([int(count) for count in run.diagnostics.arrays.get("crossed", ())])


def _range(counts: list[int]) -> str:
    if not counts:
        return "some"
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
