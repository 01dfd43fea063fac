"""The contract of a transform."""

from __future__ import annotations

from abc import ABC, abstractmethod

from adaptive_merge.merge.task_vectors import TaskVectors

__all__ = ["Transform"]


class Transform(ABC):
    """Task vectors in, task vectors out; the given bank is not changed."""

    @abstractmethod
    def __call__(self, bank: TaskVectors) -> TaskVectors:
        """The transformed bank: same tasks, same pre-trained weights."""
