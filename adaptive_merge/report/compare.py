"""Several runs side by side: groups that differ in the seed alone, tests on pairs, overlays."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adaptive_merge.report import figures
from adaptive_merge.report.panels import Plan
from adaptive_merge.report.statistics import (
    Difference,
    half_width,
    independent_images,
    mean_and_deviation,
    paired_images,
    sign_flip_test,
)
from adaptive_merge.report.style import short
from adaptive_merge.report.summary import gap_closed
from adaptive_merge.report.terms import ORACLE, protocol, terms
from adaptive_merge.runs.reading import Run
from adaptive_merge.runs.shown import uses_labels

__all__ = ["Contrast", "Group", "alike", "comparison_plans", "contrasts", "difference", "group_runs"]

_BARS = 5  # with more groups than this a table says more than bars
_OVERLAID = 8  # colours that are told apart
_NOT_A_METHOD = ("seed_everything", "run", "ckpt_path", "weights_only", "trainer")


@dataclass(frozen=True)
class Group:
    """Runs of one configuration and on one protocol, apart from seed, folder and trainer."""

    name: str
    runs: list[Run]

    @property
    def terms(self) -> str:
        """What two groups have to share where they are compared, see `terms.terms`."""
        return terms(self.runs[0])

    def values(self, view: str = "adapted") -> list[float]:
        """Average accuracy of each run."""
        return [run.results["average"][view] for run in self.runs]

    def per_task(self) -> dict[str, list[float]]:
        """Merged task → adapted accuracy of each run."""
        accuracies: dict[str, list[float]] = {}
        for run in self.runs:
            for task, row in run.merged.items():
                accuracies.setdefault(task, []).append(row["adapted"])
        return accuracies

    def scores(self) -> dict[str, dict[str, float]]:
        """Merged task → number of scored images, and mean adapted accuracy over the runs."""
        images = self.runs[0].merged
        return {
            task: {"n": images[task]["n"], "adapted": float(np.mean(values))}
            for task, values in self.per_task().items()
            if task in images
        }

    def verdicts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Merged task → labels, and the share of the runs that were right about each image, [n] each.

        Only tasks of which every run kept what it said, about the same images.
        """
        first, *others = (run.verdicts() for run in self.runs)
        kept = {task: [pair, *(other[task] for other in others if task in other)] for task, pair in first.items()}
        return {
            task: (pairs[0][0], np.mean([right for _, right in pairs], axis=0))
            for task, pairs in kept.items()
            if len(pairs) == len(self.runs) and all(np.array_equal(pairs[0][0], labels) for labels, _ in pairs)
        }

    @property
    def spread(self) -> tuple[float, float | None]:
        """Mean and standard deviation of the adapted average over the runs."""
        return mean_and_deviation(self.values())

    @property
    def gap(self) -> float | None:
        """Mean part of the gap to the experts that was closed."""
        return _mean(gap_closed(run) for run in self.runs)

    @property
    def calibration_error(self) -> float | None:
        """Mean expected calibration error of the adapted model."""
        return _mean(run.calibration_error("adapted") for run in self.runs)

    @property
    def agreement(self) -> float | None:
        """Mean agreement of the adapted model with the experts."""
        return _mean(run.criterion("adapted", "agreement") for run in self.runs)


@dataclass(frozen=True)
class Contrast:
    """A group against the best one on the same terms: difference over images, pairs and p over tasks and over seeds."""

    terms: str
    name: str
    reference: str
    images: Difference
    tasks: int
    p_tasks: float | None
    seeds: int
    p_seeds: float | None


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs of one method and one protocol together; the best group first within each protocol, oracles last."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        method = {key: value for key, value in run.config.items() if key not in _NOT_A_METHOD}
        guard = run.results["guard"].get("select")
        key = [run.results["recipe"], terms(run), guard, _asked(run, "guard"), _steps(run), method]
        members.setdefault(json.dumps(key, sort_keys=True, default=str), []).append(run)
    firsts = [group[0] for group in members.values()]
    groups = [Group(_name(group[0], firsts), group) for group in members.values()]
    return sorted(groups, key=lambda group: (uses_labels(group.runs[0].results), group.terms, -group.spread[0]))


