"""Settings chosen without labels: solved from some images, judged by agreement with the experts on the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adaptive_merge.errors import InputError
from adaptive_merge.starts.base import Problem, Solution, Start
from adaptive_merge.starts.families import structure
from adaptive_merge.starts.predictions import Agreement, agreement, head_of, logits_of
from adaptive_merge.starts.regression import CompensatedRegression

__all__ = ["Choice", "Chosen", "Judged", "choose"]

# With fewer images a task, one held-out part is too small to tell settings apart, and all parts take their turn.
FEW_IMAGES = 64


@dataclass(frozen=True)
class Judged:
    """One row of the table: a start, and how far its models agree with the experts on images they have not seen."""

    start: Start
    agreement: Agreement


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        start: the one whose divergence is the smallest.
        table: all that were judged, in the order in which they were.
    """

    start: Start
    table: tuple[Judged, ...]


class Chosen(Start):
    """The compensated regression with its anchor's strength and extrapolation chosen without labels.

    λ is sought around .5·(16/n)², n images a task, then ρ, then the mixing of the targets: a handful of solves from
    a part of the images, and the last from all of them.

    Args:
        held_out: share of each task's images that settings are judged on.
        seed: of the division.
    """

    def __init__(self, held_out: float = 0.25, seed: int = 0) -> None:
        _check(held_out)
        self.held_out, self.seed = held_out, seed

    def solve(self, problem: Problem) -> Solution:
        expected = _expected(problem)
        count = _fewest(problem, expected)
        centre = strength_for(count)
        axes = {"strength": (centre / 3, centre, 3 * centre), "extrapolation": (1.0, 2.0, 3.0), "mixing": (0.5, 1.0)}
        choice = choose(problem, CompensatedRegression(centre, extrapolation=2.0), axes, self.held_out, self.seed)
        return replace(choice.start.solve(problem), choice=choice)


def strength_for(images: int) -> float:
    """λ by the number of images a task: the best in our measurements fell with its square."""
    return min(max(0.5 * (16 / images) ** 2, 5e-4), 1.0)


def choose(
    problem: Problem,
    start: Start,
    axes: Mapping[str, Sequence[Any]],
    held_out: float = 0.25,
    seed: int = 0,
) -> Choice:
    """Go through the settings one after another, and keep the value of each that agrees best with the experts.

    Agreement is the Jensen–Shannon divergence of the predictions: on the few images that can be held out, the share
    of equal classes is too coarse. Each process divides its own images; sums of all of them decide, so that all
    choose the same.

    Args:
        problem: with the heads of all tasks.
        start: where to begin; its class is kept.
        axes: constructor argument → values to try, in order of importance.
        held_out: share of each task's images that settings are judged on, in (0, .5].
        seed: of the division.

    Raises:
        InputError: a task with fewer than two images; no head.
    """
    _check(held_out)
    judge = _Judge(problem, held_out, seed)
    best = judge(start)
    for name, values in axes.items():
        rivals = [judge(type(start)(**(best.start.settings | {name: value}))) for value in values]
        best = min([best, *rivals], key=lambda judged: judged.agreement.divergence)
    return Choice(best.start, tuple(judge.table.values()))


class _Judge:
    """Solves from parts of the images and scores on the others; a start is judged once."""

    def __init__(self, problem: Problem, held_out: float, seed: int) -> None:
        self.problem, self.tower = problem, structure(problem.backbone)
        self.expected = _expected(problem)
        count = _fewest(problem, self.expected)
        if count < 2:
            raise InputError("`images` has a task with one image; a choice needs one to solve from and one to judge by")
        self.parts = max(round(1 / held_out), 2)
        self.turns = min(self.parts, count) if count < FEW_IMAGES else 1
        self.part_of = {task: _parts(len(rows), self.parts, seed, task) for task, rows in self.expected.items()}
        self.table: dict[str, Judged] = {}

    def __call__(self, start: Start) -> Judged:
        if repr(start) not in self.table:
            total = sum(self._turn(start, turn) for turn in range(self.turns))
            share, divergence = (total[:2] / total[2]).tolist()
            self.table[repr(start)] = Judged(start, Agreement(share, divergence))
        return self.table[repr(start)]

    def _turn(self, start: Start, turn: int) -> Tensor:
        """Agreeing images, divergence and images of one held-out part, over all processes and tasks; [3]."""
        kept = {task: _Part(self.problem.images[task], part != turn) for task, part in self.part_of.items()}
        solution = start.solve(replace(self.problem, images=kept, store=None, progress=None))
        weights = self.problem.experts.layout.unflatten(solution.weights) | self.problem.buffers | solution.buffers
        # A task weighs as much as another, whatever its number of images.
        return sum(self._score(weights, task, part == turn) for task, part in self.part_of.items())

    @torch.no_grad()
    def _score(self, weights: Mapping[str, Tensor], task: str, held: Tensor) -> Tensor:
        head, expected = head_of(self.problem, task), self.expected[task][held]
        total, done = torch.zeros(3, dtype=torch.float64, device=head.device), 0
        for batch in _Part(self.problem.images[task], held):
            logits = logits_of(self.tower, weights, batch.to(head.device), head)
            total += agreement(logits, expected[done : done + len(batch)])
            done += len(batch)
        total = self.problem.reduce(total)
        return total / total[2].clamp_min(1)


class _Part:
    """Those of a task's images that a mask [N] names, batch by batch as they come."""

    def __init__(self, batches: Any, mask: Tensor) -> None:
        self.batches, self.mask = batches, mask

    def __iter__(self) -> Iterator[Tensor]:
        done = 0
        for batch in self.batches:
            kept = batch[self.mask[done : done + len(batch)].to(batch.device)]
            done += len(batch)
            if len(kept):
                yield kept


@torch.no_grad()
def _expected(problem: Problem) -> dict[str, Tensor]:
    """What each expert says of its task's images on this process: logits [N, C]."""
    tower: nn.Module = structure(problem.backbone)
    logits = {}
    for task in problem.experts.tasks:
        head, weights = head_of(problem, task), problem.expert(task) | problem.buffers
        rows = [logits_of(tower, weights, batch, head) for batch in problem.batches(task)]
        logits[task] = torch.cat(rows) if rows else head.new_zeros(0, len(head))
    return logits


def _fewest(problem: Problem, expected: Mapping[str, Tensor]) -> int:
    """Images of the task that has the fewest, over all processes."""
    counts = torch.tensor([float(len(rows)) for rows in expected.values()], device=problem.anchor.device)
    return int(problem.reduce(counts).min())


def _parts(count: int, parts: int, seed: int, task: str) -> Tensor:
    """int64 [count]: the part of each image, in random order and as equal in size as can be."""
    generator = torch.Generator().manual_seed(seed + sum(task.encode()))
    return torch.arange(count)[torch.randperm(count, generator=generator)] % parts


def _check(held_out: float) -> None:
    if not 0 < held_out <= 0.5:
        raise InputError(f"`held_out` is the share of the images to judge by, above 0 and up to .5; got {held_out}")
