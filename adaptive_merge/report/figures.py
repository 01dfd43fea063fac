"""Figures of accuracy, of the adaptation over steps and of resources: pure functions of plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from adaptive_merge.engine.views import percent
from adaptive_merge.report.style import (
    GRID,
    INK,
    MUTED,
    VIEW_COLOURS,
    VIEW_NAMES,
    canvas,
    colour,
    label,
    legend,
    styled,
    tune,
)
from adaptive_merge.runs.reading import Curve

__all__ = [
    "Scores",
    "accuracy_bars",
    "accuracy_radar",
    "adaptation_curves",
    "compare_bars",
    "compare_curves",
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
    """Accuracy, or another measure, of the four models on each task, the tasks sorted by what adaptation reached."""
    tasks = sorted(scores, key=lambda task: scores[task]["adapted"])
    figure, (axes,) = canvas(4.8, 0.9 + 0.52 * len(tasks))
    height = 0.8 / len(VIEW_NAMES)
    for offset, (view, name) in enumerate(VIEW_NAMES.items()):
        places = np.arange(len(tasks)) + 0.3 - offset * height
        values = [100 * scores[task][view] for task in tasks]
        axes.barh(places, values, height * 0.9, color=VIEW_COLOURS[view], label=name)
        if view == "adapted":
            for place, value in zip(places, values):
                axes.text(value + 1, place, f"{percent(value / 100):.1f}", va="center", fontsize=8, color=INK)
    axes.set_yticks(range(len(tasks)), [label(task) for task in tasks])
    axes.set_xlim(0, 106)
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    tune(axes, x=f"{measure} in %", grid="x")
    axes.spines["bottom"].set_visible(False)
    legend(axes)
    return figure


@styled
def accuracy_radar(scores: Scores) -> Figure:
    """The same as a radar, whose areas mislead: read it with the bars beside it."""
    tasks = list(scores)
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    closed = np.append(angles, angles[:1])
    figure, (flat,) = canvas(4.8, 4.0)
    flat.remove()
    axes = figure.add_subplot(projection="polar", facecolor="none")
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    for view, name in VIEW_NAMES.items():
        values = [100 * scores[task][view] for task in tasks]
        style = {"color": VIEW_COLOURS[view], "linewidth": 2.2 if view == "adapted" else 1.3}
        axes.plot(closed, [*values, values[0]], label=name, linestyle="--" if view == "individual" else "-", **style)
        if view == "adapted":
            axes.fill(closed, [*values, values[0]], color=VIEW_COLOURS[view], alpha=0.12, linewidth=0)
    axes.set_xticks(angles, [label(task, 14) for task in tasks], color=INK)
    axes.set_yticks([25, 50, 75, 100], ["25", "50", "75", "100"], fontsize=7.5, color=MUTED)
    axes.set_ylim(0, 100)
    axes.grid(color=GRID, linewidth=0.7)
    axes.spines["polar"].set_color(GRID)
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
    parts = {task: part for task, part in recovered(scores).items() if part is not None}
    tasks = sorted(parts, key=lambda task: parts[task])
    values = [100 * float(np.clip(parts[task], -1.5, 1.5)) for task in tasks]
    figure, (axes,) = canvas(4.8, 1.0 + 0.3 * max(len(tasks), 2))
    axes.barh(range(len(tasks)), values, 0.62, color=[colour(0) if value >= 0 else colour(1) for value in values])
    for place, (task, value) in enumerate(zip(tasks, values)):
        side = "left" if value >= 0 else "right"
        text = f" {round(100 * parts[task]):+d} % "
        axes.text(value, place, text, va="center", ha=side, fontsize=8, color=INK)
    axes.set_yticks(range(len(tasks)), [label(task) for task in tasks])
    axes.axvline(0, color=MUTED, linewidth=0.8)
    low, high = min([0.0, *values]), max([100.0, *values])
    axes.set_xlim(low - (0.2 * (high - low) if low < 0 else 0), high + 0.16 * (high - low))
    tune(axes, x="gap to the expert that was closed, in %", grid="x")
    axes.spines[["bottom", "left"]].set_visible(False)
    if not tasks:
        axes.text(0.5, 0.5, "no task has a gap", ha="center", va="center", transform=axes.transAxes)
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
def adaptation_curves(curves: Mapping[str, Curve], y: str, total: Curve | None = None, sparse: bool = False) -> Figure:
    """One quantity of each task over the steps, from 0 up: normalised entropy, agreement, kept fraction.

    Args:
        curves: task → steps and values.
        y: what the values are.
        total: a curve over all tasks, drawn dark.
        sparse: known at a few steps only, so that each of them is a dot.
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
def compare_bars(groups: Mapping[str, Mapping[str, Sequence[float]]], measure: str = "accuracy") -> Figure:
    """Accuracy, or another measure, per task of several groups of runs: a dot a run, a bar at the mean.

    Args:
        groups: name of the group → task → accuracies in [0, 1], one a run.
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
            if len(runs) > 1:
                axes.plot(runs, np.full(len(runs), place), ".", color=INK, markersize=3)
    axes.set_yticks(np.arange(len(tasks))[::-1], [label(task) for task in tasks])
    axes.set_xlim(0, 102)
    tune(axes, x=f"adapted {measure} in %", grid="x")
    axes.spines["bottom"].set_visible(False)
    legend(axes)
    return figure


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
