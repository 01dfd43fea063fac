"""On what terms a run was made, in words: protocol, the choice of the step, what the guard saw."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaptive_merge.engine.views import percent
from adaptive_merge.report.style import short
from adaptive_merge.runs.reading import Run
from adaptive_merge.runs.record import MEASURES
from adaptive_merge.runs.results import MOST_WARNINGS
from adaptive_merge.runs.shown import footing, uses_labels

__all__ = [
    "ORACLE",
    "alarms",
    "choice",
    "guard_warnings",
    "meaning",
    "protocol",
    "sentence",
    "start",
    "start_choices",
    "terms",
]

ORACLE = "ORACLE"
_NOT_RECORDED = "not recorded"
_MEANING = {
    "transductive": "adapted on the images that are scored",
    "holdout": "scored on images that it never adapted on",
    "online": "one pass: each image was predicted before it was used",
    "unseen": "some of the tasks were neither merged nor adapted on",
}
_CHOICES = {
    "agreement": "it agreed most with the experts",
    "js": "its Jensen–Shannon divergence to the experts was the smallest",
    "entropy": "its predictions had the smallest entropy",
}
_SIGNALS = {
    "agreement": "images that lost the experts' class",
    "marginal": "predictions that crowd into few classes",
    "class": "a class that gets far more predictions than the expert gives it",
    "norm": "features of another length than the expert's",
    "coefficients": "coefficients out of the usual range",
}


def protocol(run: Run) -> str:
    """Its name."""
    record = run.results["protocol"]
    return str(record["name"]) if record else _NOT_RECORDED


def meaning(run: Run) -> str:
    """What the protocol means, in a few words; empty where it is not known."""
    return _MEANING.get(protocol(run), "")


def terms(run: Run) -> str:
    """What has to be the same where two runs are compared: protocol, corruption, measure, whether labels had a part."""
    data = run.config.get("data")
    data = data if isinstance(data, Mapping) else {}
    parts = [protocol(run), *_arguments(data.get("protocol"))]
    if data.get("corruption"):
        parts.append("images corrupted by " + ", ".join(_arguments(data["corruption"])))
    if run.measure != "accuracy":
        parts.append(f"scored by {MEASURES[run.measure]}")
    return ", ".join([*parts, ORACLE] if uses_labels(run.results) else parts)


def sentence(run: Run) -> str:
    """The protocol with its settings, and how many images were adapted on and scored."""
    if run.results["protocol"] is None:
        return "The protocol was not recorded."
    text = footing(run.results)
    settings = terms(run).split(", ", 1)[1:]
    return f"{text[0].upper()}{text[1:]}{f' ({settings[0]})' if settings else ''}."


def choice(run: Run) -> str:
    """Which step was kept and why; empty where it was not recorded."""
    guard = run.results["guard"]
    kept, select = guard.get("kept_step"), guard.get("select")
    if guard.get("stopped") or kept is None:
        return ""
    if uses_labels(run.results):
        return f"Step {kept} was kept: labels chose it by the best validated accuracy. Not a label-free result."
    if select in _CHOICES:
        return f"Step {kept} was kept: of those that were looked at, {_CHOICES[select]}. No label had a part in it."
    return f"The last step, {kept}, was kept."


def start(run: Run) -> str:
    """What a start was, what it gave, and which settings were chosen and why; empty where there was none."""
    record = run.results["start"]
    if not record:
        return ""
    counts = sorted(set(record["images"].values()))
    images = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    average = run.results["average"]
    return (
        f"Start: {short(record['kind'], 60)}{_settings(record)}, solved from {images} unlabelled images a task in "
        f"{record['seconds']:.0f} s. The static merge before it: {percent(average['anchor']):.1f} %; after it, before "
        f"the first step: {percent(average['initial']):.1f} %.{_chosen(run)}"
    )


def _settings(record: Mapping[str, Any]) -> str:
    words = ", ".join(f"{name} {short(value, 30)}" for name, value in (record.get("settings") or {}).items())
    return f" ({short(words, 200)})" if words else ""


def _chosen(run: Run) -> str:
    """Which of the settings of a start was chosen, and why."""
    rows = start_choices(run)
    for row in rows:
        if row.get("chosen"):
            return (
                f" Of {len(rows)} settings, {row['words'] or 'these'} were chosen without labels, by the divergence of "
                f"the predictions from the experts' on images held out of the sums: {row['js']:.4f} nats, of "
                f"{min(one['js'] for one in rows):.4f} to {max(one['js'] for one in rows):.4f} in all; what is better "
                "by less than the noise of so few images is not preferred."
            )
    return ""


def start_choices(run: Run) -> list[dict[str, Any]]:
    """The settings that a start was chosen from: in words, agreement in [0, 1], JS divergence, and whether chosen."""
    rows = (run.results["start"] or {}).get("choice", [])
    names = dict.fromkeys(name for row in rows for name in row["settings"])
    changing = [name for name in names if len({str(row["settings"].get(name)) for row in rows}) > 1]
    return [
        {**row, "words": ", ".join(f"{name} {short(str(row['settings'].get(name)), 20)}" for name in changing)}
        for row in rows
    ]


def alarms(run: Run) -> list[str]:
    """What must not be missed: that labels chose, that the guard ended the run."""
    sentences = []
    if uses_labels(run.results):
        sentences.append(f"{ORACLE}: labels chose the step that was kept: not a label-free result.")
    if stopped := run.results["guard"].get("stopped"):
        sentences.append(
            f"The guard ended this run at step {stopped['step']}: {short(stopped['reason'], 200)}. "
            f"The model was set back to step {stopped['restored_step']}."
        )
    return sentences


def guard_warnings(run: Run) -> list[str]:
    """One sentence per signal: which tasks, since when, how often."""
    seen: dict[str, dict[Any, list[int]]] = {}
    warnings = run.results["guard"].get("warnings", [])
    for warning in warnings:
        seen.setdefault(warning["signal"], {}).setdefault(warning["task"], []).append(warning["step"])
    sentences = []
    for signal, tasks in seen.items():
        cases = [
            f"{'all tasks together' if task is None else short(task, 40)} from step {min(steps)}, "
            + ("once" if len(steps) == 1 else f"{len(steps)} times")
            for task, steps in tasks.items()
        ]
        sentences.append(f"The guard saw {_SIGNALS.get(signal, short(signal, 40))}: {'; '.join(cases)}.")
    if len(warnings) >= MOST_WARNINGS:
        sentences.append(f"Only the guard's first {MOST_WARNINGS} warnings were recorded; there may have been more.")
    return sentences


def _arguments(part: Any) -> list[str]:
    """Of a configured class: "name value"; nothing where the configuration does not say."""
    if not isinstance(part, Mapping):
        return []
    settings = part.get("init_args", {} if "class_path" in part else part) or {}
    return [f"{name} {_text(value)}" for name, value in settings.items()]


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
