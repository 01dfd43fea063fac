"""Settings chosen without labels: solved from some images, judged by agreement with the experts on the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import without_weights
from adaptive_merge.starts.base import Problem, Solution, Start
from adaptive_merge.starts.predictions import Agreement, agreement, heads_of, logits_of
from adaptive_merge.starts.regression import CompensatedRegression

__all__ = ["Choice", "ChosenRegression", "Judged", "choose"]

# Images a task to judge by; where one held-out part has fewer, others take their turn too. With 16 images a task the
# noise of the divergence was larger than what settings differ by, and cost a point of accuracy (embedded suite).
ENOUGH = 64


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


class ChosenRegression(Start):
    """The compensated regression with settings chosen without labels: nine solves from a part of the images, and one
    from all of them.

    First λ and ρ together, since an anchor that reaches further wants to be held to more; then λ; then the mixing of
    the targets, whether the stem is solved, and the weight of the other tokens.

    Args:
        held_out: share of each task's images that settings are judged on.
        seed: of the division.
    """

    def __init__(self, held_out: float = 0.25, seed: int = 0) -> None:
        _check(held_out)
        self.held_out, self.seed = held_out, seed

    def solve(self, problem: Problem) -> Solution:
        rounds, chosen = rounds_for(_fewest(problem, _expected(problem))), CompensatedRegression()
        choice = choose(problem, chosen, rounds[:1], self.held_out, self.seed)
        around = [{"strength": choice.start.settings["strength"] * factor} for factor in (1 / 3, 3)]
        choice = choose(problem, choice.start, [around, *rounds[1:]], self.held_out, self.seed, choice.table)
        return replace(choice.start.solve(problem), choice=choice)


def rounds_for(images: int) -> list[list[dict[str, Any]]]:
    """Settings worth trying, by the number of images a task.

    Near the anchor the best λ fell with the square of the number, further out with the number itself (embedded
    suite, 16 to 512 images a task).
    """
    near, far = min(max(0.5 * (16 / images) ** 2, 5e-4), 1.0), min(4.8 / images, 1.0)
    pairs = [(near, 1.0), (far, 2.0), (far, 3.0), (far, 4.0)]
    first = [{"strength": strength, "extrapolation": reach} for strength, reach in pairs]
    return [first, [{"mixing": 0.5}], [{"stem": True}], [{"other_tokens": 0.003}]]


def choose(
    problem: Problem,
    start: Start,
    rounds: Sequence[Sequence[Mapping[str, Any]]],
    held_out: float = 0.25,
    seed: int = 0,
    known: Sequence[Judged] = (),
) -> Choice:
    """Try settings round by round, and go on from those that agree best with the experts.

    Agreement is the Jensen–Shannon divergence of the predictions: on the few images that can be held out, the share
    of equal classes is too coarse. Each process divides its own images; sums over all of them decide, so that all
    choose the same.

    Args:
        problem: with the heads of all tasks.
        start: where to begin; its class is kept. It is judged itself only without rounds, or where it is `known`.
        rounds: of each round the constructor's arguments that replace those of the best so far.
        held_out: share of each task's images that settings are judged on, in (0, .5].
        seed: of the division.
        known: rows of an earlier choice on the same division.

    Raises:
        InputError: a task with fewer than two images; no head.
    """
    _check(held_out)
    judge = _Judge(problem, held_out, seed, known)
    contest = [judge(start)] if not rounds or repr(start) in judge.table else []
    for candidates in rounds:
        begin = contest[0].start if contest else start
        contest += [judge(type(begin)(**(begin.settings | dict(changes)))) for changes in candidates]
        contest = [min(contest, key=lambda judged: judged.agreement.divergence)]
    return Choice(contest[0].start, tuple(judge.table.values()))


class _Judge:
    """Solves from parts of the images and scores on the others; a start is judged once."""

    def __init__(self, problem: Problem, held_out: float, seed: int, known: Sequence[Judged]) -> None:
        self.problem, self.tower = problem, without_weights(problem.backbone)
        self.heads, self.expected = heads_of(problem), _expected(problem)
        count = _fewest(problem, self.expected)
        if count < 2:
            raise InputError("`images` has a task with one image; a choice needs one to solve from and one to judge by")
        self.parts = max(round(1 / held_out), 2)
        self.turns = min(self.parts, count, math.ceil(ENOUGH * self.parts / count))
        self.part_of = {task: _parts(len(rows), self.parts, seed, task) for task, rows in self.expected.items()}
        self.table = {repr(judged.start): judged for judged in known}

    def __call__(self, start: Start) -> Judged:
        if repr(start) not in self.table:
            total = torch.stack([self._turn(start, turn) for turn in range(self.turns)]).sum(0)
            share, divergence = (total[:2] / total[2]).tolist()
            self.table[repr(start)] = Judged(start, Agreement(share, divergence))
        return self.table[repr(start)]

    def _turn(self, start: Start, turn: int) -> Tensor:
        """Agreeing units, divergence and units of one held-out part, over all processes and tasks; [3]."""
        kept = {task: _Part(self.problem.images[task], part != turn) for task, part in self.part_of.items()}
        solution = start.solve(replace(self.problem, images=kept, store=None, progress=None))
        weights = self.problem.experts.layout.unflatten(solution.weights) | self.problem.buffers | solution.buffers
        # A task weighs as much as another, whatever its number of images.
        scores = [self._score(weights, task, part == turn) for task, part in self.part_of.items()]
        return torch.stack(scores).sum(0)

    @torch.no_grad()
    def _score(self, weights: Mapping[str, Tensor], task: str, held: Tensor) -> Tensor:
        expected = self.expected[task][held]
        total, done = torch.zeros(3, dtype=torch.float64, device=expected.device), 0
        for batch in _Part(self.problem.images[task], held):
            logits = logits_of(self.tower, weights, batch.to(expected.device), self.heads[task])
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
    """What each expert says of its task's images on this process: logits [N, k, C]."""
    tower, logits = without_weights(problem.backbone), {}
    for task, head in heads_of(problem).items():
        weights = problem.expert(task) | problem.buffers
        rows = [logits_of(tower, weights, batch, head) for batch in problem.batches(task)]
        logits[task] = torch.cat(rows) if rows else problem.anchor.new_zeros(0, 1, head.classes)
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
