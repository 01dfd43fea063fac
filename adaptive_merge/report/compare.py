"""Several runs side by side: groups that differ in the seed alone, tests on pairs, overlays."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive_merge.report import figures
from adaptive_merge.report.figures import recovered
from adaptive_merge.report.runs import Run
from adaptive_merge.report.sections import Plan
from adaptive_merge.report.statistics import mean_and_deviation, sign_flip_test
from adaptive_merge.report.style import printable

__all__ = ["Contrast", "Group", "comparison_plans", "contrasts", "group_runs"]

_NOT_A_METHOD = ("seed_everything", "run", "ckpt_path", "weights_only", "trainer")


@dataclass(frozen=True)
class Group:
    """Runs of one configuration, apart from seed, folder and trainer."""

    name: str
    runs: list[Run]

    def values(self, view: str = "adapted") -> list[float]:
        """Average accuracy of each run."""
        return [run.results["average"][view] for run in self.runs]

    def per_task(self) -> dict[str, list[float]]:
        """Task → adapted accuracy of each run."""
        found: dict[str, list[float]] = {}
        for run in self.runs:
            for task, row in run.tasks.items():
                found.setdefault(task, []).append(row["adapted"])
        return found

    @property
    def spread(self) -> tuple[float, float | None]:
        """Mean and standard deviation of the adapted average over the runs."""
        return mean_and_deviation(self.values())

    @property
    def gap(self) -> float | None:
        """Mean part of the gap to the experts that was closed."""
        parts = [part for run in self.runs for part in recovered(run.tasks).values() if part is not None]
        return float(np.mean(parts)) if parts else None


@dataclass(frozen=True)
class Contrast:
    """A group against the best one: mean difference, pairs and p, over tasks and over seeds."""

    name: str
    reference: str
    difference: float
    tasks: int
    p_tasks: float | None
    seeds: int
    p_seeds: float | None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs of one method together, best group first; groups of one recipe are told apart by a run's name."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        method = {key: value for key, value in run.config.items() if key not in _NOT_A_METHOD}
        steps = run.results.get("steps")
        members.setdefault(json.dumps([run.results["recipe"], steps, method], sort_keys=True, default=str), []).append(
            run
        )
    recipes = [group[0].results["recipe"] for group in members.values()]
    groups = [
        Group(
            group[0].results["recipe"]
            if recipes.count(group[0].results["recipe"]) == 1
            else f"{group[0].results['recipe']} ({group[0].name})",
            group,
        )
        for group in members.values()
    ]
    return sorted(groups, key=lambda group: -group.spread[0])


def contrasts(groups: Sequence[Group]) -> list[Contrast]:
    """Every group but the first against the first, on the tasks and seeds that both have."""
    return [_contrast(groups[0], other) for other in groups[1:]]


def _contrast(best: Group, other: Group) -> Contrast:
    first, second = best.per_task(), other.per_task()
    tasks = [float(np.mean(second[task]) - np.mean(first[task])) for task in second if task in first]
    seeded = [{run.results["seed"]: run.results["average"]["adapted"] for run in group.runs} for group in (best, other)]
    same_tasks = first.keys() == second.keys()
    seeds = [seeded[1][seed] - seeded[0][seed] for seed in seeded[1] if seed in seeded[0]] if same_tasks else []
    return Contrast(
        other.name,
        best.name,
        float(np.mean(tasks)) if tasks else float("nan"),
        len(tasks),
        sign_flip_test(tasks),
        len(seeds),
        sign_flip_test(seeds),
    )


def comparison_plans(groups: Sequence[Group]) -> Iterator[Plan]:
    """Overlays of all groups."""
    named = {f"{index + 1} {printable(group.name, 20)}": group for index, group in enumerate(groups)}
    yield (
        "Adapted accuracy per task",
        "Bars are means of a group, dots its runs.",
        lambda: figures.compare_bars({name: group.per_task() for name, group in named.items()}),
        False,
    )
    for quantity, title in (("entropy", "Normalised entropy"), ("loss", "Loss")):
        curves = {
            name: found
            for name, group in named.items()
            if (found := [curve for run in group.runs if (curve := run.curve(quantity))])
        }
        if curves:
            yield (
                f"{title} over the steps",
                "A line a run, a colour a group.",
                lambda curves=curves, title=title: figures.compare_curves(curves, title.lower()),
                False,
            )
    means = {
        name: [(run.history.steps, run.history.coefficients.mean((1, 2))) for run in group.runs if run.history]
        for name, group in named.items()
    }
    if any(means.values()):
        yield (
            "Mean coefficient over the steps",
            "Over all tasks and layers: how far each method moved from where it started.",
            lambda: figures.compare_curves({name: found for name, found in means.items() if found}, "mean coefficient"),
            False,
        )