def alike(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Terms → the groups that may be compared with one another, in their order."""
    by_terms: dict[str, list[Group]] = {}
    for group in groups:
        by_terms.setdefault(group.terms, []).append(group)
    return by_terms


def contrasts(groups: Sequence[Group]) -> list[Contrast]:
    """Every group but the best against the best on the same terms, on the tasks and seeds that both have."""
    pairs = [_contrast(first, other) for first, *others in alike(groups).values() for other in others]
    return [pair for pair in pairs if pair is not None]


def difference(first: Group, second: Group) -> Difference | None:
    """Second less first on the tasks of both: paired over images where all runs kept what they said, else binomial.

    The variance over seeds of a group of several runs is added to that over images. None without a common task.
    """
    seeds = sum((group.spread[1] or 0.0) ** 2 / len(group.runs) for group in (first, second))
    scores = [group.scores() for group in (first, second)]
    tasks = [task for task in scores[0] if task in scores[1]]
    if not tasks:
        return None
    verdicts = [group.verdicts() for group in (first, second)]
    if all(
        task in verdicts[0] and task in verdicts[1] and np.array_equal(verdicts[0][task][0], verdicts[1][task][0])
        for task in tasks
    ):
        return paired_images(*({task: one[task][1] for task in tasks} for one in verdicts), seeds=seeds)
    return independent_images(*({task: one[task] for task in tasks} for one in scores), seeds=seeds)


def _name(run: Run, others: Sequence[Run]) -> str:
    """The recipe; with the protocol or else the run's name where that is not enough."""
    recipe, same = run.results["recipe"], [one for one in others if one.results["recipe"] == run.results["recipe"]]
    if len(same) > 1:
        own = [protocol(one) for one in same].count(protocol(run)) == 1
        recipe = f"{recipe}, {protocol(run)}" if own else f"{recipe} ({run.name})"
    return f"{ORACLE} {recipe}" if uses_labels(run.results) else recipe


def _steps(run: Run) -> int | None:
    """What the configuration asked for, so that a run that the guard ended stays with its other seeds."""
    if run.results["online"]:
        return None  # the images of the pass say how many
    trainer = run.config.get("trainer")
    asked = trainer.get("max_steps") if isinstance(trainer, dict) else None
    return asked if isinstance(asked, int) and asked > 0 else run.results.get("steps")


def _asked(run: Run, name: str) -> object:
    asked = run.config.get("run")
    return asked.get(name) if isinstance(asked, dict) else None


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _contrast(best: Group, other: Group) -> Contrast | None:
    images = difference(best, other)
    if images is None:
        return None
    first, second = best.per_task(), other.per_task()
    tasks = [float(np.mean(second[task]) - np.mean(first[task])) for task in second if task in first]
    seeded = [{run.results["seed"]: run.results["average"]["adapted"] for run in group.runs} for group in (best, other)]
    same_tasks = first.keys() == second.keys()
    seeds = [seeded[1][seed] - seeded[0][seed] for seed in seeded[1] if seed in seeded[0]] if same_tasks else []
    return Contrast(
        best.terms,
        other.name,
        best.name,
        images,
        len(tasks),
        sign_flip_test(tasks),
        len(seeds),
        sign_flip_test(seeds),
    )


def comparison_plans(groups: Sequence[Group]) -> Iterator[Plan]:
    """Overlays of all groups: their means, their tasks, and the curves of the best few."""
    named = {f"{index + 1} {short(group.name, 20)}": group for index, group in enumerate(groups)}
    several = len(alike(groups)) > 1
    for shared in alike(groups):
        members = {name: group for name, group in named.items() if group.terms == shared}
        where = f", protocol {short(shared, 60)}" if several else ""
        yield from _of_alike(members, where)
    best = dict(list(named.items())[:_OVERLAID])
    rest = f" The first {_OVERLAID} of {len(named)} groups." if len(named) > _OVERLAID else ""
    for quantity, title in (("entropy", "Normalised entropy"), ("loss", "Loss")):
        curves = {
            name: lines
            for name, group in best.items()
            if (lines := [curve for run in group.runs if (curve := run.curve(quantity))])
        }
        if curves:
            yield (
                f"{title} over the steps",
                f"A line a run, a colour a group.{rest}",
                lambda curves=curves, title=title: figures.compare_curves(curves, title.lower()),
                False,
            )
    means = {
        name: [
            (run.history.steps, run.history.coefficients.mean((1, 2)))
            for run in group.runs
            if run.history and run.history.groups
        ]
        for name, group in best.items()
    }
    if any(means.values()):
        yield (
            "Mean coefficient over the steps",
            f"Over all tasks and layers: how far each method moved from where it started.{rest}",
            lambda: figures.compare_curves({name: lines for name, lines in means.items() if lines}, "mean coefficient"),
            False,
        )


def _of_alike(members: Mapping[str, Group], where: str) -> Iterator[Plan]:
    """Of groups on the same terms."""
    measure = next(iter(members.values())).runs[0].measure
    if len(members) > 1:
        intervals = {name: (group.values(), _whisker(group)) for name, group in members.items()}
        yield (
            f"Mean adapted {measure} of the groups{where}",
            "Of the merged tasks. A dot a run, a diamond their mean; bars are ± the standard deviation over seeds, or "
            "of a single run ± the binomial 95 % interval of its images.",
            lambda: figures.compare_means(intervals, measure),
            False,
        )
    tasks = {name: group.per_task() for name, group in members.items()}
    if len(members) <= _BARS:
        yield (
            f"Adapted {measure} per task{where}",
            "Merged tasks. Bars are means of a group, dots its runs; whiskers as for the means.",
            lambda: figures.compare_bars(tasks, measure, {name: group.scores() for name, group in members.items()}),
            False,
        )
    else:
        yield (
            f"Adapted {measure} per task{where}",
            "Merged tasks; means of a group in %.",
            lambda: figures.compare_table(tasks),
            False,
        )


def _whisker(group: Group) -> float:
    deviation = group.spread[1]
    return half_width(group.scores(), "adapted") if deviation is None else deviation
