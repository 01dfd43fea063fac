"""Accuracies against the experts' and the pre-trained model's: what papers print beside plain accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["improvement", "measures", "normalised"]

Scores = Mapping[str, Mapping[str, float]]
"""Task → view → accuracy."""


def normalised(tasks: Scores, view: str) -> dict[str, float | None]:
    """Normalised accuracy of a view by its two definitions, which differ where the experts do.

    `mean_of_ratios`, mean over tasks of accuracy / expert's accuracy, is the one of Iso-C, TALL-masks and Consensus;
    `ratio_of_means` is mean accuracy / mean accuracy of the experts. None where an expert is never right.
    """
    ours, experts = ([row[name] for row in tasks.values()] for name in (view, "individual"))
    if not experts or min(experts) <= 0:
        return {"mean_of_ratios": None, "ratio_of_means": sum(ours) / sum(experts) if sum(experts) > 0 else None}
    ratios = [one / expert for one, expert in zip(ours, experts)]
    return {"mean_of_ratios": sum(ratios) / len(ratios), "ratio_of_means": sum(ours) / sum(experts)}


def improvement(tasks: Scores, view: str) -> dict[str, float | None]:
    """Task → normalised accuracy improvement of a view: (acc − acc θ₀) / (acc expert − acc θ₀).

    0 is the pre-trained model, 1 the expert (Marczak et al., ICML 2025, eq. 1). None where the expert is no better than
    the pre-trained model, for then there is nothing to normalise by.
    """
    gaps = {task: row["individual"] - row["pretrained"] for task, row in tasks.items()}
    return {
        task: (row[view] - row["pretrained"]) / gaps[task] if gaps[task] > 1e-9 else None for task, row in tasks.items()
    }


def measures(tasks: Scores) -> dict[str, Any]:
    """Both, of all views that a run has of its merged tasks."""
    views = [name for name in next(iter(tasks.values()), {}) if name not in ("n", "individual")]
    return {
        "normalised": {view: normalised(tasks, view) for view in views},
        "nai": {view: improvement(tasks, view) for view in views if view != "pretrained"},
    }
