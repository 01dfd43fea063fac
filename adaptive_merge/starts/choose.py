"""Settings chosen without labels: solved from some images, judged by agreement with the experts on the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adaptive_merge.errors import InputError
from adaptive_merge.merge.backbone import without_weights
from adaptive_merge.starts.base import Choice, Judged, Problem, Solution, Start
from adaptive_merge.starts.predictions import agreement, heads_of, logits_of, mean_agreement
from adaptive_merge.starts.regression import CompensatedRegression

__all__ = ["ChosenRegression", "choose"]

# Images a task to judge by; where one held-out part has fewer, others take their turn too. With 16 images a task the
# noise of the divergence was larger than what settings differ by, and cost a point of accuracy (embedded suite).
ENOUGH = 64

FEW = 12
"""Images a task below which no anchor that reaches far was any good (embedded suite, 4 images)."""

NOISE = 0.45
"""Over the root of the number of units that are judged: the share of the divergence by which a later round has to be
better, so that settings are not changed for nothing: 4 % with 16 images of 8 tasks, 2 % with 64 (embedded suite).
"""

SCORES = "scores of walks"
"""Name of the tensor beside those of the walk under way in a store."""


Change = Any
"""What replaces a setting, or a function that makes it from the setting so far."""


class ChosenRegression(Start):
    """The compensated regression with settings chosen without labels.

    First λ and ρ together, since an anchor that reaches further wants to be held to more; then λ; then the mixing of
    the targets, whether the stem is solved, and the weight of the other tokens. That is nine solves from a part of
    the images, and one from all of them; with few images, nine from each of several parts.

    Args:
        held_out: share of each task's images that settings are judged on.
        seed: of the division.
    """

    def __init__(self, held_out: float = 0.25, seed: int = 0) -> None:
        _check(held_out)
        self.held_out, self.seed = held_out, seed

    def solve(self, problem: Problem) -> Solution:
        judge = _Judge(problem, self.held_out, self.seed, _Walks(problem, self))
        choice = judge.choose(CompensatedRegression(), rounds_for(judge.images), others=1)
        return replace(choice.start.solve(judge.walks.next()), choice=choice)


def rounds_for(images: int) -> list[list[dict[str, Change]]]:
    """Settings worth trying, by the number of images a task.

    Near the anchor the best λ fell with the square of the number, further out with the number itself (embedded
    suite, 16 to 512 images a task).
    """
    near, far = min(max(0.5 * (16 / images) ** 2, 5e-4), 1.0), min(4.8 / images, 1.0)
    pairs = [(near, 1.0), *((far, reach) for reach in ((1.5, 2.0) if images < FEW else (2.0, 3.0, 4.0)))]
    first = [{"strength": strength, "extrapolation": reach} for strength, reach in pairs]
    around: list[dict[str, Change]] = [{"strength": lambda best: best / 3}, {"strength": lambda best: 3 * best}]
    return [first, around, [{"mixing": 0.5}], [{"stem": True}], [{"other_tokens": 0.003}]]


def choose(
    problem: Problem,
    start: Start,
    rounds: Sequence[Sequence[Mapping[str, Change]]],
    held_out: float = 0.25,
    seed: int = 0,
) -> Choice:
    """Try settings round by round, and go on from those that agree best with the experts, by more than the noise.

    Agreement is the Jensen–Shannon divergence of the predictions, up to the scale of a task's logits: on the few
    images that can be held out, the share of equal classes is too coarse. Each process divides its own images; sums
    over all of them decide, so that all choose the same.

    Args:
        problem: with the heads of all tasks. Its store is not used: it could not tell one list of rounds from another.
        start: where to begin; its class is kept. It is judged itself only without rounds.
        rounds: of each round the constructor's arguments that replace those of the best so far.
        held_out: share of each task's images that settings are judged on, in (0, .5].
        seed: of the division.

    Raises:
        InputError: a task with fewer than two images; no head.
    """
    _check(held_out)
    problem = replace(problem, store=None)
    return _Judge(problem, held_out, seed, _Walks(problem, start)).choose(start, rounds)


class _Walks:
    """Several solves one after another: they report their progress as one, and go on where they were stopped."""

    def __init__(self, problem: Problem, start: Start) -> None:
        self.problem, self.identity = problem, problem.identity(start) if problem.store else ""
        self.count = 1
        self.scores: list[Tensor] = []
        done, tensors = (problem.store.load(self.identity) if problem.store else None) or (0, {})
        self.kept = [score.to(problem.anchor.device) for score in tensors.pop(SCORES, ())]
        self.current = (done, tensors) if tensors else None

    def next(self, images: Mapping[str, Iterable[Tensor]] | None = None) -> Problem:
        """The problem of the next walk, from some of the images or from all."""
        images = self.problem.images if images is None else images
        store = self if self.problem.store else None
        return replace(self.problem, images=images, progress=self.report, store=store)

    def score(self, make: Callable[[], Tensor]) -> Tensor:
        """What a walk is worth: as it was kept, or made now."""
        self.scores.append(self.kept.pop(0) if self.kept else make())
        return self.scores[-1]

    def report(self, done: int, blocks: int) -> None:
        if self.problem.progress:
            self.problem.progress(len(self.scores) * blocks + done, self.count * blocks)

    def load(self, identity: str) -> tuple[int, dict[str, Tensor]] | None:
        """As a `Store`: what there is of the walk that was under way."""
        current, self.current = self.current, None
        return current

    def save(self, identity: str, done: int, tensors: Mapping[str, Tensor]) -> None:
        """As a `Store`: the walk under way, beside the scores of those before it."""
        if self.problem.store:
            scores = {SCORES: torch.stack(self.scores)} if self.scores else {}
            self.problem.store.save(self.identity, done, {**tensors, **scores})


class _Judge:
    """Solves from parts of the images and scores on the others; a start is judged once."""

    def __init__(self, problem: Problem, held_out: float, seed: int, walks: _Walks) -> None:
        self.problem, self.tower, self.walks = problem, without_weights(problem.backbone), walks
        self.heads, self.expected = heads_of(problem), _expected(problem)
        self.images = _fewest(problem, self.expected)
        if self.images < 2:
            raise InputError("`images` has a task with one image; a choice needs one to solve from and one to judge by")
        self.parts = max(round(1 / held_out), 2)
        self.turns = min(self.parts, self.images, math.ceil(ENOUGH * self.parts / self.images))
        self.part_of = {task: _parts(len(rows), self.parts, seed, task) for task, rows in self.expected.items()}
        self.units = 1.0  # judged of all tasks, the same for every start
        self.table: dict[str, Judged] = {}

    def choose(self, start: Start, rounds: Sequence[Sequence[Mapping[str, Change]]], others: int = 0) -> Choice:
        """See `choose`; `others` is the number of walks that follow."""
        self.walks.count = self.turns * max(sum(map(len, rounds)), 1) + others
        contest = [] if rounds else [self(start)]
        for candidates in rounds:
            begin = contest[0].start if contest else start
            judged = [self(_changed(begin, changes)) for changes in candidates]
            contest = [min([*contest, *judged], key=lambda row: self._handicap(row, contest))]
        return Choice(contest[0].start, tuple(self.table.values()))

    def _handicap(self, judged: Judged, best: Sequence[Judged]) -> float:
        """Its divergence; of the best so far, less the noise that a change has to exceed."""
        noise = NOISE / math.sqrt(self.units) if judged in best else 0
        return judged.agreement.divergence * (1 - noise)

    def __call__(self, start: Start) -> Judged:
        if repr(start) not in self.table:
            scores = [self.walks.score(partial(self._turn, start, turn)) for turn in range(self.turns)]
            totals = torch.stack(scores).sum(0)
            self.units = float(totals[:, 0].sum())
            self.table[repr(start)] = Judged(start, mean_agreement(totals))
        return self.table[repr(start)]

    def _turn(self, start: Start, turn: int) -> Tensor:
        """Each task's sums, as of `agreement`, on one held-out part, over all processes; [T, …]."""
        kept = {task: _Part(self.problem.images[task], part != turn) for task, part in self.part_of.items()}
        solution = start.solve(self.walks.next(kept))
        weights = self.problem.experts.layout.unflatten(solution.weights) | self.problem.buffers | solution.buffers
        return torch.stack([self._score(weights, task, part == turn) for task, part in self.part_of.items()])

    @torch.no_grad()
    def _score(self, weights: Mapping[str, Tensor], task: str, held: Tensor) -> Tensor:
        expected = self.expected[task][held]
        total, done = agreement(expected[:0], expected[:0]), 0
        for batch in _Part(self.problem.images[task], held):
            logits = logits_of(self.tower, weights, batch.to(expected.device), self.heads[task])
            total += agreement(logits, expected[done : done + len(batch)])
            done += len(batch)
        return self.problem.reduce(total)


def _changed(start: Start, changes: Mapping[str, Change]) -> Start:
    settings = start.settings
    new = {name: change(settings[name]) if callable(change) else change for name, change in changes.items()}
    return type(start)(**(settings | new))


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
        weights = problem.tower(task)
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
