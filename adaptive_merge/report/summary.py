"""A run in a few numbers and sentences: cards and warnings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from adaptive_merge.engine.views import gain, percent
from adaptive_merge.report.figures import recovered
from adaptive_merge.report.statistics import half_width, independent_images, paired_images
from adaptive_merge.report.style import short
from adaptive_merge.report.terms import ORACLE, guard_warnings, meaning, protocol
from adaptive_merge.runs.reading import Run
from adaptive_merge.runs.shown import uses_labels

__all__ = ["Card", "cards", "duration", "gap_closed", "probability", "warnings_of"]

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
    closed = gap_closed(run)
    kind = "prequential mean" if results["online"] else "mean"
    reach = f"± {100 * half_width(run.merged, 'adapted'):.1f} (95 %, binomial)"
    return [
        *([Card("chosen by labels", ORACLE, "not a label-free result")] if uses_labels(results) else []),
        Card(
            f"adapted {run.measure}",
            f"{percent(average['adapted']):.1f} %",
            f"{kind} of {len(run.merged)} tasks, {reach}",
        ),
        *_unseen(run),
        _gain(run),
        *_start(run),
        Card("gap closed", f"{100 * closed:.0f} %" if closed is not None else "none", "merge to experts, mean"),
        Card("protocol", short(protocol(run), 18), meaning(run)),
        *_cost(run),
    ]


def _gain(run: Run) -> Card:
    """Over the static merge, start and steps together, with the test that says whether it is one."""
    gained = gain(run.results["average"]["adapted"], run.results["average"][run.base])
    before, after = run.verdicts(run.base), run.verdicts()
    if before.keys() == after.keys() == run.merged.keys():
        test = paired_images(*({task: right for task, (_, right) in one.items()} for one in (before, after)))
    else:
        scores = (
            {task: {"n": row["n"], "adapted": row[view]} for task, row in run.merged.items()}
            for view in (run.base, "adapted")
        )
        test = independent_images(*scores)
    verdict = "" if test.significant else "not significant: "
    return Card("gain over the merge", f"{gained:+.1f}", f"points; {verdict}p {probability(test.p)}, {test.words}")


def _start(run: Run) -> list[Card]:
    if run.base == "initial":
        return []
    before, after = (run.results["average"][view] for view in ("anchor", "initial"))
    return [Card("the start gave", f"{gain(after, before):+.1f}", f"points, to {percent(after):.1f} %")]


def _cost(run: Run) -> list[Card]:
    """Steps, what learned, speed and memory."""
    results, steps = run.results, run.results.get("steps", 0)
    recipe = f"recipe {short(results['recipe'], 18)}"
    cost = [
        Card("steps", f"{steps:,}", f"in {duration(results['seconds'].get('adapt', 0))}" if steps else made(run)),
        Card("trainable parameters", f"{results.get('trainable_parameters', 0) if steps else 0:,}", recipe),
    ]
    if run.history is not None and np.isfinite(run.history.throughput).any():
        cost.append(Card("images a second", f"{np.nanmedian(run.history.throughput):,.0f}", "median while adapting"))
    if memory := results.get("peak_memory_bytes"):
        cost.append(Card("peak memory", f"{memory / 2**30:.2f} GiB", "of the whole run"))
    return cost


def made(run: Run) -> str:
    """What a run without steps is."""
    return "a static merge: nothing was trained" if run.base == "initial" else "nothing was trained after the start"


def _unseen(run: Run) -> list[Card]:
    tasks, average = run.results["unseen"].values()
    if not tasks:
        return []
    gained = gain(average["adapted"], average[run.base])
    note = f"mean of {len(tasks)} task{'s' if len(tasks) > 1 else ''}, {gained:+.1f} over the merge"
    return [Card("on unseen tasks", f"{percent(average['adapted']):.1f} %", note)]


def gap_closed(run: Run) -> float | None:
    """Mean over the merged tasks of the part of the gap to the expert that was closed; None where there is no gap."""
    scores = {task: run.scores(row) for task, row in run.merged.items()}
    parts = [part for part in recovered(scores).values() if part is not None]
    return float(np.mean(parts)) if parts else None


def warnings_of(run: Run) -> list[str]:
    """What a reader of this run should not miss, as plain sentences."""
    sentences = guard_warnings(run)
    for task, row in run.tasks.items():
        name = short(run.shown(task), 40)
        if row["adapted"] < row["initial"] - _CHANCE:
            lost = gain(row["initial"], row["adapted"])
            sentences.append(f"{name}: adaptation lost {lost:.1f} points against the merge that it started from.")
        if row["pretrained"] > row["adapted"] + _CHANCE:
            sentences.append(f"{name}: the pre-trained model beats the adapted merge.")
        elif row["pretrained"] > row["initial"] + _CHANCE:
            sentences.append(f"{name}: the pre-trained model beats the merge before adaptation.")
        if row["pretrained"] > row["individual"] + _CHANCE:
            sentences.append(f"{name}: the expert is worse than the pre-trained model on its own task.")
    few = [f"{short(task, 40)} ({row['n']:.0f})" for task, row in run.tasks.items() if row["n"] < _FEW]
    if few:
        sentences.append(f"Few test images, so that a single one weighs a percentage point or more: {', '.join(few)}.")
    if run.history is not None and not np.isfinite(run.history.coefficients).all():
        sentences.append("Some recorded coefficients are not finite.")
    sentences += _collapse(run)
    return sentences


def _collapse(run: Run) -> list[str]:
    """Entropy near zero without gained accuracy is the known way in which entropy minimisation fails."""
    sentences = []
    for task, row in run.tasks.items():
        curve = run.curve("entropy", task)
        if curve is None or len(curve[1]) < 10:
            continue
        if np.mean(curve[1][-5:]) < 0.02 and row["adapted"] < row["initial"]:
            sentences.append(f"{short(task, 40)}: entropy collapsed to almost zero while {run.measure} fell.")
    return sentences


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{seconds:.1f} s"


def probability(value: float | None) -> str:
    """A p value as people are shown it."""
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"
