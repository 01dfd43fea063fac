"""For transforms that wrap another one: what the inner one makes, in memory that the outer one may write to."""

from __future__ import annotations

from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.transforms.base import Transform

__all__ = ["apply_inner"]


def apply_inner(transform: Transform | None, bank: TaskVectors) -> TaskVectors:
    """`transform(bank)`, or a copy of the bank where there is none; its vectors share no memory with the bank's.

    Written over in place, they keep the peak at two banks, the one given among them.
    """
    made = transform(bank) if transform else bank
    if made.vectors.data_ptr() == bank.vectors.data_ptr():
        return bank.with_vectors(bank.vectors.clone())
    return made
