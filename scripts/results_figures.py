"""The figure of docs/results.md: what accuracy costs in unlabelled images and in compute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adaptive_merge.report.style import MUTED, canvas, colour, styled, tune

COSTS = {"images": "different unlabelled images, all tasks", "seconds": "seconds of steps and start, one thread"}


def pareto(points: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Draw accuracy over both costs, a dot a method, and name those that no other beats at their cost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A white ground, because pages show pictures on light and dark alike.
    _figure(points).savefig(path, dpi=110, facecolor="white")


@styled
def _figure(points: Mapping[str, Mapping[str, float]]) -> Figure:
    figure, panels = canvas(10.5, 4.6, columns=2)
    for axes, (cost, words) in zip(panels, COSTS.items()):
        known = {method: row for method, row in points.items() if np.isfinite(row[cost])}
        _panel(axes, {method: (row[cost], row["mean accuracy, %"]) for method, row in known.items()})
        tune(axes, x=f"{words} (none, then logarithmic)", y="mean accuracy under hold-out, %")
    return figure


def _panel(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    best = front(points)
    costs, values = np.array(list(points.values())).T
    axes.scatter(costs, values, 18, color=MUTED, alpha=0.6)
    line = np.array([points[method] for method in best])
    axes.step(*line.T, where="post", color=colour(0), linewidth=1.2)
    axes.scatter(*line.T, 30, color=colour(0), zorder=3)
    for method in best:
        axes.annotate(method, points[method], (5, -11), textcoords="offset points", fontsize=7.5)
    axes.set_xscale("symlog", linthresh=10, linscale=0.4)
    axes.set_xlim(-2, 3 * costs.max())


def front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The methods that no other beats at their cost or less, the cheapest first."""
    best: list[str] = []
    for method in sorted(points, key=lambda one: (points[one][0], -points[one][1])):
        if not best or points[method][1] > points[best[-1]][1]:
            best.append(method)
    return best
