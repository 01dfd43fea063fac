"""Protocols: which images a run may adapt on, which it is scored on, and when.

The literature adapts and scores on the same test images. That is one protocol of four here, and every run says
which one it followed and how many images it adapted on and was scored on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from adaptive_merge.data.sampler import generator
from adaptive_merge.errors import InputError, did_you_mean

__all__ = ["Holdout", "Online", "Protocol", "Transductive", "Unseen"]


class Protocol(ABC):
    """Which images of a task are adapted on and which are scored; a pure function of task and size."""

    name: ClassVar[str]
    """As it appears in results and reports."""

    one_pass: ClassVar[bool] = False
    """Whether every image comes once, and its prediction counts as it was before the image was used."""

    unseen: tuple[str, ...] = ()
    """Tasks that are scored, but neither merged nor adapted on."""

    @abstractmethod
    def adapted(self, task: str, size: int) -> Tensor:
        """int64, ascending: those of a task's `size` images that the stream draws from."""

    @abstractmethod
    def scored(self, task: str, size: int) -> Tensor:
        """int64, ascending: those of a task's `size` images that are scored."""

    def check(self, tasks: Iterable[str]) -> None:
        """InputError where the protocol does not fit a suite of these tasks."""
        tasks = tuple(tasks)
        for task in self.unseen:
            if task not in tasks:
                raise InputError(f"there is no task {task!r} to leave out{did_you_mean(task, tasks)}")
        if len(self.unseen) == len(tasks):
            raise InputError("all tasks are left out; keep at least one to merge and to adapt on")


class Transductive(Protocol):
    """Adapt on all test images and score on the same: what the literature does."""

    name = "transductive"

    def adapted(self, task: str, size: int) -> Tensor:
        return torch.arange(size)

    def scored(self, task: str, size: int) -> Tensor:
        return torch.arange(size)


class Holdout(Protocol):
    """Adapt on a random part of each task's images and score on the rest.

    Args:
        share: of the images that are adapted on, in (0, 1).
        seed: of the division. It is not the run's seed, so that runs of several seeds are scored on the same images.
    """

    name = "holdout"

    def __init__(self, share: float = 0.5, seed: int = 0) -> None:
        if not 0 < share < 1:
            raise InputError(f"the share of images to adapt on lies between 0 and 1, got {share}")
        self.share, self.seed = share, seed

    def adapted(self, task: str, size: int) -> Tensor:
        return self._halves(task, size)[0]

    def scored(self, task: str, size: int) -> Tensor:
        return self._halves(task, size)[1]

    def _halves(self, task: str, size: int) -> tuple[Tensor, Tensor]:
        if size < 2:
            raise InputError(f"task {task!r} has {size} image; a hold-out needs one to adapt on and one to score")
        order = generator(self.seed, f"hold-out {task}", 0).permutation(size)
        cut = min(max(round(self.share * size), 1), size - 1)
        return tuple(torch.from_numpy(np.sort(part)) for part in (order[:cut], order[cut:]))


class Online(Transductive):
    """One pass: every image is predicted first and adapted on afterwards, and that first prediction counts.

    A step takes `images_per_task` images of each task, at least one, in an order drawn from the run's seed, until a
    task has none left. The run ends with the pass, whatever `max_steps` says. What no step predicted, because the run
    was stopped before, is scored by the model that was kept.
    """

    name = "online"
    one_pass = True


class Unseen(Transductive):
    """Merge and adapt on some tasks; score the others as well, each with its own head and without adapters.

    Args:
        tasks: those that are left out of merge and adaptation.
    """

    name = "unseen"

    def __init__(self, tasks: Sequence[str]) -> None:
        if not tasks:
            raise InputError("the protocol 'unseen' needs at least one task that is left out; name it in `tasks`")
        self.tasks = self.unseen = tuple(dict.fromkeys(tasks))

    def adapted(self, task: str, size: int) -> Tensor:
        return torch.arange(0 if task in self.unseen else size)
