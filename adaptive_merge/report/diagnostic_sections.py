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
    kept = run.diagnostics
    if kept is None:
        return
    if {"distance.initial", "distance.adapted"} <= kept.arrays.keys():
        names = [run.shown(task) for task in kept.tasks]
        stages = {_stage(run, view): kept.arrays[f"distance.{view}"] for view in ("initial", "adapted")}
        views = {stage: dict(zip(names, distances)) for stage, distances in stages.items()}
        yield (
            "Distance to the expert's features",
            f"Representation bias: mean absolute difference per feature on the same {_counts(run)} images of a task.",
            lambda: feature_figures.representation_distance(views),
            False,
        )
    place = _task_with_most_room(run, kept.tasks)
    views = ("individual", "initial", "adapted")
    points = {
        _stage(run, view): kept.arrays[f"features.{view}.{place}"]
        for view in views
        if f"features.{view}.{place}" in kept.arrays
    }
    labels = kept.arrays.get(f"label.adapted.{place}")
    if labels is not None and f"sample.{place}" in kept.arrays:  # files of older versions hold the first images
        labels = labels[kept.arrays[f"sample.{place}"]]
    if len(points) < 2 or labels is None or min(len(part) for part in points.values()) < 3:
        return
    name, size = label(kept.tasks[place], 30), len(points["adapted"])
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
    kept = run.diagnostics
    if kept is None:
        return
    names = [run.shown(task) for task in kept.tasks]
    if "cosine" in kept.arrays:
        yield (
            "Cosine of task vectors",
            "Near 0, adding one expert hardly disturbs another.",
            lambda: feature_figures.cosine_matrix(names, kept.arrays["cosine"]),
            False,
        )
    known = kept.interference()
    if "sign_conflicts" in known:
        yield (
            "Sign conflicts",
            "Share of entries on which the task vectors of two tasks point in opposite directions, mean over pairs; "
            "signs drawn at random would give 50 %.",
            lambda: feature_figures.sign_conflicts(kept.parameters, kept.arrays["sign_conflicts"][1]),
            False,
        )
    if "masks" in known:
        density, lost, alone = (known["masks"][name] for name in ("density", "catastrophic", "selfish"))
        yield (
            "Overlap of TALL-masks",
            "Jaccard index of the entries that tasks rely on. "
            f"A task keeps {100 * np.mean(list(density.values())):.0f} % of them on average; "
            f"{100 * alone:.0f} % serve one task alone (selfish), {100 * lost:.0f} % none (catastrophic).",
            lambda: feature_figures.mask_overlap(names, kept.arrays["masks.jaccard"]),
            False,
        )
    if "alignment" in known:
        yield (
            "Subspace alignment",
            "Share of each task vector's norm that lies in the leading directions of the merge (SAR, ε = 0.05), mean "
            "over matrices.",
            lambda: feature_figures.subspace_alignment(
                {_stage(run, view): dict(zip(names, values.values())) for view, values in known["alignment"].items()}
            ),
            False,
        )
    if "contribution" in known:
        yield (
            "Contribution of the layers",
            "Percentage points of agreement with the task's expert that are lost when a layer goes back to the "
            "pre-trained weights; below zero the task would be served better without its share.",
            lambda: feature_figures.layer_contributions(kept.layers, names, kept.arrays["contribution"]),
            False,
        )
    if "cross" in kept.arrays:
        yield (
            "Experts on each other's tasks",
            f"Accuracy in % of each expert with each task's head, on {_crossed(run)} images of it, drawn at random.",
            lambda: feature_figures.cross_accuracy(names, kept.arrays["cross"]),
            False,
        )


def routes(run: Run) -> Iterator[Plan]:
    """Where a route sends the images of each task."""
    routing = run.results.get("routing")
    if routing:
        tasks = [run.shown(task) for task in routing["tasks"]]
        yield (
            "Routes by task",
            "Mean score of each task (column) on the images of each task (row); the largest score is an image's task.",
            lambda: feature_figures.route_matrix(
                tasks, np.array([row["scores"] for row in routing["tasks"].values()], float)
            ),
            False,
        )


def calibration(run: Run) -> Iterator[Plan]:
    """How sure the models are, against how right."""
    kept = run.diagnostics
    if kept is None:
        return
    models, errors = {}, {}
    for view in ("individual", "initial", "adapted"):
        parts = [
            [
                kept.arrays[f"{kind}.{view}.{place}"]
                for place, task in enumerate(kept.tasks)
                if task in run.merged and f"{kind}.{view}.{place}" in kept.arrays
            ]
            for kind in ("confidence", "correct")
        ]
        if all(parts):
            name = _stage(run, view)
            models[name] = (np.concatenate(parts[0]), np.concatenate(parts[1]))
            recorded = run.calibration_error(view)
            alone = [feature_figures.calibration_error(*pair) for pair in zip(*parts)]
            errors[name] = float(np.mean(alone)) if recorded is None else recorded
    if models:
        yield (
            "Reliability",
            f"The {len(models[next(iter(models))][0]):,} images of all merged tasks together; ECE is the mean over the "
            "tasks, as in the tables. Below the diagonal a model is surer than it is right; dots are sized by images.",
            lambda: feature_figures.reliability(models, errors),
            False,
        )


def _stage(run: Run, view: str) -> str:
    """What a view is called in this run."""
    return next((name for name, recorded in run.stages.items() if recorded == view), view)


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
