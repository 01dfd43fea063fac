"""The contract of a transform."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["Transform"]


class Transform(ABC):
    """Task vectors in, task vectors out; the given bank is not changed."""

    takes: Literal["rows", "own", "experts"] = "rows"
    """What may come before it in a list: `"rows"`, anything; `"own"`, what leaves each row what one task has changed;
    `"experts"`, nothing, since it compares with the experts' own task vectors.
    """

    joint: ClassVar[bool] = False
    """Whether the rows are shares of one merge, and no longer what each task has changed."""

    published: ClassVar[float | Literal["average"] | None] = None
    """The equal coefficient of the static merge, for `init: published`: the authors', or where they chose it by labels
    ours by agreement, see docs/transforms.md. None: that of the vectors as they were given.
    """

    @abstractmethod
    def __call__(self, bank: TaskVectors) -> TaskVectors:
        """The transformed bank: same tasks, same pre-trained weights."""
