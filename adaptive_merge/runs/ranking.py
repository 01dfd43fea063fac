"""Which of several finished runs to take, without labels: by what their merges say beside their experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.markup import escape
from rich.table import Table

from adaptive_merge.engine.scoring import CRITERIA
from adaptive_merge.errors import InputError, did_you_mean, printable
from adaptive_merge.runs.reading import Run
from adaptive_merge.runs.shown import uses_labels

__all__ = ["BY", "Candidate", "check_by", "conclusion", "marked", "rank", "table"]

ORACLE: Final = "oracle"
BY: Final = (*CRITERIA, ORACLE)
"""The criteria without labels, and `oracle`: the average accuracy, which labels make."""
_SIGNS: Final = CRITERIA | {ORACLE: 1}
_DIGITS: Final = 4


@dataclass(frozen=True)
class Candidate:
    """One run among others.

    Args:
        name: what people call it.
        folder: of the run.
        values: setting → value, what tells it from the others.
        run: as read from the folder; None where it did not finish.
        problem: why it did not.
    """

    name: str
    folder: Path
    values: Mapping[str, Any] = field(default_factory=dict)
    run: Run | None = None
    problem: str = ""

    @property
    def collapsed(self) -> bool:
        """Whether the guard ended it; then the best state that it saw is what is ranked."""
        return bool(self.run and self.run.results.get("guard", {}).get("stopped"))

    @property
    def labelled(self) -> bool:
        """Whether labels chose its step."""
        return bool(self.run and uses_labels(self.run.results))

    def criterion(self, by: str, view: str = "adapted") -> float | None:
        """Mean over the tasks, on the scored images; None where there is no finite value.

        Args:
            by: one of `BY`.
            view: `"adapted"`, or `"initial"` for the merge that the run started from.
        """
        if self.run is None:
            return None
        if by == ORACLE and self.run.measure != "accuracy":
            return None
        found = self.run.results["average"] if by == ORACLE else self.run.results.get("criteria", {}).get(view, {})
        value = found.get(view if by == ORACLE else by)
        return value if value is not None and math.isfinite(value) else None


def check_by(by: str) -> None:
    """InputError where `by` is not one of `BY`."""
    if by not in BY:
        raise InputError(f"--by {by}: there is no such criterion{did_you_mean(by, BY)}")


def rank(candidates: Sequence[Candidate], by: str) -> list[Candidate]:
    """Best first; equals stay in the given order, runs without a value of the criterion come last.

    Raises:
        InputError: the finished runs did not score the same images, tasks and experts.
    """
    finished = [one for one in candidates if one.run]
    for other in finished[1:]:
        _check_comparable(finished[0], other)
    sign = -_SIGNS[by]
    values = {id(one): one.criterion(by) for one in candidates}
    return sorted(candidates, key=lambda one: math.inf if (value := values[id(one)]) is None else sign * value)


def marked(candidates: Sequence[Candidate], by: str) -> bool:
    """Whether labels have a part in the ranking, or in one of the runs."""
    return by == ORACLE or any(one.labelled for one in candidates)


def table(ranked: Sequence[Candidate], by: str) -> Table:
    """A row per run, best first: what was varied, the criteria, and accuracies for the oracle alone."""
    title = "ORACLE: ranked by accuracy, with labels" if by == ORACLE else f"ranked by {by}, without labels"
    view = Table(title=title, title_justify="left")
    keys = list(ranked[0].values) or ["run"]
    for name in keys:
        view.add_column(escape(name).replace(".init_args", ""), overflow="fold")
    shown = (*CRITERIA, *([ORACLE] if by == ORACLE else []))
    view.add_column(f"{_label(by)} at the start", justify="right")
    for name in shown:
        view.add_column(_label(name), justify="right", style="bold" if name == by else "")
    view.add_column("note", overflow="fold")
    for one in ranked:
        settings = [escape(printable(str(value))) for value in one.values.values()] or [escape(printable(one.name))]
        cells = [one.criterion(by, "initial"), *(one.criterion(name) for name in shown)]
        numbers = ["" if value is None else f"{value:.{_DIGITS}f}" for value in cells]
        view.add_row(*settings, *numbers, escape(printable(_note(one, by))))
    return view


def conclusion(ranked: Sequence[Candidate], by: str) -> str:
    """The winner in words, and a warning where not even the winner is better than a merge that was not adapted.

    Raises:
        InputError: no run has a value of the criterion.
    """
    best = ranked[0]
    value = best.criterion(by)
    if value is None:
        raise InputError(f"none of {len(ranked)} runs has finished with a value of {by!r}; see the notes above")
    start = best.criterion(by, "initial")
    from_start = "" if start is None else f", from {start:.{_DIGITS}f} at the start"
    oracle = " (ORACLE: labels chose it)" if by == ORACLE else ""
    told = f"best by {by}{oracle}: {best.name}, {value:.{_DIGITS}f}{from_start}; it is in {best.folder}"
    if best.labelled:
        told += "\nORACLE: labels chose the step that this run kept (--run.select oracle)"
    starts = [found for one in ranked if (found := one.criterion(by, "initial")) is not None]
    if starts and not _SIGNS[by] * value > max(_SIGNS[by] * start for start in starts):
        told += f"\nby {by}, no run is better than the best merge that one started from: adapting does not pay here"
    return told


def _check_comparable(first: Candidate, other: Candidate) -> None:
    ours, theirs = _compared(first.run), _compared(other.run)
    for name, value in ours.items():
        if theirs[name] != value:
            raise InputError(
                f"{first.folder} and {other.folder} differ in {name}: {value} and {theirs[name]}; a "
                "criterion compares runs on the same images, tasks and experts only"
            )


def _compared(run: Run) -> dict[str, Any]:
    """What has to be equal for a criterion to mean the same."""
    protocol = run.results.get("protocol") or {}
    suite, data = (run.config.get(part) or {} for part in ("suite", "data"))
    return {
        "tasks": list(run.tasks),
        "protocol": data.get("protocol") or protocol.get("name"),
        "split": suite.get("split"),
        "corruption": data.get("corruption"),
        "scored images": protocol.get("scored_on"),
        "experts": run.results.get("experts"),
    }


def _note(one: Candidate, by: str) -> str:
    notes = [
        one.problem,
        "collapsed, best state kept" if one.collapsed else "",
        "ORACLE: labels chose its step" if one.labelled else "",
        f"no {by} in results.json" if one.run and one.criterion(by) is None else "",
    ]
    return "; ".join(note for note in notes if note)


def _label(by: str) -> str:
    return "accuracy (ORACLE)" if by == ORACLE else by
