"""A run in a few numbers and sentences: cards and warnings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adaptive_merge.engine.views import gain, percent
from adaptive_merge.report.figures import recovered
from adaptive_merge.report.style import short
from adaptive_merge.report.terms import ORACLE, guard_warnings, meaning, protocol
from adaptive_merge.runs.reading import Run
from adaptive_merge.runs.results import uses_labels

__all__ = ["Card", "cards", "duration", "gap_closed", "warnings_of"]

_CHANCE = 0.005  # half a percentage point: smaller losses are not worth a warning
_FEW = 100


@dataclass(frozen=True)
class Card:
    """One number at the top of a page."""

    name: str
    value: str
    note: str = ""


def cards(run: Run) -> list[Card]:
    """The numbers that sum up one run."""
    results, average = run.results, run.results["average"]
    closed, seconds = gap_closed(run), results.get("seconds", {})
    kind = "prequential mean" if results["online"] else "mean"
    shown = [
        *([Card("chosen by labels", ORACLE, "not a label-free result")] if uses_labels(results) else []),
        Card("protocol", short(protocol(run), 18), meaning(run)),
        Card(f"adapted {run.measure}", f"{percent(average['adapted']):.1f} %", f"{kind} of {len(run.merged)} tasks"),
        *_unseen(run),
        Card("gain over the merge", f"{gain(average['adapted'], average['initial']):+.1f}", "percentage points"),
        Card("gap closed", f"{100 * closed:.0f} %" if closed is not None else "–", "merge to experts, mean"),
        Card("steps", f"{results.get('steps', 0):,}", f"in {duration(seconds.get('adapt', 0))}"),
        Card(
            "trainable parameters",
            f"{results.get('trainable_parameters', 0):,}",
            f"recipe {short(results['recipe'], 18)}",
        ),
    ]
    if run.history is not None and np.isfinite(run.history.throughput).any():
        shown.append(Card("images a second", f"{np.nanmedian(run.history.throughput):,.0f}", "median while adapting"))
    if memory := results.get("peak_memory_bytes"):
        shown.append(Card("peak memory", f"{memory / 2**30:.2f} GiB", "of the whole run"))
    return shown


def _unseen(run: Run) -> list[Card]:
    tasks, average = run.results["unseen"].values()
    if not tasks:
        return []
    gained = gain(average["adapted"], average["initial"])
    note = f"mean of {len(tasks)} task{'s' if len(tasks) > 1 else ''}, {gained:+.1f} over the merge"
    return [Card("on unseen tasks", f"{percent(average['adapted']):.1f} %", note)]


def gap_closed(run: Run) -> float | None:
    """Mean over the merged tasks of the part of the gap to the expert that was closed; None where there is no gap."""
    parts = [part for part in recovered(run.merged).values() if part is not None]
    return float(np.mean(parts)) if parts else None


def warnings_of(run: Run) -> list[str]:
    """What a reader of this run should not miss, as plain sentences."""
    found = guard_warnings(run)
    for task, row in run.tasks.items():
        name = short(run.shown(task), 40)
        if row["adapted"] < row["initial"] - _CHANCE:
            lost = gain(row["initial"], row["adapted"])
            found.append(f"{name}: adaptation lost {lost:.1f} points against the merge that it started from.")
        if row["pretrained"] > row["adapted"] + _CHANCE:
            found.append(f"{name}: the pre-trained model beats the adapted merge.")
        elif row["pretrained"] > row["initial"] + _CHANCE:
            found.append(f"{name}: the pre-trained model beats the merge before adaptation.")
        if row["pretrained"] > row["individual"] + _CHANCE:
            found.append(f"{name}: the expert is worse than the pre-trained model on its own task.")
    few = [f"{short(task, 40)} ({row['n']:.0f})" for task, row in run.tasks.items() if row["n"] < _FEW]
    if few:
        found.append(f"Few test images, so that a single one weighs a percentage point or more: {', '.join(few)}.")
    if run.history is not None and not np.isfinite(run.history.coefficients).all():
        found.append("Some recorded coefficients are not finite.")
    found += _collapse(run)
    return found


def _collapse(run: Run) -> list[str]:
    """Entropy near zero without gained accuracy is the known way in which entropy minimisation fails."""
    found = []
    for task, row in run.tasks.items():
        curve = run.curve("entropy", task)
        if curve is None or len(curve[1]) < 10:
            continue
        if np.mean(curve[1][-5:]) < 0.02 and row["adapted"] < row["initial"]:
            found.append(f"{short(task, 40)}: entropy collapsed to almost zero while {run.measure} fell.")
    return found


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"
