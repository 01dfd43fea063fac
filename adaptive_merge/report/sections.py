"""What of a run is shown, in which order, and in what words: figures with captions."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from adaptive_merge.engine.views import percent
from adaptive_merge.report import coefficient_figures, figures
from adaptive_merge.report.diagnostic_sections import calibration, features, interference, routes
from adaptive_merge.report.panels import Plan, Section, draw
from adaptive_merge.runs.reading import Run

__all__ = ["run_sections"]


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
    ("js", "Divergence from the expert", "Jensen–Shannon, in nats, on the images that the guard looks at.", True),
    (
        "marginal",
        "Marginal entropy",
        "Of the mean prediction, over ln C: near 0, all images that the guard looks at go to one class.",
        True,
    ),
    ("norm", "Length of the features", "Over that of the expert's features on the same images: 1 is as long.", True),
    ("kept", "Kept fraction", "Part of each batch that passed the confidence filter.", False),
)


def run_sections(run: Run, prefix: str, tsne: bool = False) -> list[Section]:
    """All figures of one run that its files allow; a figure that fails becomes a note of the run.

    Args:
        run: what was read.
        prefix: of the ids of the figures, one a run in a page.
        tsne: also project with t-SNE, which takes seconds and scikit-learn.
    """
    parts = (
        (run.measure.capitalize(), chain(_accuracy(run), _prequential(run))),
        ("Coefficients and masks", chain(_coefficients(run), _masks(run))),
        ("Adaptation", chain(_adaptation(run), _resources(run))),
        ("Routes", routes(run)),
        ("Features, interference, calibration", chain(features(run, tsne), interference(run), calibration(run))),
    )
    sections = [
        Section(title, draw(plans, f"{prefix}-{index}", run.notes)) for index, (title, plans) in enumerate(parts)
    ]
    return [section for section in sections if section.panels]


def _accuracy(run: Run) -> Iterator[Plan]:
    tasks = {run.shown(task): run.scores(row) for task, row in run.tasks.items()}
    yield (
        f"{run.measure.capitalize()} per task",
        "“individual” is each expert on its own task, the ceiling of a merge; lines are binomial 95 % intervals."
        + ("" if run.measure == "accuracy" else " Part of the images on which a model and the task's expert agree."),
        lambda: figures.accuracy_bars(tasks, run.measure),
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
        f"Every image was predicted before it was used; {percent(mean):.1f} % on average over the pass. The model that "
        f"was kept reaches {percent(final):.1f} % when it is asked about all images afterwards, "
        "which is no online result."
        + (f" No step predicted {late:,} of the images; the model that was kept did." if late else ""),
        lambda: figures.prequential_curves(
            {task: (np.array(one["images"]), np.array(one["curve"])) for task, one in passes.items()}, mean, final
        ),
        False,
    )


def _coefficients(run: Run) -> Iterator[Plan]:
    history = run.history
    if history is None or not history.groups:
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


def _masks(run: Run) -> Iterator[Plan]:
    kept = run.results.get("kept")
    if not kept:
        return
    tasks, groups = list(kept), list(next(iter(kept.values())))
    shares = np.array([[kept[task][group] for group in groups] for task in tasks])
    yield (
        "What the mask keeps, by depth",
        "Mean share of the entries or directions of a block that a task's mask keeps; "
        f"{100 * shares.mean():.0f} % over all tasks and parameters.",
        lambda: coefficient_figures.depth_profile(tasks, groups, shares, y="kept share"),
        False,
    )


def _adaptation(run: Run) -> Iterator[Plan]:
    steps = run.results.get("steps", 0)
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
                    curves, title.lower(), total, sparse, steps
                ),
                False,
            )
    loss = run.curve("loss")
    if loss is not None:
        yield (
            "Loss",
            "What the objective minimises, summed over the tasks of a step.",
            lambda: figures.adaptation_curves({"loss": loss}, "loss", end=steps),
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
