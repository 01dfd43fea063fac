"""Figures of what the models see and say: features, interference between tasks, calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

from adaptive_merge.engine.views import percent
from adaptive_merge.objectives.functional import calibration_bin
from adaptive_merge.report.layers import depth, readable
from adaptive_merge.report.style import (
    DIVERGING,
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

__all__ = [
    "calibration_error",
    "cosine_matrix",
    "cross_accuracy",
    "layer_contributions",
    "mask_overlap",
    "project_features",
    "projection",
    "reliability",
    "representation_distance",
    "sign_conflicts",
    "subspace_alignment",
    "route_matrix",
]


@styled
def representation_distance(views: Mapping[str, Mapping[str, float]]) -> Figure:
    """View → task → mean L1 distance between its features and the expert's: of what adaptation began with and of
    what it reached (with surgery, after the surgery).
    """
    figure = _dots(views, joined=True)
    figure.axes[0].set_xlim(left=0)
    tune(figure.axes[0], x="mean |feature − expert's feature|", grid="x")
    return figure


def project_features(
    features: Mapping[str, np.ndarray], method: Literal["pca", "tsne"] = "pca", seed: int = 0
) -> dict[str, np.ndarray]:
    """Several models' features [n, d] of the same images on one plane: name → [n, 2].

    t-SNE needs scikit-learn, which comes with the extra `report`.
    """
    rows = np.concatenate([np.asarray(part, float) for part in features.values()])
    rows = rows - rows.mean(0)
    if method == "pca":
        _, _, axes = np.linalg.svd(rows, full_matrices=False)
        plane = rows @ axes[:2].T
    else:
        from sklearn.manifold import TSNE

        perplexity = min(30.0, max(2.0, (len(rows) - 1) / 4))
        plane = TSNE(perplexity=perplexity, init="pca", random_state=seed, max_iter=500).fit_transform(rows)
    if plane.shape[1] < 2:
        plane = np.pad(plane, ((0, 0), (0, 2 - plane.shape[1])))
    ends = np.cumsum([len(part) for part in features.values()])[:-1]
    return dict(zip(features, np.split(plane, ends)))


@styled
def projection(points: Mapping[str, np.ndarray], labels: Sequence[int], title: str = "") -> Figure:
    """Features of one task on a plane, a panel a model, a colour a class, all panels on the same axes.

    Args:
        points: `"individual"`, `"initial"`, `"adapted"` (or other names) → [n, 2].
        labels: class of each image [n].
        title: what was projected and how.
    """
    figure, panels = canvas(4.8, 2.25, columns=len(points))
    everything = np.concatenate(list(points.values()))
    low, high = everything.min(0), everything.max(0)
    room = 0.06 * np.maximum(high - low, 1e-9)
    for axes, (name, plane) in zip(panels, points.items()):
        axes.scatter(plane[:, 0], plane[:, 1], 5, [colour(int(kind)) for kind in labels], linewidths=0, alpha=0.85)
        axes.set_xlim(low[0] - room[0], high[0] + room[0])
        axes.set_ylim(low[1] - room[1], high[1] + room[1])
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
        axes.spines[:].set_alpha(0.4)
        tune(axes, {"individual": "expert"}.get(name, VIEW_NAMES.get(name, label(name))), grid=None)
    if title:
        figure.supxlabel(title, fontsize=8.5, color=MUTED)
    return figure


@styled
def cosine_matrix(tasks: Sequence[str], cosines: np.ndarray) -> Figure:
    """Cosine between task vectors [T, T]: near 0 they do not disturb each other."""
    values = np.asarray(cosines, float)
    off = values[~np.eye(len(values), dtype=bool)]
    reach = max(0.05, float(np.abs(off).max(initial=0.0)))
    shown = np.where(np.eye(len(values), dtype=bool), np.nan, values)
    figure = matrix(tasks, shown, "{:.2f}", DIVERGING, (-reach, reach))
    tune(figure.axes[0], grid=None, x="task vector", y="task vector")
    return figure


@styled
def cross_accuracy(tasks: Sequence[str], accuracies: np.ndarray) -> Figure:
    """Accuracy [T, T] in [0, 1] of the expert of task i (row) on the images of task j (column)."""
    figure = matrix(tasks, 100 * np.asarray(accuracies, float), "{:.0f}", SEQUENTIAL)
    tune(figure.axes[0], grid=None, x="images of", y="expert of")
    return figure


@styled
def mask_overlap(tasks: Sequence[str], jaccard: np.ndarray) -> Figure:
    """Jaccard index [T, T] of the tasks' masks."""
    values = np.where(np.eye(len(tasks), dtype=bool), np.nan, np.asarray(jaccard, float))
    figure = matrix(tasks, values, "{:.2f}", SEQUENTIAL)
    tune(figure.axes[0], grid=None)
    return figure


