"""Which images a step sees: a pure function of (seed, task, step).

There is nothing to save and nothing to restore: a resumed run, a run with more workers and a run on more
processes all draw the same images, because every process computes the same global batch and takes its share.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

__all__ = ["Sampling", "StepSampler", "draw", "shuffled"]

Sampling = Literal["fresh", "epoch"]


def draw(size: int, batch: int, seed: int, task: str, step: int, sampling: Sampling = "fresh") -> np.ndarray:
    """Indices [batch] into `size` images for one task and step.

    `"fresh"` draws without repeats within the step and independently between steps, as the published loops
    do. `"epoch"` walks through one permutation after another, so that every image comes once per pass.
    """
    if sampling == "fresh":
        return _generator(seed, task, step).choice(size, size=min(batch, size), replace=False)
    positions = np.arange(step * batch, (step + 1) * batch)
    passes = positions // size
    order = {turn: _generator(seed, task, int(turn)).permutation(size) for turn in np.unique(passes)}
    return np.array([order[turn][position % size] for turn, position in zip(passes, positions)])


def shuffled(tasks: tuple[str, ...], seed: int, round_: int) -> list[str]:
    """The tasks in the order of one round."""
    return [tasks[index] for index in _generator(seed, "order of tasks", round_).permutation(len(tasks))]


def _generator(seed: int, name: str, counter: int) -> np.random.Generator:
    # Keyed by name: adding or removing a task does not change what the others draw.
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=[seed, key], counter=[0, 0, 0, counter]))


class StepSampler(Sampler[int]):
    """Step numbers from the trainer's clock on, without end; resuming means starting at a later step.

    Args:
        clock: tells the number of steps already taken, asked when iteration starts.
    """

    def __init__(self, clock: Callable[[], int]) -> None:
        self.clock = clock

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.clock())
