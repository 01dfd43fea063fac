"""What a module is given, looked at before anything is made of it."""

from __future__ import annotations

from collections.abc import Sequence

from adaptive_merge.engine import identity
from adaptive_merge.engine.transformed import transformed
from adaptive_merge.errors import InputError, did_you_mean
from adaptive_merge.merge.task_vectors import TaskVectors
from adaptive_merge.objectives.base import Objective
from adaptive_merge.schedule import Stage
from adaptive_merge.transforms.base import Transform

__all__ = ["check_settings", "experts_of", "merged_of"]


def check_settings(accumulate: str, stages: Sequence[Stage], objective: Objective | None) -> None:
    """InputError where settings of a step are unknown, or contradict each other."""
    if accumulate not in ("auto", "joint", "per_task"):
        raise InputError(f"unknown accumulate {accumulate!r}; choose 'auto', 'joint' or 'per_task'")
    if stages and objective:
        raise InputError("give either one objective or stages with an objective each, not both")


def experts_of(task_vectors: TaskVectors, blocks: str | None) -> TaskVectors:
    """The bank, with its repeated blocks as `blocks` names them."""
    if not isinstance(task_vectors, TaskVectors):
        raise InputError(
            f"`task_vectors` is a {type(task_vectors).__name__}; make a bank of state dicts with "
            "TaskVectors.from_state_dicts"
        )
    return task_vectors.with_blocks(blocks) if blocks is not None else task_vectors


def merged_of(
    experts: TaskVectors, unseen: Sequence[str], transforms: Sequence[Transform]
) -> tuple[TaskVectors, TaskVectors]:
    """The bank of the experts that are merged, as it came and transformed."""
    for task in (task for task in unseen if task not in experts.tasks):
        raise InputError(f"there is no task {task!r} to leave out{did_you_mean(task, experts.tasks)}")
    kept = [task for task in experts.tasks if task not in unseen]
    if not kept:
        raise InputError("all tasks are left out; keep at least one to merge and to adapt on")
    merged = experts.select(kept) if unseen else experts
    for number, transform in enumerate(transforms, 1):
        identity.check_numbers(identity.of_part(f"transform {number}", transform))
    return merged, transformed(merged, transforms)
