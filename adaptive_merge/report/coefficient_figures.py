"""Figures of the merging coefficients Λ: where they ended, how they got there, what depth wants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from adaptive_merge.report.layers import depth, readable
from adaptive_merge.report.style import (
    INK,
    MUTED,
    SEQUENTIAL,
    canvas,
    colour,
    contrasting,
    label,
    legend,
    span,
    styled,
    tune,
)

__all__ = ["coefficient_heatmap", "coefficient_trajectories", "depth_profile"]

_CELL = 0.145  # inches of a column of the heat map: one line of small print
_BANDS = 3  # more bands than this hide each other


@styled
def coefficient_heatmap(tasks: Sequence[str], groups: Sequence[str], values: np.ndarray) -> Figure:
    """λ of each task (rows) and group (columns, front to back) as colours; few cells also carry their number.

    Args:
        tasks: T names.
        groups: G names of parameters or groups of them.
        values: Λ [T, G].
    """
    order = np.argsort(depth(groups)[1], kind="stable")
    values, groups = np.asarray(values, float)[:, order], [groups[index] for index in order]
    rows, columns = values.shape
    figure, (axes,) = canvas(max(4.8, 1.9 + _CELL * columns), 1.75 + 0.26 * rows)
    low, high = span(values)
    image = axes.imshow(values, aspect="auto", cmap=SEQUENTIAL, vmin=low, vmax=high, interpolation="nearest")
    axes.set_yticks(range(rows), [label(task) for task in tasks])
    if columns > 1:
        axes.set_xticks(range(columns), [label(name, 24) for name in readable(groups)], rotation=90, fontsize=8)
    else:
        axes.set_xticks([])
    _separate_stages(axes, groups)
    if columns <= 14:
        for row, column in np.ndindex(rows, columns):
            ink = contrasting(SEQUENTIAL((values[row, column] - low) / (high - low)))
            axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", fontsize=7.5, color=ink)
    tune(axes, grid=None)
    if np.ptp(values) > 0:
        bar = figure.colorbar(image, ax=axes, pad=0.01 if columns > 30 else 0.02, fraction=0.03, aspect=12)
        bar.outline.set_visible(False)
    axes.spines[:].set_visible(False)
    return figure


@styled
def coefficient_trajectories(tasks: Sequence[str], steps: Sequence[int], values: np.ndarray) -> Figure:
    """Mean λ of each task over the steps; for few tasks with a band that holds the middle 80 % of its groups.

    Args:
        tasks: T names.
        steps: S steps.
        values: Λ at those steps [S, T, G].
    """
    values = np.asarray(values, float)
    banded = len(tasks) <= _BANDS and values.shape[2] > 1
    figure, (axes,) = canvas(4.8, 3.2)
    for index, task in enumerate(tasks):
        part = values[:, index]
        if banded:
            low, high = np.quantile(part, [0.1, 0.9], axis=1)
            axes.fill_between(steps, low, high, color=colour(index), alpha=0.12, linewidth=0)
        axes.plot(steps, part.mean(1), color=colour(index), label=label(task, 14), marker="o" if len(steps) < 3 else "")
    axes.set_xlim(0, max(1, *steps))
    tune(axes, x="step", y="coefficient: mean, middle 80 %" if banded else "mean coefficient")
    legend(axes)
    return figure


@styled
def depth_profile(
    tasks: Sequence[str],
    groups: Sequence[str],
    values: np.ndarray,
    initial: np.ndarray | None = None,
    y: str = "mean coefficient",
) -> Figure:
    """Mean λ, or another value, of each task in each stage of the network, from the stem to the end.

    Args:
        tasks: T names.
        groups: G names.
        values: Λ [T, G].
        initial: Λ before adaptation [T, G], drawn as a dashed mean line.
        y: what the values are.
    """
    labels, stage_of = depth(groups)
    values, stage_of = np.asarray(values, float), np.asarray(stage_of)
    figure, (axes,) = canvas(4.8, 3.2)
    for index, task in enumerate(tasks):
        means = [values[index, stage_of == stage].mean() for stage in range(len(labels))]
        axes.plot(range(len(labels)), means, color=colour(index), marker="o", markersize=3.5, label=label(task, 14))
    if initial is not None:
        means = [np.asarray(initial, float)[:, stage_of == stage].mean() for stage in range(len(labels))]
        axes.plot(range(len(labels)), means, color=MUTED, linestyle="--", linewidth=1, label="start")
    axes.set_xticks(range(len(labels)), labels, fontsize=8 if len(labels) < 16 else 6.5)
    tune(axes, x="block", y=y)
    legend(axes)
    return figure


def _separate_stages(axes, groups: Sequence[str]) -> None:
    """A thin line between neighbouring columns of different blocks."""
    _, stages = depth(groups)
    for column in range(1, len(stages)):
        if stages[column] != stages[column - 1] and len(stages) > 14:
            axes.axvline(column - 0.5, color=INK, linewidth=0.5, alpha=0.55)
