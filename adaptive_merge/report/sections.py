"""What of a run is shown, in which order, and in what words: figures with captions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
from matplotlib.figure import Figure

from adaptive_merge.report import coefficient_figures, feature_figures, figures
from adaptive_merge.report.runs import Run
from adaptive_merge.report.style import label, to_svg

__all__ = ["Panel", "Plan", "Section", "draw", "run_sections"]

_log = logging.getLogger(__name__)
Plan = tuple[str, str, Callable[[], Figure], bool]  # title, caption, how to draw it, whether it is wide

# Logged quantity, title, caption, and whether it is known at the guard's looks only.
_CURVES = (
    (
        "entropy",
        "Normalised entropy",
        "Of the predictions on the unlabelled batches: 0 is certain, 1 knows nothing.",
        False,
    ),
    (
        "agreement",
        "Agreement with the expert",
        "Part of the images that the guard looks at where model and expert say the same class; no label has a part.",
        True,
    ),
    ("js", "JS divergence to the expert", "Jensen–Shannon, in nats, on the images that the guard looks at.", True),
    (
        "marginal",
        "Marginal entropy",
        "Of the mean prediction, over ln C: near 0, all images that the guard looks at go to one class.",
        True,
    ),
    ("norm", "Length of the features", "Over that of the expert's features on the same images: 1 is as long.", True),
    ("kept", "Kept fraction", "Part of each batch that passed the confidence filter.", False),
)


@dataclass(frozen=True)
class Panel:
    """A figure in a page."""

    title: str
    caption: str
    svg: str
    wide: bool = False

    @property
    def width(self) -> float:
        """Width of the drawing in its own units; at one CSS pixel each, its text is just readable."""
        return float(self.svg.split('viewBox="', 1)[1].split()[2])


@dataclass
class Section:
    """A heading with figures under it."""

    title: str
    panels: list[Panel] = field(default_factory=list)


def run_sections(run: Run, prefix: str, tsne: bool = False) -> list[Section]:
    """All figures of one run that its files allow; a figure that fails becomes a note of the run.

    Args:
        run: what was read.
        prefix: of the ids of the figures, one a run in a page.
        tsne: also project with t-SNE, which takes seconds and scikit-learn.
    """
    parts = (
        ("Accuracy", chain(_accuracy(run), _prequential(run))),
        ("Coefficients", _coefficients(run)),
        ("Adaptation", chain(_adaptation(run), _resources(run))),
        ("Features, interference, calibration", chain(_features(run, tsne), _interference(run), _calibration(run))),
    )
    sections = [
        Section(title, draw(plans, f"{prefix}-{index}", run.notes)) for index, (title, plans) in enumerate(parts)
    ]
    return [section for section in sections if section.panels]


def draw(plans: Iterator[Plan], prefix: str, notes: list[str]) -> list[Panel]:
    """Draw what was planned; a failure leaves a note in place of the figure."""
    panels = []
    for number, (title, caption, make, wide) in enumerate(plans):
        try:
            panels.append(Panel(title, caption, to_svg(make(), f"{prefix}-{number}"), wide))
        except Exception as error:  # a report with a hole is better than none
            _log.warning("the figure %r could not be drawn: %r", title, error)
            notes.append(f"The figure “{title}” could not be drawn ({type(error).__name__}).")
    return panels


def _accuracy(run: Run) -> Iterator[Plan]:
    tasks = {run.shown(task): row for task, row in run.tasks.items()}
    yield (
        "Accuracy per task",
        "Sorted by what the adapted merge reaches; “individual” is each expert on its own "
        "task, the ceiling of a merge.",
        lambda: figures.accuracy_bars(tasks),
        False,
    )
    if len(tasks) > 2:
        yield (
            "Accuracy, all tasks at a glance",
            "The same numbers. Areas of a radar mislead: compare along the spokes.",
            lambda: figures.accuracy_radar(tasks),
            False,
        )
    if any(part is not None for part in figures.recovered(tasks).values()):
        yield (
            "Gap recovered",
            "How much of the distance from the merge to the expert the adaptation closed; below zero it lost.",
            lambda: figures.gap_recovered(tasks),
            False,
        )


def _prequential(run: Run) -> Iterator[Plan]:
    online = run.results["online"]
    if online is None:
        return
    passes = {task: online["tasks"][task] for task in run.merged}
    late = sum(one["images"][-1] - one["predicted"] for one in passes.values())
    mean, final = (
        float(np.mean([row[task] for task in passes]))
        for row in ({task: one["curve"][-1] for task, one in passes.items()}, online["final"])
    )
    yield (
        "Prequential accuracy",
        f"Every image was predicted before it was used; {100 * mean:.1f} % on average over the pass. The model that was "
        f"kept reaches {100 * final:.1f} % when it is asked about all images afterwards, which is no online result."
        + (f" No step predicted {late:,} of the images; the model that was kept did." if late else ""),
        lambda: figures.prequential_curves(
            {task: (np.array(one["images"]), np.array(one["curve"])) for task, one in passes.items()}, mean, final
        ),
        False,
    )


def _coefficients(run: Run) -> Iterator[Plan]:
    history = run.history
    if history is None:
        return
    last = history.coefficients[-1]
    yield (
        "Coefficients after adaptation",
        "How strongly each expert's task vector enters each layer.",
        lambda: coefficient_figures.coefficient_heatmap(history.tasks, history.groups, last),
        len(history.groups) > 24,
    )
    if len(history.steps) > 1:
        yield (
            "Coefficients over the steps",
            "Mean over the layers of each task.",
            lambda: coefficient_figures.coefficient_trajectories(history.tasks, history.steps, history.coefficients),
            False,
        )
    if len(history.groups) > 1:
        yield (
            "Coefficients over the depth",
            "Mean of each block; the dashed line is where they started.",
            lambda: coefficient_figures.depth_profile(history.tasks, history.groups, last, history.coefficients[0]),
            False,
        )


def _adaptation(run: Run) -> Iterator[Plan]:
    for quantity, title, caption, sparse in _CURVES:
        curves = {task: curve for task in run.tasks if (curve := run.curve(quantity, task))}
        total = run.curve(quantity)
        if not curves and total is not None and np.ptp(total[1]) > 0:
            curves, total = {"mean of the tasks": total}, None
        if curves:
            yield (
                title,
                caption,
                lambda curves=curves, total=total, title=title, sparse=sparse: figures.adaptation_curves(
                    curves, title.lower(), total, sparse
                ),
                False,
            )
    loss = run.curve("loss")
    if loss is not None:
        yield (
            "Loss",
            "What the objective minimises, summed over the tasks of a step.",
            lambda: figures.adaptation_curves({"loss": loss}, "loss"),
            False,
        )


def _features(run: Run, tsne: bool) -> Iterator[Plan]:
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


def _interference(run: Run) -> Iterator[Plan]:
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


def _calibration(run: Run) -> Iterator[Plan]:
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


def _resources(run: Run) -> Iterator[Plan]:
    history = run.history
    if history is not None and len(history.steps) > 1:
        yield (
            "Throughput and memory",
            "Over the steps, over all processes; memory is the peak so far.",
            lambda: figures.resources(history.steps, history.throughput, history.memory),
            False,
        )


def _task_with_most_room(run: Run, tasks: list[str]) -> int:
    """The merged task where merge and expert are furthest apart has most to show."""
    rows = [run.merged.get(task) for task in tasks]
    room = [row["individual"] - row["initial"] if row else -2 for row in rows]
    return int(np.argmax(room))