@styled
def layer_contributions(layers: Sequence[str], tasks: Sequence[str], values: np.ndarray) -> Figure:
    """Agreement [L, T] in [0, 1] that is lost without a layer's share, in percentage points."""
    shown = 100 * np.asarray(values, float)
    reach = max(1.0, float(np.nanmax(np.abs(shown), initial=0.0)))
    figure = matrix(tasks, shown, "{:.0f}", DIVERGING, (-reach, reach), readable(layers))
    tune(figure.axes[0], grid=None)
    return figure


@styled
def sign_conflicts(parameters: Sequence[str], shares: np.ndarray) -> Figure:
    """Share [G] of opposed signs: a dot a parameter, a line through the means of the stages of the network."""
    labels, stages = depth(parameters)
    values, stages = 100 * np.asarray(shares, float), np.asarray(stages)
    figure, (axes,) = canvas(4.8, 2.6)
    axes.plot(stages, values, ".", color=MUTED, markersize=3)
    axes.plot(range(len(labels)), [values[stages == stage].mean() for stage in range(len(labels))], color=colour(0))
    axes.axhline(50, color=MUTED, linewidth=1, linestyle=":")
    axes.set_xticks(range(len(labels)), labels, fontsize=8 if len(labels) < 16 else 6.5)
    axes.set_ylim(bottom=0)
    tune(axes, x="block", y="opposed signs in %")
    return figure


@styled
def subspace_alignment(views: Mapping[str, Mapping[str, float]]) -> Figure:
    """View → task → subspace alignment ratio in [0, 1]; a dot a task and view."""
    figure = _dots(views)
    figure.axes[0].set_xlim(0, 1.02)
    tune(figure.axes[0], x="subspace alignment ratio", grid="x")
    return figure


@styled
def route_matrix(tasks: Sequence[str], scores: np.ndarray) -> Figure:
    """Mean scores [T, T] that a route gives each task (column) on the images of each task (row)."""
    figure = matrix(tasks, scores, "{:.2f}", SEQUENTIAL)
    tune(figure.axes[0], grid=None, x="score of", y="images of")
    return figure


def calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """ECE: Σ over bins of (share of images) · |accuracy − mean confidence|, of what a run did not score itself."""
    return float(sum(share * abs(right - sure) for sure, right, share in _bin(confidence, correct)))


@styled
def reliability(
    models: Mapping[str, tuple[np.ndarray, np.ndarray]], errors: Mapping[str, float] | None = None
) -> Figure:
    """Accuracy over confidence: below the diagonal a model is surer than it should be.

    Args:
        models: view or name → (confidence [n] in [0, 1], correct [n] as 0 or 1).
        errors: view or name → its expected calibration error; default: of what is drawn.
    """
    figure, (axes,) = canvas(4.8, 3.4)
    axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=":")
    for index, (name, (confidence, correct)) in enumerate(models.items()):
        bins = _bin(confidence, correct)
        sure, right, share = (np.array(column) for column in zip(*bins)) if bins else (np.zeros(0),) * 3
        ece = (errors or {}).get(name, calibration_error(confidence, correct))
        shade = VIEW_COLOURS.get(name, colour(index))
        text = f"{VIEW_NAMES.get(name) or label(name, 16)}, ECE {percent(ece):.1f} %"
        axes.plot(sure, right, color=shade, linewidth=1.3, label=text)
        axes.scatter(sure, right, 6 + 90 * share, shade, linewidths=0, alpha=0.8)
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    tune(axes, x="confidence", y="accuracy")
    legend(axes)
    return figure


def _dots(views: Mapping[str, Mapping[str, float]], joined: bool = False) -> Figure:
    """View → task → value: a row a task, as in the table, and a dot a view."""
    tasks = list(next(iter(views.values())))
    figure, (axes,) = canvas(4.8, 0.9 + 0.32 * len(tasks))
    places = np.arange(len(tasks))[::-1]
    for place, task in zip(places, tasks if joined else ()):
        ends = [values[task] for values in views.values()]
        axes.plot(ends, [place] * len(ends), color=MUTED, linewidth=1, zorder=1)
    for index, (view, values) in enumerate(views.items()):
        shade, name = VIEW_COLOURS.get(view, colour(index)), VIEW_NAMES.get(view, label(view, 16))
        axes.scatter([values[task] for task in tasks], places, 34, shade, label=name, zorder=2)
    axes.set_yticks(places, [label(task) for task in tasks])
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    legend(axes)
    return figure


def _bin(confidence: np.ndarray, correct: np.ndarray) -> list[tuple[float, float, float]]:
    """(mean confidence, accuracy, share of images) of each bin that holds images; the bins are those of the scoring."""
    confidence, correct = np.asarray(confidence, float), np.asarray(correct, float)
    place = calibration_bin(torch.as_tensor(confidence, dtype=torch.float32)).numpy()
    inside = [place == number for number in np.unique(place)]
    return [(confidence[rows].mean(), correct[rows].mean(), rows.mean()) for rows in inside]
