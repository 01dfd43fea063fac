"""Figures of accuracy, of the adaptation over steps and of resources: pure functions of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptive_merge.engine.views import percent
from adaptive_merge.report.statistics import wilson
from adaptive_merge.report.style import (
    INK,
    MUTED,
    SEQUENTIAL,
    VIEW_COLOURS,
    VIEW_NAMES,
    canvas,
    colour,
    label,
    legend,
    matrix,
    styled,
    tune,
)
from adaptive_merge.runs.reading import Curve

__all__ = [
    "Scores",
    "accuracy_bars",
    "adaptation_curves",
    "compare_bars",
    "compare_curves",
    "compare_means",
    "compare_table",
    "gap_recovered",
    "prequential_curves",
    "recovered",
    "resources",
    "smooth",
]

Scores = Mapping[str, Mapping[str, float]]  # task → view → accuracy in [0, 1]
_SMOOTHED = 60  # points of a curve after averaging neighbours


@styled
def accuracy_bars(scores: Scores, measure: str = "accuracy") -> Figure:
    """Accuracy, or another measure, of the models on each task, with 95 % intervals where `n` images are known."""
    tasks = list(scores)
    names = {view: name for view, name in VIEW_NAMES.items() if all(view in row for row in scores.values())}
    figure, (axes,) = canvas(4.8, _height(tasks))
    height = 0.8 / len(names)
    for offset, (view, name) in enumerate(names.items()):
        places = np.arange(len(tasks))[::-1] + 0.4 - (offset + 0.5) * height
        values = [100 * scores[task][view] for task in tasks]
        axes.barh(places, values, height * 0.9, color=VIEW_COLOURS[view], label=name)
        ends = [wilson(scores[task][view], scores[task].get("n", 0)) for task in tasks]
        for place, value, (low, high) in zip(places, values, ends):
            if high > low:
                axes.plot([100 * low, 100 * high], [place, place], color=INK, linewidth=0.8, solid_capstyle="butt")
            if view == "adapted":
                axes.text(100 * high + 1, place, f"{percent(value / 100):.1f}", va="center", fontsize=8, color=INK)
    _tasks_down(axes, tasks)
    axes.set_xlim(0, 110)
    axes.set_xticks(range(0, 101, 20))
    tune(axes, x=f"{measure} in %", grid="x")
    axes.spines["bottom"].set_visible(False)
    legend(axes)
    return figure


def recovered(scores: Scores) -> dict[str, float | None]:
    """Task → (adapted − initial) / (individual − initial): the part of the gap to the expert that was closed.

    None where the merge is not below the expert, so that there is no gap.
    """
    gaps = {task: row["individual"] - row["initial"] for task, row in scores.items()}
    return {
        task: (row["adapted"] - row["initial"]) / gaps[task] if gaps[task] > 1e-9 else None
        for task, row in scores.items()
    }


@styled
def gap_recovered(scores: Scores) -> Figure:
    """The part of the gap between merge and expert that adaptation closed, per task, in percent."""
    tasks, parts = list(scores), recovered(scores)
    figure, (axes,) = canvas(4.8, _height(tasks))
    places = np.arange(len(tasks))[::-1]
    shares = [np.nan if parts[task] is None else parts[task] for task in tasks]
    values = 100 * np.clip(np.array(shares, float), -1.5, 1.5)
    axes.barh(places, np.nan_to_num(values), 0.62, color=[colour(1) if value < 0 else colour(0) for value in values])
    for place, share, value in zip(places, shares, values):
        text = " no gap" if np.isnan(share) else f" {round(100 * share):+d} % "
        axes.text(np.nan_to_num(value), place, text, va="center", ha="right" if value < 0 else "left", fontsize=8)
    _tasks_down(axes, tasks)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    low, high = min(0.0, np.nanmin(values, initial=0.0)), max(100.0, np.nanmax(values, initial=0.0))
    axes.set_xlim(low - (0.2 * (high - low) if low < 0 else 0), high + 0.16 * (high - low))
    tune(axes, x="gap to the expert that was closed, in %", grid="x")
    axes.spines[["bottom", "left"]].set_visible(False)
    return figure


def smooth(curve: Curve, points: int = _SMOOTHED) -> Curve:
    """A curve with neighbours averaged until at most `points` are left; NaN counts as missing."""
    steps, values = (np.asarray(part, float) for part in curve)
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    size = -(-len(steps) // points) if len(steps) else 1
    parts = range(0, len(steps), size)
    means = [[part[start : start + size].mean() for start in parts] for part in (steps, values)]
    return np.array(means[0]), np.array(means[1])


@styled
def adaptation_curves(
    curves: Mapping[str, Curve], y: str, total: Curve | None = None, sparse: bool = False, end: float = 0
) -> Figure:
    """One quantity of each task over the steps, from 0 up: normalised entropy, agreement, kept fraction.

    Args:
        curves: task → steps and values.
        y: what the values are.
        total: a curve over all tasks, drawn dark.
        sparse: known at a few steps only, so that each of them is a dot.
        end: last step of the run, so that all its figures have one axis of steps.
    """
    figure, (axes,) = canvas(4.8, 3.2)
    for index, (task, curve) in enumerate(curves.items()):
        steps, values = smooth(curve)
        style = {"marker": "o" if sparse or len(steps) < 3 else "", "markersize": 3.5 if sparse else 6}
        axes.plot(steps, values, color=colour(index), label=label(task, 14), **style)
    if total is not None and len(curves) > 1:
        axes.plot(*smooth(total), color=INK, linewidth=2.2, label="mean", marker="o" if sparse else "", markersize=3.5)
    low, high = axes.get_ylim()
    low = min(0.0, low)
    axes.set_ylim(low, high + 0.03 * (high - low))  # room for dots at the top
    axes.set_xlim(0, end or axes.get_xlim()[1])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    tune(axes, x="step", y=y)
    legend(axes)
    return figure


@styled
def prequential_curves(curves: Mapping[str, Curve], mean: float, final: float) -> Figure:
    """Accuracy over the images of a single pass, each predicted before it was used.

    Args:
        curves: task → numbers of images and accuracy in [0, 1] over the first so many.
        mean: of the tasks' accuracies over the whole pass, as a solid line.
        final: of those of the model that was kept, asked about all images afterwards, as a dashed line.
    """
    figure, (axes,) = canvas(4.8, 3.2)
    for index, (task, (images, values)) in enumerate(curves.items()):
        axes.plot(images, 100 * np.asarray(values), color=colour(index), label=label(task, 14), marker=".")
    for value, style, name in ((mean, "-", "mean of the pass"), (final, "--", "kept model, mean")):
        axes.axhline(100 * value, color=INK, linewidth=1.3, linestyle=style, label=f"{name} {percent(value):.1f} %")
    axes.set_ylim(0, 102)
    tune(axes, x="images of the stream", y="accuracy so far in %")
    legend(axes)
    return figure


@styled
def resources(steps: Sequence[int], throughput: Sequence[float], memory: Sequence[float]) -> Figure:
    """Images per second and peak memory (bytes) over the steps."""
    figure, (left, right) = canvas(4.8, 2.6, columns=2)
    for axes in (left, right):
        axes.set_xlim(0, max(1, *steps))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    speed = np.asarray(throughput, float)
    left.plot(steps, speed, color=colour(0))
    left.set_ylim(0, 1.15 * max(np.nanmax(speed, initial=0.0), 1e-9))
    tune(left, "images a second", x="step")
    sizes = np.asarray(memory, float) / 2**20
    unit, sizes = ("GiB", sizes / 1024) if np.nanmax(sizes, initial=0.0) > 2048 else ("MiB", sizes)
    right.plot(steps, sizes, color=colour(1))
    right.fill_between(steps, 0, sizes, color=colour(1), alpha=0.12, linewidth=0)
    right.set_ylim(0, 1.15 * max(np.nanmax(sizes, initial=0.0), 1e-9))
    tune(right, f"peak memory, {unit}", x="step")
    return figure


@styled
def compare_means(groups: Mapping[str, tuple[Sequence[float], float]], measure: str = "accuracy") -> Figure:
    """Mean accuracy, or another measure, of several groups of runs, a row each.

    Args:
        groups: name of the group → accuracies in [0, 1], one a run, and the reach of its error bar.
    """
    figure, (axes,) = canvas(4.8, 1.0 + 0.27 * max(len(groups), 3))
    places = np.arange(len(groups))[::-1]
    for place, (runs, reach) in zip(places, groups.values()):
        mean, values = 100 * float(np.mean(runs)), 100 * np.asarray(runs, float)
        axes.errorbar(mean, place, xerr=100 * reach, color=colour(0), marker="D", markersize=4.5, capsize=2.5)
        if len(values) > 1:
            axes.plot(values, np.full(len(values), place), ".", color=INK, markersize=3.5)
    axes.set_yticks(places, [label(name, 24) for name in groups])
    axes.set_ylim(-0.6, len(groups) - 0.4)
    tune(axes, x=f"mean adapted {measure} in %", grid="x")
    return figure


@styled
def compare_bars(
    groups: Mapping[str, Mapping[str, Sequence[float]]],
    measure: str = "accuracy",
    scores: Mapping[str, Scores] | None = None,
) -> Figure:
    """Accuracy, or another measure, per task of several groups of runs: a dot a run, a bar at the mean.

    Args:
        groups: name of the group → task → accuracies in [0, 1], one a run.
        measure: what they are.
        scores: name of the group → task → `n` images and `adapted`, for the intervals of single runs.
    """
    tasks = list(dict.fromkeys(task for group in groups.values() for task in group))
    figure, (axes,) = canvas(4.8, 1.0 + len(tasks) * (0.22 + 0.16 * len(groups)))
    height = 0.8 / len(groups)
    for index, (name, group) in enumerate(groups.items()):
        places = np.arange(len(tasks))[::-1] + 0.4 - (index + 0.5) * height
        means = [100 * np.mean(group.get(task, np.nan)) for task in tasks]
        axes.barh(places, means, height * 0.85, color=colour(index), alpha=0.8, label=label(name, 20))
        for place, task in zip(places, tasks):
            runs = 100 * np.asarray(group.get(task, ()), float)
            low, high = _reach(runs, (scores or {}).get(name, {}).get(task, {"n": 0}))
            if high > low:
                axes.plot([low, high], [place, place], color=INK, linewidth=0.8, solid_capstyle="butt")
            if len(runs) > 1:
                axes.plot(runs, np.full(len(runs), place), ".", color=INK, markersize=3)
    axes.set_yticks(np.arange(len(tasks))[::-1], [label(task) for task in tasks])
    axes.set_xlim(0, 102)
    tune(axes, x=f"adapted {measure} in %", grid="x")
    axes.spines["bottom"].set_visible(False)
    legend(axes)
    return figure


def _reach(runs: np.ndarray, row: Mapping[str, float]) -> tuple[float, float]:
    """Ends of a whisker in percent: ± the deviation of several runs, or the interval of one."""
    if len(runs) > 1:
        return runs.mean() - runs.std(ddof=1), runs.mean() + runs.std(ddof=1)
    low, high = wilson(row["adapted"], row["n"]) if row["n"] else (0.0, 0.0)
    return 100 * low, 100 * high


@styled
def compare_table(groups: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Mean accuracy in percent of groups of runs (rows) per task (columns), as colours with numbers."""
    tasks = list(dict.fromkeys(task for group in groups.values() for task in group))
    means = [[100 * np.mean(group.get(task, np.nan)) for task in tasks] for group in groups.values()]
    return matrix(tasks, np.array(means), "{:.0f}", SEQUENTIAL, rows=list(groups))


@styled
def compare_curves(curves: Mapping[str, Sequence[Curve]], y: str) -> Figure:
    """One quantity of several groups of runs over the steps: a line a run, a colour a group."""
    figure, (axes,) = canvas(4.8, 3.2)
    for index, (name, runs) in enumerate(curves.items()):
        for place, curve in enumerate(runs):
            axes.plot(
                *smooth(curve),
                color=colour(index),
                alpha=0.85,
                linewidth=1.4,
                label=label(name, 20) if place == 0 else None,
            )
    tune(axes, x="step", y=y)
    legend(axes)
    return figure


def _height(tasks: Sequence[str]) -> float:
    """Inches of a figure with a row a task: the same for all, so that neighbours are aligned."""
    return 0.95 + 0.45 * max(len(tasks), 2)


def _tasks_down(axes: Axes, tasks: Sequence[str]) -> None:
    """A row a task, from the top, as in the table."""
    axes.set_yticks(range(len(tasks))[::-1], [label(task) for task in tasks])
    axes.set_ylim(-0.6, len(tasks) - 0.4)
