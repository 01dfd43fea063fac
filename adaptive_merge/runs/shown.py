"""Results as a table and in words; neither Lightning nor a module is needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from adaptive_merge.engine.views import ROUTED, VIEWS, gain, percent
from adaptive_merge.errors import printable
from adaptive_merge.runs.record import MEASURES

__all__ = ["footing", "gains", "table", "uses_labels"]


def table(results: Mapping[str, Any]) -> Table:
    """Accuracies, or agreements, in percent, a row per task, and the gain over the merge that the run started from."""
    chosen = " (ORACLE: labels chose the step)" if uses_labels(results) else ""
    measure = MEASURES[results.get("measure", "accuracy")]
    title = f"{_shown(results['recipe'])}: {measure} in %{chosen}"
    view = Table(title=title, title_justify="left", caption=_made(results), caption_justify="left")
    view.add_column("task")
    started = "anchor" in results["average"]
    for name in ("pre-trained", "individual", "merged", *(["start"] * started), "adapted", "gain"):
        view.add_column(name, justify="right")
    routing = results.get("routing") or None
    for name in ("task found", "task known", "task unknown") if routing else ():
        view.add_column(name, justify="right")
    unseen = results.get("unseen", {"tasks": []})
    for task, row in results["tasks"].items():
        name = f"{task} (unseen)" if task in unseen["tasks"] else task
        view.add_row(_shown(name), *_cells(row), *_routed_cells(routing, task))
    view.add_section()
    view.add_row("average", *_cells(results["average"]), *_routed_cells(routing), style="bold")
    if unseen["tasks"]:
        view.add_row("average of the unseen", *_cells(unseen["average"]), style="bold")
    return view


def _made(results: Mapping[str, Any]) -> str | None:
    """What a run without steps is, in words."""
    if results.get("steps"):
        return None
    began = "the start is all there is" if results.get("start") else "the merge as it was made"
    return f"A static recipe, no step, nothing was trained: “adapted” is {began}."


def uses_labels(results: Mapping[str, Any]) -> bool:
    """Whether labels had a part in what was learned or kept."""
    return results.get("guard", {}).get("select") == "oracle"


def gains(results: Mapping[str, Any]) -> str:
    """What was gained by what, in points of the mean accuracy, in one line; empty where nothing could be gained."""
    average = results["average"]
    merged = average.get("anchor", average["initial"])
    parts = [f"{gain(average['initial'], merged):+.1f} by the start"] if "anchor" in average else []
    parts += [f"{gain(average['adapted'], average['initial']):+.1f} by adaptation"] if results["steps"] else []
    if not parts or results.get("measure", "accuracy") != "accuracy":
        return ""
    ends = f"{percent(average['adapted']):.1f} %, the experts {percent(average['individual']):.1f} %"
    return f"{percent(merged):.1f} % merged, {', '.join(parts)}: {ends}"


def footing(results: Mapping[str, Any]) -> str:
    """The protocol in a few words: what was adapted on, what was scored."""
    protocol = results["protocol"]
    adapted, scored = (sum(protocol[part].values()) for part in ("adapted_on", "scored_on"))
    words = ", each predicted before it was used" if results.get("online") else ""
    if corruption := results.get("corruption"):
        words += f"; {corruption['kind']}, severity {corruption['severity']}"
    words += "; the task unknown" * (results.get("routing", {}).get("task") == "unknown")
    return f"protocol {protocol['name']}: adapted on {adapted:,} images, scored on {scored:,}{words}"


def _cells(row: Mapping[str, float]) -> list[str]:
    """The gain is over the static merge: of a start and of the steps together."""
    gained = gain(row["adapted"], row.get("anchor", row["initial"]))
    shown = [view for view in (*VIEWS[:2], "anchor", *VIEWS[2:]) if view in row]
    return [*(f"{percent(row[view]):.1f}" for view in shown), f"{gained:+.1f}"]


def _shown(name: str) -> str:
    """A name as rich shows it letter by letter."""
    return escape(printable(name))


def _routed_cells(routing: Mapping[str, Any] | None, task: str | None = None) -> list[str]:
    """How a route does on a task, or on average."""
    row = {} if routing is None else routing["average"] if task is None else routing["tasks"].get(task, {})
    return [f"{100 * row[name]:.1f}" for name in ROUTED if name in row]
