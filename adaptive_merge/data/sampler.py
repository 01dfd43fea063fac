"""Which images a step sees: a pure function of (seed, task, step).

There is nothing to save and nothing to restore: a resumed run, a run with more workers and a run on more
processes all draw the same images, because every process computes the same global batch and takes its share.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["Draws", "Sampling", "Schedule", "StepSampler", "chosen", "draw", "generator", "shuffled"]

Sampling = Literal["fresh", "epoch"]
Schedule = Literal["joint", "shuffled"]


def draw(size: int, batch: int, seed: int, task: str, step: int, sampling: Sampling = "fresh") -> np.ndarray:
    """Indices [batch] into `size` images for one task and step.

    `"fresh"` draws without repeats within the step and independently between steps, as the published loops
    do. `"epoch"` walks through one permutation after another, so that every image comes once per pass.
    """
    if sampling == "fresh":
        return generator(seed, task, step).choice(size, size=min(batch, size), replace=False)
    positions = np.arange(step * batch, (step + 1) * batch)
    passes = positions // size
    order = {turn: generator(seed, task, int(turn)).permutation(size) for turn in np.unique(passes)}
    return np.array([order[turn][position % size] for turn, position in zip(passes, positions)])


def shuffled(tasks: tuple[str, ...], seed: int, round_: int) -> list[str]:
    """The tasks in the order of one round."""
    return [tasks[index] for index in generator(seed, "order of tasks", round_).permutation(len(tasks))]


def chosen(pool: Tensor, count: int, seed: int, name: str) -> Tensor:
    """At most `count` random images of a pool, in the order of the pool."""
    return pool[torch.from_numpy(np.sort(generator(seed, name, 0).permutation(len(pool))[:count]))]


def generator(seed: int, name: str, counter: int) -> np.random.Generator:
    """Random numbers that depend on nothing else."""
    # Keyed by name: adding or removing a task does not change what the others draw.
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=[seed, key], counter=[0, 0, 0, counter]))


@dataclass(frozen=True)
class Draws:
    """All draws of a run; knows image numbers and nothing else of the images.

    Args:
        pools: task → int64, the images to draw from.
        batch: images of a task in one step, over all processes.
        seed, sampling, schedule: as for `TaskStream`.
        one_pass: every image comes once, in random order; `sampling` does not matter then.
    """

    pools: Mapping[str, Tensor]
    batch: int
    seed: int = 0
    sampling: Sampling = "fresh"
    schedule: Schedule = "joint"
    one_pass: bool = False

    @property
    def end(self) -> int | None:
        """The number of steps there are, None where there is no end."""
        return len(self._plan) if self.one_pass else None

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        """Task → the images, int64 [batch], that a step sees over all processes."""
        if self.one_pass:
            return {task: self._turn(task, turn) for task, turn in self._plan[step]}
        tasks, turn = tuple(self.pools), step
        if self.schedule == "shuffled":
            turn, place = divmod(step, len(tasks))
            tasks = (shuffled(tasks, self.seed, turn)[place],)
        return {task: self._draw(task, turn) for task in tasks}

    def watched(self, task: str, count: int, step: int) -> Tensor:
        """int64: at most `count` images of a task that a guard may look at after `step` steps.

        The same random ones at every step; in a single pass the last ones that were seen, for later ones have not
        come yet.
        """
        if not self.one_pass:
            pool = self.pools[task]
            return pool[torch.from_numpy(generator(self.seed, f"watched {task}", 0).permutation(len(pool))[:count])]
        turns = sum(name == task for plan in self._plan[:step] for name, _ in plan)
        seen = min(turns * self.batch, len(self.pools[task]))
        return self.order(task)[max(0, seen - count) : seen]

    def opening(self, task: str, count: int) -> Tensor:
        """int64: the first images of a task, at most `count`, in the order of a single pass."""
        return self.order(task)[:count]

    def order(self, task: str) -> Tensor:
        """All images of a task in the order of a single pass."""
        pool = self.pools[task]
        return pool[torch.from_numpy(generator(self.seed, task, 0).permutation(len(pool)))]

    def _draw(self, task: str, turn: int) -> Tensor:
        pool = self.pools[task]
        return pool[torch.from_numpy(draw(len(pool), self.batch, self.seed, task, turn, self.sampling))]

    def _turn(self, task: str, turn: int) -> Tensor:
        return self.order(task)[turn * self.batch : (turn + 1) * self.batch]

    @cached_property
    def _plan(self) -> list[list[tuple[str, int]]]:
        """The steps of a single pass: which tasks come, and in which turn of theirs; done tasks drop out."""
        turns = {task: -(-len(pool) // self.batch) for task, pool in self.pools.items()}
        rounds = [[task for task in turns if turn < turns[task]] for turn in range(max(turns.values()))]
        if self.schedule == "joint":
            return [[(task, turn) for task in tasks] for turn, tasks in enumerate(rounds)]
        return [[(task, turn)] for turn, tasks in enumerate(rounds) for task in shuffled(tuple(tasks), self.seed, turn)]


class StepSampler(Sampler[int]):
    """Step numbers from the trainer's clock on; resuming means starting at a later step.

    Args:
        clock: tells the number of steps already taken, asked when iteration starts.
        end: the number of steps there are; default: no end.
    """

    def __init__(self, clock: Callable[[], int], end: int | None = None) -> None:
        self.clock, self.end = clock, end

    def __iter__(self) -> Iterator[int]:
        start = self.clock()
        return itertools.count(start) if self.end is None else iter(range(start, self.end))
